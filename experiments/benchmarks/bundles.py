"""The TPU compiler's listing of a kernel's schedule: made, and read."""

import collections
import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

KERNELS = """
import sys
import jax, jax.numpy as jnp
from vit_jax.costs.topology import open_topology, parse_topology
from vit_jax.models.attention import flash_attention
from vit_jax.parallel.mesh import MeshConfig, batch_sharding, make_mesh, use_mesh
shape = tuple(map(int, sys.argv[2:]))
mesh = make_mesh(MeshConfig(), open_topology(parse_topology(sys.argv[1]))[:1])
x = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=batch_sharding(mesh))
attention = lambda q, k, v: flash_attention(q, k, v, "pallas")
with use_mesh(mesh):
    jax.jit(lambda q, k, v, dy: jax.vjp(attention, q, k, v)[1](dy)).lower(x, x, x, x).compile()
"""


def kernel_name(text: str) -> str | None:
    """Which of attention's two kernels is named in `text`."""
    found = re.search(r"(forward|backward)_attention", text)
    return found and found[0]


def attention_bundles(topology: str, shape: tuple[int, int, int, int]) -> dict[str, int]:
    """Bundles of attention's two kernels for one device's [B, N, H, K], each compiled by itself.

    In a process of its own: the compiler writes schedules only if it was told so when it was
    loaded, and for whole models it would write for hours.
    """
    with tempfile.TemporaryDirectory() as folder:
        dump = (
            f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_mosaic_dump_to={folder}"
        )
        subprocess.run(
            [sys.executable, "-c", KERNELS, topology, *map(str, shape)],
            env={**os.environ, "LIBTPU_INIT_ARGS": dump},
            check=True,
            stderr=subprocess.DEVNULL,
        )
        found = {}
        for path in Path(folder).glob("*-final_bundles.txt"):
            name = kernel_name(path.name)
            if name and "schedule-analysis" not in path.name:
                found[name] = kernel_bundles(path.read_text())
    return found


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
