"""A recipe as a frozen dataclass, and the training step that it means on a mesh.

Nothing here is computed: `loop` runs it, `plan` compiles it for chips that one doesn't have.
"""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from vit_jax.data.pipeline import DataConfig
from vit_jax.evaluation.protocols.classification import ClassificationConfig
from vit_jax.evaluation.protocols.fewshot import FewshotConfig
from vit_jax.losses.classification import LossConfig
from vit_jax.losses.masked_patches import MaskedPatchConfig, predicting
from vit_jax.models.variants import Model, ModelConfig, build_model
from vit_jax.parallel.mesh import (
    MeshConfig,
    check_batch_size,
    check_tensor_axis,
    replicated,
    state_shardings,
)
from vit_jax.training.augmentation import AugmentationConfig
from vit_jax.training.checkpoint import CheckpointConfig
from vit_jax.training.optimizer import (
    OptimizerConfig,
    ScheduleConfig,
    make_optimizer,
    make_schedule,
    match_rules,
)
from vit_jax.training.profile import parse_window
from vit_jax.training.step import TrainState, make_train_step, start_state


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A recipe. Exactly one of `steps` and `epochs` says how long."""

    model: ModelConfig
    data: DataConfig
    image_size: int  # pixels, of a square
    batch_size: int  # of all processes
    schedule: ScheduleConfig
    steps: int | None = None
    epochs: float | None = None
    seed: int = 0  # of the initial parameters, the data's order and dropout
    loss: LossConfig = LossConfig()
    masked_patches: MaskedPatchConfig = MaskedPatchConfig()  # of the loss of that name
    augmentation: AugmentationConfig = AugmentationConfig()  # on the device; data's is the host's
    optimizer: OptimizerConfig = OptimizerConfig()
    ema_decay: float | None = None  # of a running average of the parameters (Polyak), evaluated
    accumulation: int = 1  # microbatches of which a step takes the mean gradient
    resume: str = ""  # a checkpoint to go on from, with all its state, in a workdir of its own
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    compilation_cache: str = "workdir"  # or a folder to share; "": none, see `compiled_kept`
    profile_steps: str = ""  # "100:105": an XProf trace of steps 100 to 105
    log_every: int = 50
    eval_every: int | None = None  # steps; None: at the end alone
    early_stopping: int | None = None  # evaluations in a row without a better accuracy; then ends
    stop: int | None = None  # a step to end at, before the schedule does
    classification: dict[str, ClassificationConfig] = dataclasses.field(default_factory=dict)
    fewshot: dict[str, FewshotConfig] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(
                f"steps = {self.steps} and epochs = {self.epochs}: set exactly one of them"
            )
        at_least_1 = ("accumulation", "log_every", "eval_every", "steps", "image_size")
        for name in (*at_least_1, "early_stopping", "stop"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: expected at least 1")
        if self.early_stopping and not self.eval_every:
            raise ValueError("early_stopping counts evaluations: set eval_every, too")
        if self.ema_decay is not None and not 0.0 < self.ema_decay < 1.0:
            raise ValueError(f"ema_decay = {self.ema_decay}: expected a number in (0, 1)")
        if self.augmentation.mixes and self.loss.masks_patches:
            raise ValueError("mixup and cutmix mix labels, masked_patches has none: set them to 0")
        if self.augmentation.mixes and self.batch_size % (2 * self.accumulation):
            raise ValueError(
                f"batch_size = {self.batch_size} in {self.accumulation} microbatch(es): mixup and "
                "cutmix need an even number of rows in each"
            )
        parse_window(self.profile_steps)


@dataclasses.dataclass(frozen=True)
class Training:
    """A recipe's training step on a mesh and all it is made of, with nothing computed yet."""

    config: TrainConfig
    mesh: Mesh
    model: Model
    steps: int
    scheduled: int  # the steps that the schedule is made for: `steps`, unless it is to stop before
    optimizer: optax.GradientTransformation
    shapes: TrainState  # of shapes
    shardings: TrainState  # of shardings

    @property
    def placed_shapes(self) -> TrainState:
        """The state as `jax.ShapeDtypeStruct`s with shardings."""
        return jax.tree.map(
            lambda shape, at: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=at),
            self.shapes,
            self.shardings,
        )

    def lower(self, state: TrainState, batch: dict) -> jax.stages.Lowered:
        """The step for arrays, or shapes with shardings, like these; `state` is donated.

        Its third argument is the peak of the learning rate, float32 [].
        """
        config = self.config
        multipliers = match_rules(config.optimizer.lr_multipliers, self.shapes.params)

        def step(state: TrainState, batch: dict, peak: jax.Array) -> tuple[TrainState, dict]:
            # An argument, so that runs that differ in it alone have the same program.
            schedule = make_schedule(config.schedule, self.scheduled, peak)
            train_step = make_train_step(
                self.model,
                make_optimizer(config.optimizer, schedule, peak, state.params),
                schedule,
                config.loss,
                augmentation=config.augmentation,
                masked=config.masked_patches,
                seed=config.seed,
                trainable=jax.tree.map(bool, multipliers),
                accumulation=config.accumulation,
                ema_decay=config.ema_decay,
            )
            return train_step(state, batch)

        out = (self.shardings, replicated(self.mesh))
        peak = jax.ShapeDtypeStruct((), jnp.float32)
        return jax.jit(step, donate_argnums=0, out_shardings=out).lower(state, batch, peak)


def build_training(
    config: TrainConfig, mesh: Mesh, num_classes: int, num_examples: int
) -> Training:
    """What `config` trains on `mesh`, given the size of its data; ValueError for what can't be."""
    check_batch_size(config.batch_size, mesh, config.accumulation)
    size = (config.image_size, config.image_size)
    if config.loss.masks_patches:
        model = build_model(config.model, 0, size)
        model = build_model(predicting(config.masked_patches, model), 0, size)
    else:
        model = build_model(config.model, num_classes, size)
    scheduled = config.steps or math.ceil(config.epochs * num_examples / config.batch_size)
    schedule = make_schedule(config.schedule, scheduled)
    params = jax.eval_shape(model.init, jax.random.key(config.seed))
    optimizer = make_optimizer(config.optimizer, schedule, config.schedule.peak, params)
    use_ema = config.ema_decay is not None
    shapes = jax.eval_shape(partial(start_state, optimizer=optimizer, use_ema=use_ema), params)
    shardings = state_shardings(mesh, config.mesh, shapes)
    check_tensor_axis(mesh, shardings)
    return Training(
        config=config,
        mesh=mesh,
        model=model,
        steps=min(config.stop or scheduled, scheduled),
        scheduled=scheduled,
        optimizer=optimizer,
        shapes=shapes,
        shardings=shardings,
    )
