"""The TPU compiler's listing of a kernel's schedule, read."""

import collections
import math
import re


def kernel_bundles(text: str) -> int:
    """Bundles that a kernel's final schedule runs through: each times the trips of its loops.

    The listing marks a bundle's loops by as many `>`, a loop's begin by LB, and its exit test.
    """
    path: list[int] = []  # the loops around a line
    sizes: collections.Counter[tuple[int, ...]] = collections.Counter()
    trips: dict[int, int] = {}
    for line in text.splitlines():
        match = re.match(r"\s*(?:0x)?[0-9a-f]+\s+(\w\w)?\s*: (>*)", line)
        if not match:
            continue
        depth = len(match[2])
        if match[1] == "LB":
            path = [*path[: depth - 1], len(trips)]
            trips[len(trips)] = 1
        if "{}" not in line[match.end() :]:  # empty bundles have no marks
            path = path[:depth]
        sizes[tuple(path)] += 1
        if found := re.search(r"totalorder %\w+, (\d+) /\* loop exit test", line):
            trips[path[-1]] = int(found[1])
    return sum(size * math.prod(trips[loop] for loop in loops) for loops, size in sizes.items())
