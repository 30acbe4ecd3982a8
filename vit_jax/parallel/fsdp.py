"""Gathers parameters over `fsdp` where they are used, and reduce-scatters their gradients."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from vit_jax.parallel.mesh import (
    BATCH_AXES,
    RULES,
    batch_parts,
    path_name,
    place_in_grid,
    placement_of,
    platform,
)

TILE = (8, 128)  # rows and columns of a TPU's registers
# While a step is traced, its parameters by name: shapes with shardings.
_PLACED: ContextVar[Mapping[str, Any]] = ContextVar("placed", default=MappingProxyType({}))


@contextmanager
def placed_as(params: Any) -> Iterator[None]:
    """Tells `with_gathered` where parameters are: a tree of shapes with NamedShardings.

    While a step is traced: under Auto axes a traced array doesn't show its sharding.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    token = _PLACED.set({path_name(path): leaf for path, leaf in leaves})
    try:
        yield
    finally:
        _PLACED.reset(token)


def with_gathered(
    product: Callable, path: tuple[str, ...], x: jax.Array, kernel: jax.Array, inputs: int = 1
) -> jax.Array:
    """Computes product(x, flat kernel) with the kernel of the layer at `path` gathered over `fsdp`.

    Inside jit under `use_mesh`. Under `placed_as` the kernel's gradient is reduce-scattered. XLA by
    itself would multiply with one shard after another as they pass around a ring, and would
    all-reduce the gradients before it slices them.

    Args:
        product: of x [B, ..., D] and kernel [D, F] -> [B, ..., F], linear in both. It is called
            with one device's parts.
        path: the layer's names.
        x: the layer's input.
        kernel: [*inputs, *outputs], whose axes are flat in D and F.
        inputs: the number of axes that are flat in D.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape["fsdp"] == 1:
        return product(x, kernel.reshape(x.shape[-1], -1))
    name = "/".join((*path, "kernel"))
    leaf, placed = _PLACED.get().get(name), ()
    if leaf and leaf.shape[-kernel.ndim :] == kernel.shape:  # not a teacher's of the same name
        placed = (*leaf.sharding.spec, *[None] * leaf.ndim)[: leaf.ndim]
        placed = placed[-kernel.ndim :]  # without the axis of stacked layers
    split = {axis: dim for dim, axis in enumerate(placed) if axis}
    consecutive = {*split.values()} <= {0, inputs}  # in the flat kernel
    if "fsdp" not in split or not consecutive or x.shape[0] % batch_parts(mesh):
        kernel = jax.lax.with_sharding_constraint(kernel, _gathered(name, kernel, mesh))
        return product(x, kernel.reshape(x.shape[-1], -1))
    axis, tensor = int(split["fsdp"] > 0), split.get("tensor")
    sides, tile = _sides(leaf.sharding.mesh), TILE if platform() == "tpu" else (1, 1)

    def gathered(x, part):
        part = jax.lax.pcast(part, "data", to="varying")  # sums shards of gradients over it
        part = part.reshape(math.prod(part.shape[:inputs]), -1)
        y = product(x, _gather(part, axis, sides, tile))
        return jax.lax.psum(y, "tensor") if tensor == 0 else y

    between = [None] * (x.ndim - 2)
    x_spec, y_spec = (
        PartitionSpec(BATCH_AXES, *between, "tensor" if tensor == dim else None)
        for dim in (0, inputs)
    )
    specs = {"in_specs": (x_spec, PartitionSpec(*placed)), "out_specs": y_spec}
    return jax.shard_map(gathered, **specs)(x, kernel)


def _gather(part: jax.Array, axis: int, sides: tuple[int, ...], tile: tuple[int, int]) -> jax.Array:
    """Gathers an axis of a matrix over `fsdp`, along one side of the chips' grid after another.

    TPUs reduce-scatter, the transpose, along one side, and whole tiles of registers. Otherwise XLA
    all-reduces. Parts of tiles are gathered along an axis of their own.
    """
    grid = np.arange(math.prod(sides)).reshape(sides)
    for side in reversed(range(len(sides))):
        groups = np.moveaxis(grid, side, -1).reshape(-1, sides[side]).tolist()
        gather = partial(
            jax.lax.all_gather,
            axis_name="fsdp",
            axis_index_groups=groups if len(sides) > 1 else None,
        )
        if part.shape[axis] % tile[axis] == 0:
            part = gather(part, axis=axis, tiled=True)
        else:
            rows = -1 if axis == 0 else part.shape[0]
            columns = -1 if axis == 1 else part.shape[1]
            part = jnp.moveaxis(gather(part), 0, axis).reshape(rows, columns)
    return part


def _sides(mesh: Mesh) -> tuple[int, ...]:
    """Returns the sides of the grid of chips along `fsdp`, the last varying fastest.

    One side for devices without a grid, or whose order isn't row-major.
    """
    line = mesh.devices[0, :, 0]
    places = [place_in_grid(device) for device in line]
    sides = tuple(n for n in (len(set(c)) for c in zip(*places, strict=True)) if n > 1)
    return sides if math.prod(sides) == len(line) and places == sorted(places) else (len(line),)


def _gathered(name: str, kernel: jax.Array, mesh: AbstractMesh) -> PartitionSpec:
    """Returns the placement of a kernel that is split over `tensor` alone."""
    axes: list[str | None] = [None] * kernel.ndim
    placement = placement_of(RULES, name)
    if placement.startswith("tensor") and mesh.shape["tensor"] > 1:
        dim = int(placement[len("tensor[") : -1])
        axes[dim] = "tensor" if kernel.shape[dim] % mesh.shape["tensor"] == 0 else None
    return PartitionSpec(*axes)
