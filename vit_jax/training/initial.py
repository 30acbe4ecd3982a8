"""The state that a run begins with: random, loaded or restored, and born where it belongs."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import jax
import numpy as np

from vit_jax.parallel.mesh import put_tree
from vit_jax.training.checkpoint import restore, restore_newest
from vit_jax.training.recipe import Training
from vit_jax.training.step import TrainState, init_state, start_state

if TYPE_CHECKING:
    from vit_jax.training.loop import Run


def fresh_state(training: Training) -> Callable[[jax.Array], TrainState]:
    """A PRNG key -> the state of a random start, born sharded, as a jitted function.

    No device, and no host, ever holds more than its part, and a layer.
    """
    use_ema = training.config.ema_decay is not None
    init = partial(init_state, training.model, training.optimizer, use_ema=use_ema)
    return jax.jit(init, out_shardings=training.shardings)


def first_state(run: "Run") -> tuple[TrainState, list[str]]:
    """The state to begin with, and what there is to say about it."""
    if run.resumes:
        as_placed = jax.tree.map(
            lambda shape, sharding: jax.ShapeDtypeStruct(
                shape.shape, shape.dtype, sharding=sharding
            ),
            run.shapes,
            run.shardings,
        )
        if run.resumes == run.workdir:
            return restore_newest(run.workdir, as_placed)
        return restore(run.resumes, as_placed), []
    use_ema = run.config.ema_decay is not None
    key = jax.random.key(run.config.seed)
    if run.loaded is None:
        return fresh_state(run)(key), []
    fresh = jax.jit(run.model.init, out_shardings=run.shardings.params)(key)
    params = jax.tree.map(
        lambda loaded, new, sharding: (
            put_tree(loaded, sharding) if isinstance(loaded, np.ndarray) else new
        ),
        run.loaded,
        fresh,
        run.shardings.params,
    )
    born = jax.jit(
        partial(start_state, optimizer=run.optimizer, use_ema=use_ema),
        out_shardings=run.shardings,
    )
    return born(params), []
