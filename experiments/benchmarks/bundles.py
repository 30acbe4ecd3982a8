"""Creates and parses the TPU compiler's listings of kernel schedules."""

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
    """Returns which of the two attention kernels `text` names; None for neither."""
    found = re.search(r"(forward|backward)_attention", text)
    return found and found[0]


def attention_bundles(topology: str, shape: tuple[int, int, int, int]) -> dict[str, int]:
    """Counts the bundles of both attention kernels for one device's [B, N, H, K].

    Compiles only the kernels, because listings of whole models take hours, and in a new process,
    because the compiler reads its options when it is loaded.
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
    """Counts the executed bundles of a kernel's final schedule, with loops' trip counts.

    The listing shows loop depth as `>` characters, the beginning of a loop as LB, and its exit
    test.
    """
    path: list[int] = []  # enclosing loops of a line
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
