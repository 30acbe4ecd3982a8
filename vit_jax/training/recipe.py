"""A recipe as a frozen dataclass, and the training step that it defines on a mesh.

Nothing is computed here: `loop` runs the step, `plan` compiles it for other chips.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from vit_jax.config import InputError, setting, unknown
from vit_jax.data.pipeline import DataConfig
from vit_jax.data.sources import Source
from vit_jax.evaluation.registry import EvaluatorConfig
from vit_jax.losses.classification import LossConfig
from vit_jax.losses.distillation import DistillConfig
from vit_jax.losses.masked_patches import MaskedPatchConfig, predicting
from vit_jax.models.variants import Model, ModelConfig, build_model
from vit_jax.parallel.fsdp import placed_as
from vit_jax.parallel.mesh import (
    MeshConfig,
    batch_parts,
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
from vit_jax.training.stages import Stage, StageConfig, build_stages, check_stages
from vit_jax.training.step import TrainState, make_train_step, start_state
from vit_jax.training.teacher import Teacher, open_teacher
from vit_jax.training.width_rule import WidthFactors, scaled, width_factors
from vit_jax.training.writers import MetricsConfig


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A pretraining recipe.

    Attributes:
      image_size: pixels, the side of a square.
      batch_size: images per step, over all processes.
      steps, epochs: the length of the run; set exactly one of them.
      seed: of the initial parameters, the data's order and dropout.
      masked_patches: options of the loss of that name.
      augmentation: on the device, inside the step; the host's is `data.preprocess`.
      distill: a teacher whose logits the model also learns from.
      stages: parts of the run with fewer tokens: mappings of share, image_size, keep and patch,
        see `stages.StageConfig`.
      ema_decay: decay of a running average of the parameters (Polyak), which is then evaluated.
      ema_warmup: whether the average begins with smaller decays: see `step.make_train_step`.
      skip_spikes: skips an update if the gradients' norm exceeds this many times its running
        median: see `spikes.skip_spikes`. The record `spikes` counts them.
      accumulation: number of microbatches, whose gradients a step averages.
      resume: a checkpoint of another workdir to continue from, with all its state.
      start_over: whether a run whose state can't be used begins again at step 0: see
        `workdir.or_start_over`.
      compilation_cache: where compiled programs are kept: see `workdir.compiled_kept`.
      metrics: where metrics are written.
      profile_steps: "100:105" writes an XProf trace of steps 100 to 105.
      log_every, eval_every: steps; without `eval_every` the run is evaluated only at its end.
      log_norms_every: steps after which each layer's norms are recorded: see `norms.layer_norms`.
        A second program of the step computes them, so that other steps take no longer.
      evaluators: name -> evaluator, of any protocol of `evaluation.registry`.
      early_stopping: ends the run after this many evaluations without a better accuracy, or a
        better value of `watch`.
      watch: the evaluator that early stopping watches, "dev", or one of its metrics,
        "dev/macro_f1"; optional if there is only one evaluator.
      stop: a step to end at, before the schedule does; 0 saves the initial state.
      hang_minutes: ends the process if a step, a batch, a save, an evaluation's batch or a
        compilation takes longer than this: see `watchdog.Watchdog`; "none" disables it.
    """

    model: ModelConfig
    data: DataConfig
    image_size: int
    batch_size: int
    schedule: ScheduleConfig
    steps: int | None = None
    epochs: float | None = None
    seed: int = 0
    loss: LossConfig = LossConfig()
    masked_patches: MaskedPatchConfig = MaskedPatchConfig()
    augmentation: AugmentationConfig = AugmentationConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    distill: DistillConfig = DistillConfig()
    stages: tuple[StageConfig, ...] = ()
    ema_decay: float | None = None
    ema_warmup: bool = False
    skip_spikes: float | None = None
    accumulation: int = setting(1, changes="speed")
    resume: str = ""
    start_over: bool = setting(False, changes="speed")
    mesh: MeshConfig = setting(MeshConfig(), changes="speed")
    checkpoint: CheckpointConfig = setting(CheckpointConfig(), changes="speed")
    compilation_cache: str = setting("workdir", changes="speed")
    profile_steps: str = setting("", changes="speed")
    metrics: MetricsConfig = setting(MetricsConfig(), changes="speed")
    log_every: int = setting(50, changes="speed")
    log_norms_every: int | None = setting(None, changes="records")
    eval_every: int | None = setting(None, changes="records")
    early_stopping: int | None = None
    watch: str = ""
    stop: int | None = None
    # An hour is longer than a large model's compilation or a save to slow storage.
    hang_minutes: float | None = setting(60.0, changes="speed")
    evaluators: dict[str, EvaluatorConfig] = setting(factory=dict, changes="records")

    @classmethod
    def upgrade(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Accepts the groups `classification` and `fewshot`, which `evaluators` replaced.

        Early stopping watched the first evaluator of `classification`. A run on the dataset
        `synthetic` is also evaluated on it, so that it needs no data on disk.
        """
        for name in ("evaluators", "classification", "fewshot", "data"):
            if not isinstance(values.get(name, {}), Mapping):
                raise InputError(f"config.{name} = {values[name]!r}: expected a group of fields")
        evaluators = dict(values.get("evaluators", {}))
        for protocol in ("classification", "fewshot"):
            for name, fields in values.get(protocol, {}).items():
                evaluators[name] = {"protocol": protocol, **fields}
        dataset = str(values.get("data", {}).get("dataset", ""))
        if dataset.partition("/")[0] == "synthetic":
            for name, fields in evaluators.items():
                if isinstance(fields, Mapping) and fields.get("data", {}).get("dataset"):
                    data = {**fields["data"], "dataset": dataset}
                    evaluators[name] = {**fields, "data": data}
        kept = {k: v for k, v in values.items() if k not in ("classification", "fewshot")}
        if kept.get("early_stopping") and "watch" not in kept and values.get("classification"):
            kept["watch"] = next(iter(values["classification"]))
        return {**kept, "evaluators": evaluators}

    def weighed(self, source: Source) -> "TrainConfig":
        """Returns the recipe with the training data's class weights, if it weighs classes."""
        if not self.loss.class_weights:
            return self
        names = source.class_names or tuple(map(str, range(source.num_classes)))
        counts = source.class_counts() if self.loss.class_weights == "balanced" else ()
        return dataclasses.replace(self, loss=self.loss.weigh(names, counts))

    @property
    def objective(self) -> LossConfig | MaskedPatchConfig:
        """The config of the loss that the model is trained with."""
        return self.masked_patches if self.loss.masks_patches else self.loss

    @property
    def watched(self) -> str:
        """The metric that early stopping watches, such as "validation/accuracy"; "" without it.

        Raises ValueError if the recipe doesn't name the evaluator and has several, or none.
        """
        if not self.early_stopping:
            return ""
        if not self.watch and len(self.evaluators) != 1:
            raise InputError(
                "early_stopping needs an evaluator to watch: set watch to one of "
                f"{', '.join(self.evaluators) or 'the evaluators (there are none)'}"
            )
        evaluator, _, metric = self.watch.partition("/")
        if evaluator and evaluator not in self.evaluators:
            raise unknown("evaluator to watch", evaluator, self.evaluators)
        name = self.watch or next(iter(self.evaluators))
        return name if metric else f"{name}/accuracy"

    def __post_init__(self):
        if (self.steps is None) == (self.epochs is None):
            raise InputError(
                f"steps = {self.steps} and epochs = {self.epochs}: set exactly one of them"
            )
        at_least_1 = ("accumulation", "log_every", "log_norms_every", "eval_every", "steps")
        least = dict.fromkeys((*at_least_1, "image_size", "early_stopping"), 1) | {"stop": 0}
        for name, smallest in least.items():
            if getattr(self, name) is not None and getattr(self, name) < smallest:
                raise InputError(f"{name} = {getattr(self, name)}: expected at least {smallest}")
        if not 0 <= self.seed < 2**32:  # jax.random.key takes the lower 32 bits
            raise InputError(f"seed = {self.seed}: expected 0 to {2**32 - 1}")
        if self.hang_minutes is not None and self.hang_minutes <= 0:
            raise InputError(
                f"hang_minutes = {self.hang_minutes}: expected a positive number, or none"
            )
        if self.epochs is not None and self.epochs <= 0:
            raise InputError(f"epochs = {self.epochs}: expected more than 0")
        if self.early_stopping and not self.eval_every:
            raise InputError("early_stopping counts evaluations: set eval_every, too")
        if self.skip_spikes is not None and self.skip_spikes <= 1:
            raise InputError(f"skip_spikes = {self.skip_spikes}: expected more than 1, such as 5")
        if self.ema_decay is not None and not 0.0 < self.ema_decay < 1.0:
            raise InputError(f"ema_decay = {self.ema_decay}: expected a number in (0, 1)")
        if self.ema_warmup and self.ema_decay is None:
            raise InputError("ema_warmup changes a running average: set ema_decay, too")
        check_stages(self.stages)
        if self.distill.teacher and self.loss.masks_patches:
            raise InputError("distill: masked_patches has no logits to learn from a teacher")
        if self.stages and self.loss.masks_patches:
            raise InputError("masked_patches predicts patches of one size: leave stages empty")
        if self.augmentation.mixes and self.loss.masks_patches:
            raise InputError("mixup and cutmix mix labels, masked_patches has none: set them to 0")
        if self.augmentation.mixes and self.batch_size % (2 * self.accumulation):
            raise InputError(
                f"batch_size = {self.batch_size} in {self.accumulation} microbatch(es): mixup and "
                "cutmix need an even number of rows in each"
            )
        parse_window(self.profile_steps)


@dataclasses.dataclass(frozen=True)
class Training:
    """A recipe's training step on a mesh and its parts, with nothing computed yet."""

    config: TrainConfig
    mesh: Mesh
    model: Model
    steps: int
    scheduled: int  # the steps that the schedule is made for: `steps`, unless it is to stop before
    width: WidthFactors | None  # of the optimizer's width rule
    stages: tuple[Stage, ...]  # of the scheduled steps; one without a token schedule
    optimizer: optax.GradientTransformation
    teacher: Teacher | None
    shapes: TrainState  # of shapes
    shardings: TrainState  # of shardings

    @property
    def advice(self) -> list[str]:
        """Warnings about the recipe, to show before it runs."""
        config = self.config
        averaged = 1 / (1 - config.ema_decay) if config.ema_decay else 0
        if config.ema_warmup or averaged <= self.steps:
            return []
        return [
            f"ema_decay = {config.ema_decay} averages over {averaged:,.0f} steps, the run has "
            f"{self.steps:,}: the average, which is evaluated, stays near the initial parameters. "
            "Set ema_warmup=True, or a smaller ema_decay"
        ]

    def during(self, stage: Stage) -> "Training":
        """Returns the training of one stage; its `steps` is the stage's length."""
        steps = max(0, min(stage.stop, self.steps) - stage.start)
        return dataclasses.replace(self, model=stage.model, steps=steps, stages=(stage,))

    def flops(self, start: int, stop: int) -> int:
        """Model FLOPs of the updates start, ..., stop - 1, and of the teacher's forward passes."""
        taught = (stop - start) * self.teacher.flops if self.teacher else 0
        student = sum(stage.flops(start, stop) for stage in self.stages)
        return self.config.batch_size * (student + taught)

    @property
    def placed_shapes(self) -> TrainState:
        """The state as `jax.ShapeDtypeStruct`s with shardings."""
        return jax.tree.map(
            lambda shape, at: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=at),
            self.shapes,
            self.shardings,
        )

    def init(self, key: jax.Array) -> dict:
        """Initial parameters: the model's, scaled by the width rule."""
        params = self.model.init(key)
        return params if self.width is None else scaled(params, self.width.initial)

    def step(
        self,
        state: TrainState,
        batch: dict,
        peak: jax.Array,
        taught_by: dict | None = None,
        observe: Callable[[Any, Any, Any], dict] | None = None,
    ) -> tuple[TrainState, dict]:
        """Computes the training step at a peak learning rate: see `step.make_train_step`.

        `peak` is an argument, so that runs that differ only in it share a program. `taught_by` are
        the teacher's parameters, if there is one.
        """
        config, teacher = self.config, self.teacher
        multipliers = match_rules(config.optimizer.lr_multipliers, self.shapes.params)
        schedule = make_schedule(config.schedule, self.scheduled, peak)
        train_step = make_train_step(
            self.model,
            make_optimizer(
                config.optimizer, schedule, peak, state.params, config.skip_spikes, self.width
            ),
            schedule,
            config.loss,
            augmentation=config.augmentation,
            masked=config.masked_patches,
            seed=config.seed,
            trainable=jax.tree.map(bool, multipliers),
            accumulation=config.accumulation,
            ema_decay=config.ema_decay,
            ema_warmup=config.ema_warmup,
            distill=config.distill,
            teacher=teacher and partial(teacher.logits, taught_by),
            observe=observe,
        )
        with placed_as(self.placed_shapes.params):
            return train_step(state, batch)

    def lower(
        self,
        state: TrainState,
        batch: dict,
        observe: Callable[[Any, Any, Any], dict] | None = None,
    ) -> jax.stages.Lowered:
        """Lowers the step for arrays, or shapes with shardings, like these; it donates `state`.

        The step's third argument is the peak learning rate, float32 []. With a teacher, the fourth
        is the teacher's parameters.
        """
        teacher = self.teacher

        def step(
            state: TrainState, batch: dict, peak: jax.Array, taught_by: dict | None = None
        ) -> tuple[TrainState, dict]:
            return self.step(state, batch, peak, taught_by, observe)

        out = (self.shardings, replicated(self.mesh))
        rest = [jax.ShapeDtypeStruct((), jnp.float32), *([teacher.shapes] if teacher else [])]
        return jax.jit(step, donate_argnums=0, out_shardings=out).lower(state, batch, *rest)


def build_training(
    config: TrainConfig, mesh: Mesh, num_classes: int, num_examples: int
) -> Training:
    """Builds the training of `config` on `mesh` for data of this size; ValueError if it can't.

    On fewer devices than `config.mesh.devices` it accumulates more.
    """
    config = dataclasses.replace(config, accumulation=_microbatches(config, mesh))
    check_batch_size(config.batch_size, mesh, config.accumulation)
    size = (config.image_size, config.image_size)
    if config.loss.masks_patches:
        model = build_model(config.model, 0, size)
        model = build_model(predicting(config.masked_patches, model), 0, size)
    else:
        model = build_model(config.model, num_classes, size)
    scheduled = config.steps or math.ceil(config.epochs * num_examples / config.batch_size)
    if scheduled >= 2**31:  # the state counts them in 32 bits
        raise InputError(f"{scheduled} steps: expected fewer than {2**31}")
    schedule = make_schedule(config.schedule, scheduled)
    params = jax.eval_shape(model.init, jax.random.key(config.seed))
    width, how = None, config.optimizer
    if how.width_rule:
        base = how.base_width, how.base_heads
        width = width_factors(how.name, *base, model, how.muon_kernels)
    optimizer = make_optimizer(
        config.optimizer, schedule, config.schedule.peak, params, config.skip_spikes, width
    )
    use_ema = config.ema_decay is not None
    shapes = jax.eval_shape(partial(start_state, optimizer=optimizer, use_ema=use_ema), params)
    shardings = state_shardings(mesh, config.mesh, shapes)
    check_tensor_axis(mesh, shardings)
    return Training(
        config=config,
        mesh=mesh,
        model=model,
        steps=scheduled if config.stop is None else min(config.stop, scheduled),
        scheduled=scheduled,
        width=width,
        optimizer=optimizer,
        stages=build_stages(config.stages, model, scheduled),
        teacher=open_teacher(config.distill, model, mesh, config.mesh),
        shapes=shapes,
        shardings=shardings,
    )


def _microbatches(config: TrainConfig, mesh: Mesh) -> int:
    """The accumulation on `mesh`, with no more rows a device than on `config.mesh.devices`."""
    devices, parts = config.mesh.devices or 0, batch_parts(mesh)
    if mesh.size < devices:
        most = config.batch_size * mesh.shape["tensor"] / devices / config.accumulation
        for microbatches in range(config.accumulation, config.batch_size // parts + 1):
            unit = math.lcm(parts * microbatches, 2 * microbatches * config.augmentation.mixes or 1)
            if config.batch_size % unit == 0 and config.batch_size / (parts * microbatches) <= most:
                return microbatches
    return config.accumulation
