"""The device mesh and the sharding rules. Only this module and `fsdp` name mesh axes.

| axis     | shards the batch | shards parameters and optimizer moments                     |
|----------|------------------|-------------------------------------------------------------|
| `data`   | yes              | no                                                          |
| `fsdp`   | yes              | large ones; gathered where used                             |
| `tensor` | no               | attention heads and MLP hidden width, as in Megatron-LM     |
|          |                  | (arXiv 1909.08053, section 3)                               |

Results don't depend on the mesh's shape.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
import numpy as np
from jax.experimental.mesh_utils import create_hybrid_device_mesh
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from vit_jax.config import InputError

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# Dimensions count from the end, so that the rules also match scanned layers, which have one more
# leading axis. Splits columns before the nonlinearity and rows after it: a block then needs two
# all-reduces over `tensor` forward, after attention and after the MLP, and two backward.
RULES: tuple[tuple[str, str], ...] = (
    (r".*/v(_row|_col)?/.*", "fsdp"),  # Adafactor's second moments lack an axis
    (r".*/(query|key|value)/(kernel|bias|lora_b)", "tensor[-2]"),  # [D, H, K], [H, K], [R, H, K]
    (r".*/out/(kernel|lora_a)", "tensor[-3]"),  # [H, K, D], [H, K, R]
    (r".*/(Dense_0|gate)/(kernel|bias)", "tensor[-1]"),  # [D, M], [M]
    (r".*/Dense_1/kernel", "tensor[-2]"),  # [M, D]
    (r".*", "fsdp"),
)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices per axis, and the sharding rules.

    Attributes:
        data, fsdp, tensor: devices per axis; -1, at most once, takes the remaining devices.
        rules: (regex, placement) pairs for "/"-joined paths of the train state; the first match
            wins. Placements: "replicate"; "fsdp", which splits the largest divisible dimension;
            "tensor[-2]", which splits that dimension over `tensor`, and another as "fsdp" does.
        min_size: arrays with fewer elements aren't split over `fsdp`.
        devices: for which the recipe is made. If a start gets fewer, `data` takes those that remain
            beside the largest common divisor of `fsdp` and their number; the run accumulates more,
            see `recipe.build_training`.

    Raises:
        ValueError: an unknown placement, or a number of devices below 1.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    rules: tuple[tuple[str, str], ...] = RULES
    min_size: int = 2**20
    devices: int | None = None

    def __post_init__(self):
        if self.devices is not None and self.devices < 1:
            raise InputError(f"mesh.devices = {self.devices}: expected at least 1, or none")
        for _, placement in self.rules:
            if not re.fullmatch(r"replicate|fsdp|tensor\[-[1-9]\]", placement):
                raise InputError(
                    f"placement {placement!r}: expected 'replicate', 'fsdp' or 'tensor[-1]' "
                    "(any dimension, counted from the last)"
                )


def make_mesh(config: MeshConfig, on: Sequence[jax.Device] | None = None) -> Mesh:
    """Makes a mesh over `on`, by default all devices of all processes.

    TPU slices lie along `data`, so that only its all-reduces use the slower network between them.
    Raises ValueError if the devices don't fit the config.
    """
    on = jax.devices() if on is None else on
    devices = len(on)
    shape = [config.data, config.fsdp, config.tensor]
    if devices < (config.devices or 0) and min(shape[1:]) > 0:
        shape = [-1, math.gcd(config.fsdp, devices // config.tensor), config.tensor]
    known = math.prod(n for n in shape if n != -1)
    if shape.count(-1) > 1 or any(n < 1 and n != -1 for n in shape):
        raise InputError(f"mesh {_show(shape)}: expected positive sizes and at most one -1")
    if -1 in shape and devices % known == 0:
        shape[shape.index(-1)] = devices // known
    if math.prod(shape) != devices:
        raise InputError(
            f"mesh {_show(shape)} does not fit {devices} devices: their product must be {devices}; "
            "set one axis to -1 to take the remaining devices"
        )
    # Auto: since jax 0.9 the default is Explicit, under which sharding becomes part of types.
    types = (AxisType.Auto,) * len(AXES)
    slices = len({d.slice_index for d in on if d.platform == "tpu" and hasattr(d, "slice_index")})
    if slices <= 1:
        mesh = jax.make_mesh(tuple(shape), AXES, axis_types=types, devices=on)
        if devices != shape[1]:
            return mesh
        # jax puts a single axis on a ring, along which TPUs don't reduce-scatter.
        return Mesh(np.array(sorted(on, key=place_in_grid)).reshape(shape), AXES, axis_types=types)
    if shape[0] % slices:
        raise InputError(
            f"mesh {_show(shape)} does not fit {slices} slices: data must be a multiple of {slices}"
        )
    grid = create_hybrid_device_mesh([shape[0] // slices, *shape[1:]], [slices, 1, 1], on)
    return Mesh(grid, AXES, axis_types=types)


def place_in_grid(device: jax.Device) -> tuple[int, ...]:
    """Returns a TPU's coordinates; () for other devices."""
    return (*device.coords, device.core_on_chip) if device.platform == "tpu" else ()


def _show(shape: list[int]) -> str:
    return " x ".join(f"{name}={n}" for name, n in zip(AXES, shape, strict=True))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that replicates an array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch: rows over data and fsdp, replicated along `tensor`."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_parts(mesh: Mesh | AbstractMesh) -> int:
    """Returns the number of shards of a batch."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def constrain_batch(tree: Any, axis: int = 0) -> Any:
    """Constrains `axis` of every leaf to the batch's sharding, inside jit under `use_mesh`.

    Does nothing without a mesh, or if the axis doesn't divide (the single image of `init`).
    """
    mesh = jax.sharding.get_abstract_mesh()
    spec = PartitionSpec(*[None] * axis, BATCH_AXES)

    def constrain(x):
        splits = not mesh.empty and x.shape[axis] % batch_parts(mesh) == 0
        return jax.lax.with_sharding_constraint(x, spec) if splits else x

    return jax.tree.map(constrain, tree)


def map_over_devices(function: Callable, x: jax.Array) -> jax.Array:
    """Applies a function of x [N, ...], one item by one, with each device's share of the N.

    Inside jit under `use_mesh`. Splits one mesh axis after another, and joins them in reverse: in
    one go XLA replicates x where it is split over several axes.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function(x)
    rest = [PartitionSpec.UNCONSTRAINED] * (x.ndim - 1)
    axes = ("fsdp", "tensor", "data")  # the parameters' first: `data` then only takes slices
    specs = [PartitionSpec(axes[:n], *rest) for n in range(1, len(axes) + 1)]
    for spec in specs:
        x = jax.lax.with_sharding_constraint(x, spec)
    x = function(x)
    for spec in reversed(specs):
        x = jax.lax.with_sharding_constraint(x, spec)
    return x


def _device() -> Any:
    return jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]


def platform() -> str:
    """Returns "tpu", "gpu" or "cpu": of the mesh set by `use_mesh`, else of the default device."""
    return _device().platform


def device_kind() -> str:
    """Returns the model of `platform`'s device: "TPU v5 lite", "NVIDIA H100 80GB HBM3", ..."""
    return _device().device_kind


def map_images_and_heads(function: Callable, heads: int) -> Callable:
    """Maps a function of arrays [B, ..., H K] over devices, inside jit under `use_mesh`.

    For kernels that XLA can't partition. Splits images over the batch axes and heads over
    `tensor`; an axis that doesn't divide is replicated.
    """

    def mapped(*arrays):
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or mesh.size == 1:
            return function(*arrays)
        spec = PartitionSpec(
            BATCH_AXES if arrays[0].shape[0] % batch_parts(mesh) == 0 else None,
            *[None] * (arrays[0].ndim - 2),
            "tensor" if heads % mesh.shape["tensor"] == 0 else None,
        )
        split = jax.shard_map(
            function, in_specs=(spec,) * len(arrays), out_specs=spec, check_vma=False
        )
        return split(*arrays)

    return mapped


def check_batch_size(batch_size: int, mesh: Mesh, accumulation: int = 1) -> None:
    """Raises ValueError unless every microbatch divides over the batch's devices."""
    parts = batch_parts(mesh)
    unit = parts * accumulation
    if batch_size < 1 or batch_size % unit:
        below = max(batch_size // unit, 1) * unit
        over = f"{parts} devices" + (f" (data x fsdp of {mesh.size})" * (parts < mesh.size))
        over += f" x {accumulation} microbatches" * (accumulation > 1)
        raise InputError(
            f"batch size {batch_size} does not divide over {over}: "
            f"use a multiple of {unit} ({below} or {below + unit})"
        )


def state_shardings(mesh: Mesh, config: MeshConfig, shapes: Any) -> Any:
    """Returns NamedShardings for a tree of arrays or shapes: the first matching rule per path.

    Raises ValueError for a path without a rule, and for a dimension that `tensor` doesn't divide.
    """

    def place(path, leaf) -> NamedSharding:
        name = path_name(path)
        placement = placement_of(config.rules, name)
        axes: list[str | None] = [None] * len(leaf.shape)
        if placement.startswith("tensor") and mesh.shape["tensor"] > 1:
            axes[_tensor_dim(placement, name, leaf.shape, mesh.shape["tensor"])] = "tensor"
        split = mesh.shape["fsdp"]
        dims = [d for d, n in enumerate(leaf.shape) if axes[d] is None and n % split == 0]
        if placement != "replicate" and split > 1 and leaf.size >= config.min_size and dims:
            axes[max(dims, key=lambda d: (leaf.shape[d], d))] = "fsdp"
        while axes and axes[-1] is None:
            axes.pop()
        return NamedSharding(mesh, PartitionSpec(*axes))

    return jax.tree_util.tree_map_with_path(place, shapes)


def check_tensor_axis(mesh: Mesh, shardings: Any) -> None:
    """Raises ValueError if `tensor` > 1 splits none of the arrays, as in a ResNet."""
    size = mesh.shape["tensor"]
    if size > 1 and not any("tensor" in at.spec for at in jax.tree.leaves(shardings)):
        raise InputError(
            f"mesh tensor={size}: the model has neither attention nor an MLP to split: set tensor=1"
        )


def placement_of(rules: tuple[tuple[str, str], ...], name: str) -> str:
    """Returns the placement of the first rule that matches."""
    placement = next((p for regex, p in rules if re.fullmatch(regex, name)), None)
    if placement is None:
        raise InputError(f"no sharding rule matches {name}: end the rules with ('.*', ...)")
    return placement


def _tensor_dim(placement: str, name: str, shape: tuple[int, ...], split: int) -> int:
    """Returns the dimension in a placement such as "tensor[-2]"; checks that `split` divides it."""
    dim = int(placement[len("tensor[") : -1])
    size = shape[dim] if len(shape) >= -dim else 1
    if size % split:
        fitting = ", ".join(str(n) for n in range(1, size + 1) if size % n == 0)
        raise InputError(
            f"mesh tensor={split} does not divide dimension {dim} of {name}, {shape}: "
            f"use one of {fitting}"
        )
    return dim


def path_name(path: tuple) -> str:
    """Formats a key path of jax.tree_util as "a/b/0"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Returns the rows of a global batch that this process's devices hold: ascending, int64.

    Read from the sharding, because a mesh may not list a process's devices consecutively.
    """
    slices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[s] for s in slices]))


def put_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Makes global sharded arrays from this process's rows (see `local_rows`)."""
    sharding = batch_sharding(mesh)
    # Intended: with several processes, jax's transfer guard would report it.
    with jax.transfer_guard_host_to_device("allow"):
        return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}


def put_tree(tree: Any, shardings: Any) -> Any:
    """Makes global arrays from host arrays that are equal on every process."""

    def put(leaf, sharding):
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

    return jax.tree.map(put, tree, shardings)


def use_mesh(mesh: Mesh) -> AbstractContextManager:
    """Sets the mesh for constraints, kernels and `platform()`, in this thread."""
    return jax.set_mesh(mesh)
