"""Repeats steps of a run and examines the last one; `vit_jax.replay` is the command."""

import dataclasses
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.data.pipeline import train_batches
from vit_jax.data.sources import Source
from vit_jax.parallel.mesh import local_rows, put_batch
from vit_jax.training.norms import layer_norms
from vit_jax.training.origins import Examination, Origin
from vit_jax.training.recipe import Training
from vit_jax.training.stages import Stage
from vit_jax.training.step import TrainState, make_losses, with_draws


@dataclasses.dataclass(frozen=True)
class Step:
    """A repeated step: its number, the state before it, its batch and its metrics."""

    number: int
    state: TrainState
    batch: dict
    values: dict[str, float]

    @property
    def is_finite(self) -> bool:
        return all(map(math.isfinite, self.values.values()))


def take_steps(training: Training, source: Source, state: TrainState, last: int) -> Iterator[Step]:
    """Yields the steps from `state` to `last`; ends at the first that isn't finite."""
    config, start = training.config, int(state.step)
    local = train_batches(
        source,
        config.data,
        batch_size=config.batch_size,
        image_size={stage.start: stage.model.image_size for stage in training.stages},
        seed=config.seed,
        start_step=start,
        rows=local_rows(training.mesh, config.batch_size),
    )
    programs = {
        stage: jax.jit(partial(training.during(stage).step, observe=layer_norms))
        for stage in training.stages
    }
    try:
        for number in range(start + 1, last + 1):
            batch = put_batch(training.mesh, next(local))
            take = programs[_stage_of(training, number)]
            after, values = take(state, batch, *_rest(training))
            values = {name: float(value) for name, value in jax.device_get(values).items()}
            step = Step(number, state, batch, values)
            yield step
            if not step.is_finite:
                return
            state = after
    finally:
        local.close()


def _stage_of(training: Training, number: int) -> Stage:
    """Returns the stage of step `number`, counted from 1."""
    return next(stage for stage in training.stages if number <= stage.stop)


def _rest(training: Training) -> list[Any]:
    """Returns a step's further arguments: the peak learning rate, a teacher's parameters."""
    teacher = [training.teacher.place()] if training.teacher else []
    return [jnp.float32(training.config.schedule.peak), *teacher]


def examine(training: Training, step: Step) -> tuple[Origin | None, dict]:
    """Returns the origin of the step's first value that isn't finite, and layers' activations."""
    during = training.during(_stage_of(training, step.number))
    given, examination = (step.state, step.batch, *_rest(training)), Examination()
    outputs = examination.run(jax.make_jaxpr(during.step)(*given), examination.arguments(given))
    origins = [value.origin for value in outputs if value.origin]
    first = min(origins, key=lambda origin: origin.order, default=None)
    return first, examination.activations


def batch_losses(training: Training, step: Step, microbatch: int) -> np.ndarray:
    """Returns each example's loss, float32 [B], without a teacher's part."""
    config, model = training.config, _stage_of(training, step.number).model
    losses = make_losses(model, config.loss, config.masked_patches)
    batch, keys = with_draws(config.augmentation, config.seed, step.state.step, step.batch)
    compute, size = jax.jit(lambda *given: losses(*given)[0]), 2 * -(-microbatch // 2)
    parts = [
        compute(step.state.params, *jax.tree.map(lambda x, a=a: x[a : a + size], (batch, keys)))
        for a in range(0, config.batch_size, size)
    ]
    return np.concatenate(parts)
