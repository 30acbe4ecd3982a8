"""The device mesh and every sharding rule: the only place that names mesh axes.

The global batch is split over both axes. `fsdp` splits large parameters too, and the optimizer's
moments with them; `data` replicates them. Any shape of mesh computes the same numbers.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
import numpy as np
from jax.experimental.mesh_utils import create_hybrid_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; -1 (at most once) takes what is left.

    `rules` are (regex, placement) pairs over "/"-joined paths of the train state; the first that
    matches wins. Placements: "replicate", or "fsdp": split the largest dimension that divides, if
    the tensor has `min_size` elements (small ones cost more to gather than to keep).
    """

    data: int = -1
    fsdp: int = 1
    rules: tuple[tuple[str, str], ...] = ((".*", "fsdp"),)
    min_size: int = 2**20


def make_mesh(config: MeshConfig, on: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices of all processes, or over those given.

    Several slices of TPUs lie along `data`, whose sums alone cross the slower network between them.
    Raises ValueError if the devices don't fit the config.
    """
    on = jax.devices() if on is None else on
    devices = len(on)
    shape = [config.data, config.fsdp]
    known = math.prod(n for n in shape if n != -1)
    if shape.count(-1) > 1 or any(n < 1 and n != -1 for n in shape):
        raise ValueError(f"mesh {_show(shape)}: expected positive sizes and at most one -1")
    if -1 in shape and devices % known == 0:
        shape[shape.index(-1)] = devices // known
    if math.prod(shape) != devices:
        raise ValueError(
            f"mesh {_show(shape)} does not fit {devices} devices: their product must be {devices}; "
            "set one axis to -1 to take what is left"
        )
    for _, placement in config.rules:
        if placement not in ("replicate", "fsdp"):
            raise ValueError(f"placement {placement!r}: expected 'replicate' or 'fsdp'")
    # Auto: since jax 0.9 the default is Explicit, under which sharding becomes part of types.
    types = (AxisType.Auto,) * len(AXES)
    slices = len({d.slice_index for d in on if d.platform == "tpu" and hasattr(d, "slice_index")})
    if slices <= 1:
        return jax.make_mesh(tuple(shape), AXES, axis_types=types, devices=on)
    if shape[0] % slices:
        raise ValueError(
            f"mesh {_show(shape)} does not fit {slices} slices: data must be a multiple of {slices}"
        )
    grid = create_hybrid_device_mesh([shape[0] // slices, *shape[1:]], [slices, 1], on)
    return Mesh(grid, AXES, axis_types=types)


def _show(shape: list[int]) -> str:
    return " x ".join(f"{name}={n}" for name, n in zip(AXES, shape, strict=True))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same value on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis split over all devices."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def constrain_batch(tree: Any, axis: int = 0) -> Any:
    """Inside jit, under `jax.set_mesh`: keeps `axis` of every leaf split over all devices.

    Without a mesh, and where the axis doesn't divide (the one image of `init`), leaves pass.
    """
    mesh = jax.sharding.get_abstract_mesh()
    spec = PartitionSpec(*[None] * axis, AXES)

    def constrain(x):
        splits = not mesh.empty and x.shape[axis] % mesh.size == 0
        return jax.lax.with_sharding_constraint(x, spec) if splits else x

    return jax.tree.map(constrain, tree)


def platform() -> str:
    """Inside jit: "tpu", "gpu" or "cpu", of the devices of `use_mesh`, or else of jax's default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def check_batch_size(batch_size: int, mesh: Mesh, accumulation: int = 1) -> None:
    """ValueError unless every microbatch divides over the devices."""
    unit = mesh.size * accumulation
    if batch_size < 1 or batch_size % unit:
        below = max(batch_size // unit, 1) * unit
        over = f"{mesh.size} devices" + (f" x {accumulation} microbatches" * (accumulation > 1))
        raise ValueError(
            f"batch size {batch_size} does not divide over {over}: "
            f"use a multiple of {unit} ({below} or {below + unit})"
        )


def state_shardings(mesh: Mesh, config: MeshConfig, shapes: Any) -> Any:
    """NamedShardings for a tree of arrays or shapes, by the first rule that matches each path."""

    def place(path, leaf) -> NamedSharding:
        name = path_name(path)
        placement = next((p for regex, p in config.rules if re.fullmatch(regex, name)), None)
        if placement is None:
            raise ValueError(f"no sharding rule matches {name}: end the rules with ('.*', ...)")
        split = mesh.shape["fsdp"]
        dims = [d for d, n in enumerate(leaf.shape) if n % split == 0]
        if placement == "replicate" or split == 1 or leaf.size < config.min_size or not dims:
            return replicated(mesh)
        largest = max(dims, key=lambda d: (leaf.shape[d], d))
        return NamedSharding(mesh, PartitionSpec(*[None] * largest, "fsdp"))

    return jax.tree_util.tree_map_with_path(place, shapes)


def path_name(path: tuple) -> str:
    """A key path of jax.tree_util as "a/b/0"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Which rows of a global batch this process's devices hold: ascending, int64.

    Asked of the sharding and not derived from the process's number, since a mesh laid out for the
    network need not list a process's devices one after another.
    """
    slices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[s] for s in slices]))


def put_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """This process's rows (see `local_rows`) -> global arrays, split over all devices."""
    sharding = batch_sharding(mesh)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}


def put_tree(tree: Any, shardings: Any) -> Any:
    """Host arrays, equal on every process -> global arrays; each device takes its part alone."""

    def put(leaf, sharding):
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

    return jax.tree.map(put, tree, shardings)


def use_mesh(mesh: Mesh) -> AbstractContextManager:
    """Makes `mesh` the one that `constrain_batch` means."""
    return jax.set_mesh(mesh)
