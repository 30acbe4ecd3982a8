"""Fits a step into a device's memory by microbatches, then rematerialisation.

The compiler measures each. Neither changes the global batch, so neither changes what is learned.
"""

import ctypes
import dataclasses
import os
import sys

import jax
import jax.numpy as jnp

from vit_jax.config import InputError
from vit_jax.costs.chips import GIB
from vit_jax.costs.compiled import OutOfMemory, compile_for, memory
from vit_jax.models.transformer import further_remat
from vit_jax.parallel.mesh import batch_parts, batch_sharding, replicated, use_mesh
from vit_jax.training.initial import fresh_state
from vit_jax.training.recipe import TrainConfig, Training, build_training

# Share of the device's memory; the rest is for batches in transfer, evaluation and fragmentation.
USABLE = 0.9
USABLE_ON_HOST = 0.6  # other programs need memory too


@dataclasses.dataclass(frozen=True)
class Need:
    """Bytes on one device: the peak, and the state's and the batch's part of it."""

    peak: float
    arguments: float


def compile_step(training: Training) -> jax.stages.Compiled:
    """Compiles a training's step for shapes, without data or arrays.

    Raises OutOfMemory if the compiler finds that it can't fit.
    """
    config = training.config
    sharding = batch_sharding(training.mesh)
    batch = {
        "image": ((config.batch_size, *training.model.image_size, 3), jnp.uint8),
        "label": ((config.batch_size,), jnp.int32),
    }
    shapes = {k: jax.ShapeDtypeStruct(*v, sharding=sharding) for k, v in batch.items()}
    with use_mesh(training.mesh):
        return compile_for(training.lower(training.placed_shapes, shapes))


def compile_init(training: Training) -> jax.stages.Compiled:
    """Compiles the program that creates a random state, as `compile_step` does."""
    key = jax.eval_shape(jax.random.key, 0)
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=replicated(training.mesh))
    with use_mesh(training.mesh):
        return compile_for(fresh_state(training).lower(key))


def device_memory() -> float:
    """Bytes that a step may use on this process's first device."""
    device = jax.local_devices()[0]
    if limit := (device.memory_stats() or {}).get("bytes_limit"):
        return USABLE * limit
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return USABLE_ON_HOST * pages / jax.local_device_count()


def fit_memory(training: Training, capacity: float) -> tuple[int, str, str]:
    """Returns (microbatches, remat, message) with which a step fits `capacity` bytes per device.

    Tries microbatches first, since they cost the least time. Their number is estimated
    proportionally, then compiled. Raises ValueError, with all that was tried, if nothing fits.
    """
    config, tried = training.config, []
    for remat in further_remat(config.model.remat, config.model.scan):
        accumulation = config.accumulation
        while accumulation:
            fitted = dataclasses.replace(
                config,
                accumulation=accumulation,
                model=dataclasses.replace(config.model, remat=remat),
            )
            need = _measure(training, fitted)
            found = (
                f"a step takes {need.peak / GIB:.2f} of {capacity / GIB:.2f} GiB in "
                f"{accumulation} microbatch(es), remat {remat}"
            )
            if need.peak <= capacity:
                return accumulation, remat, found
            tried.append(f"  {found}")
            accumulation = _next_accumulation(training, fitted, need, capacity)
    raise InputError(
        "a training step doesn't fit into the device's memory in any way that was tried:\n"
        + "\n".join(tried)
        + "\nTake a smaller model or image size, a smaller batch_size, or more devices (mesh.fsdp)"
    )


def _measure(training: Training, config: TrainConfig) -> Need:
    """Returns the need of the stage with the highest peak."""
    as_long = dataclasses.replace(config, steps=training.scheduled, epochs=None)
    rebuilt = build_training(as_long, training.mesh, training.model.num_classes, num_examples=0)
    needs = [_measure_stage(rebuilt.during(stage)) for stage in rebuilt.stages]
    return max(needs, key=lambda need: need.peak)


def _measure_stage(training: Training) -> Need:
    try:
        account = memory(compile_step(training))
    except OutOfMemory as problem:
        leaves = jax.tree.leaves(training.shapes)
        state = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
        return Need(problem.needed * GIB, min(state, problem.needed * GIB))
    return Need(account.peak, account.arguments)


def _next_accumulation(
    training: Training, config: TrainConfig, need: Need, capacity: float
) -> int | None:
    """Returns the fewest microbatches that may fit, estimated proportionally; None if none do."""
    rows = config.batch_size // batch_parts(training.mesh)
    together = 2 if config.augmentation.mixes else 1
    for accumulation in range(config.accumulation + 1, rows + 1):
        divides = rows % accumulation == 0 and config.batch_size % (accumulation * together) == 0
        activations = (need.peak - need.arguments) * config.accumulation / accumulation
        if divides and need.arguments + activations <= capacity:
            return accumulation
    return None


def return_freed_memory() -> None:
    """Returns memory to the system that compilation freed and glibc keeps: 0.25 GiB for a ViT."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
