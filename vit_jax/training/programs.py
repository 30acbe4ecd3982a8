"""The compiled steps of a run: one for each stage, and one that also computes layers' norms."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import numpy as np

from vit_jax.parallel.mesh import put_tree, replicated, use_mesh
from vit_jax.training.clock import Clock
from vit_jax.training.memory import return_freed_memory
from vit_jax.training.norms import layer_norms
from vit_jax.training.recipe import Training
from vit_jax.training.stages import Stage


class Programs:
    """The compiled step of each stage. While one runs, a thread compiles the next.

    With `log_norms_every` there is another for the steps whose norms are recorded.
    """

    def __init__(self, training: Training, batch: dict, step: int, clock: Clock):
        """Compiles the program of update number `step`, from 0, for batches like `batch`."""
        self._training, self._clock = training, clock
        self._batch = {
            k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for k, x in batch.items()
        }
        peak = np.float32(training.config.schedule.peak)
        teacher = [training.teacher.place()] if training.teacher else []
        self._rest = [put_tree(peak, replicated(training.mesh)), *teacher]
        end = max(step + 1, training.steps)
        self._stages = [s for s in training.stages if step < s.stop and s.start < end]
        self._pool = ThreadPoolExecutor(1)
        self._stage: Stage | None = None
        self._next: Future[Callable] | None = None
        self._observing: Future[Callable] | None = None
        self.at(step)

    def at(self, step: int) -> Callable:
        """Returns the program of update number `step`; ask for them in ascending order.

        Waiting for it counts as compilation. It raises for inputs of other shapes than the stage's
        and never recompiles.
        """
        if self._stage is None or step >= self._stage.stop:
            self._stage = self._stages.pop(0)
            with self._clock.within("compile"):
                self._program = self._next.result() if self._next else self._compile(self._stage)
            every, stop = self._training.config.log_norms_every, self._stage.stop
            if every and min(stop, self._training.steps) // every > step // every:
                self._observing = self._pool.submit(self._compile, self._stage, layer_norms)
            self._next = self._pool.submit(self._compile, self._stages[0]) if self._stages else None
        if self._observing and (step + 1) % self._training.config.log_norms_every == 0:
            with self._clock.within("compile"):
                return self._observing.result()
        return self._program

    def _compile(self, stage: Stage, observe: Callable | None = None) -> Callable:
        training, image = self._training, self._batch["image"]
        shape = (image.shape[0], *stage.model.image_size, image.shape[-1])
        image = jax.ShapeDtypeStruct(shape, image.dtype, sharding=image.sharding)
        with use_mesh(training.mesh):  # this may be another thread
            lowered = training.during(stage).lower(
                training.placed_shapes, {**self._batch, "image": image}, observe
            )
            step = lowered.compile()
        return_freed_memory()
        return lambda state, batch: step(state, batch, *self._rest)

    def __enter__(self) -> "Programs":
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
