"""The initial state of a run: random, loaded or restored, created with its shardings."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import numpy as np

from vit_jax.parallel.mesh import put_tree
from vit_jax.training.checkpoint import restore_newest, restore_other
from vit_jax.training.recipe import Training
from vit_jax.training.step import TrainState, init_state, start_state


def fresh_state(training: Training) -> Callable[[jax.Array], TrainState]:
    """Returns a jitted function from a PRNG key to a random, sharded state.

    Each device holds its shard plus at most one layer.
    """
    use_ema = training.config.ema_decay is not None
    init = partial(init_state, training, training.optimizer, use_ema=use_ema)
    return jax.jit(init, out_shardings=training.shardings)


def loaded_state(training: Training, loaded: dict) -> TrainState:
    """Returns step 0 from loaded parameters: numpy arrays, or shapes for those to initialise."""
    key = jax.random.key(training.config.seed)
    fresh = jax.jit(training.init, out_shardings=training.shardings.params)(key)
    params = jax.tree.map(
        lambda given, new, sharding: (
            put_tree(given, sharding) if isinstance(given, np.ndarray) else new
        ),
        loaded,
        fresh,
        training.shardings.params,
    )
    use_ema = training.config.ema_decay is not None
    start = partial(start_state, optimizer=training.optimizer, use_ema=use_ema)
    return jax.jit(start, out_shardings=training.shardings)(params)


def first_state(
    training: Training, loaded: dict | None, resumes: Path | None, workdir: Path
) -> tuple[TrainState, list[str]]:
    """Returns the initial state and notes about it.

    `resumes` is the workdir itself, to restore its newest whole checkpoint, or the folder of
    another run's checkpoint. Without it the state is `loaded`'s, or random.
    """
    if resumes is None:
        if loaded is not None:
            return loaded_state(training, loaded), []
        return fresh_state(training)(jax.random.key(training.config.seed)), []
    placed = training.placed_shapes
    return restore_newest(workdir, placed) if resumes == workdir else restore_other(resumes, placed)
