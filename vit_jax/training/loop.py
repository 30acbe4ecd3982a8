"""Restore -> step -> log -> evaluate -> checkpoint: the loop of both pretraining and transfer.

`prepare` finds what is wrong before anything is compiled; `train` then runs. The order at a step's
end is: records flushed, evaluation, checkpoint. So everything up to a checkpoint's step has been
recorded when it exists, and a run restarted from it repeats nothing and loses nothing.
"""

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from itertools import chain
from pathlib import Path

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from vit_jax.analysis.chips import num_chips
from vit_jax.analysis.flops import training_flops
from vit_jax.data.pipeline import DataConfig, open_data, train_batches
from vit_jax.data.sources import Source
from vit_jax.evaluation.classification import ClassificationConfig, make_classification
from vit_jax.evaluation.fewshot import FewshotConfig, make_fewshot
from vit_jax.evaluation.masked import make_masked
from vit_jax.models.variants import Model, ModelConfig, build_model
from vit_jax.parallel.mesh import (
    MeshConfig,
    check_batch_size,
    check_tensor_axis,
    local_rows,
    make_mesh,
    put_batch,
    replicated,
    state_shardings,
    use_mesh,
)
from vit_jax.parallel.multihost import (
    PREEMPTED,
    Preemption,
    all_agree,
    check_agreement,
    check_shared,
)
from vit_jax.training.augmentation import AugmentationConfig
from vit_jax.training.checkpoint import (
    CheckpointConfig,
    Checkpoints,
    find_checkpoint,
)
from vit_jax.training.clock import Clock, Starts
from vit_jax.training.initial import first_state
from vit_jax.training.masked import MaskedPatchConfig, predicting
from vit_jax.training.metrics import Metrics, Recorder
from vit_jax.training.optimizer import (
    OptimizerConfig,
    Schedule,
    ScheduleConfig,
    make_optimizer,
    make_schedule,
    match_rules,
)
from vit_jax.training.profile import Profile, parse_window
from vit_jax.training.step import LossConfig, TrainState, make_train_step, start_state
from vit_jax.training.workdir import compiled_kept, keep_config, open_workdir

# A restart may set these otherwise: they change a run's speed or what is seen of it, nothing else.
MAY_CHANGE = (
    "accumulation",
    "checkpoint",
    "classification",
    "compilation_cache",
    "data.cache_gib",
    "data.data_dir",
    "data.num_threads",
    "data.num_workers",
    "data.prefetch",
    "data.skip_broken",
    "eval_every",
    "fewshot",
    "log_every",
    "mesh",
    "model.attention",
    "model.remat",
    "profile_steps",
)


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
    classification: dict[str, ClassificationConfig] = dataclasses.field(default_factory=dict)
    fewshot: dict[str, FewshotConfig] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(
                f"steps = {self.steps} and epochs = {self.epochs}: set exactly one of them"
            )
        for name in ("accumulation", "log_every", "eval_every", "steps", "image_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: expected at least 1")
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
    schedule: Schedule
    optimizer: optax.GradientTransformation
    shapes: TrainState  # of shapes
    shardings: TrainState  # of shardings

    def lower(self, state: TrainState, batch: dict) -> jax.stages.Lowered:
        """The step for arrays, or shapes with shardings, like these; `state` is donated."""
        config = self.config
        multipliers = match_rules(config.optimizer.lr_multipliers, self.shapes.params)
        step = make_train_step(
            self.model,
            self.optimizer,
            self.schedule,
            config.loss,
            augmentation=config.augmentation,
            masked=config.masked_patches,
            seed=config.seed,
            trainable=jax.tree.map(bool, multipliers),
            accumulation=config.accumulation,
            ema_decay=config.ema_decay,
        )
        out = (self.shardings, replicated(self.mesh))
        return jax.jit(step, donate_argnums=0, out_shardings=out).lower(state, batch)


@dataclasses.dataclass(frozen=True)
class Run(Training):
    """Everything a run is made of, checked, with nothing computed yet."""

    workdir: Path
    source: Source
    evaluators: dict[str, Callable[[dict], dict[str, float]]]
    batches: Callable[[int], Iterator[dict[str, np.ndarray]]]  # this process's, from a step on
    loaded: dict | None  # parameters to start from: numpy arrays, shapes where fresh ones belong
    clock: Clock
    resumes: Path | None  # the checkpoint to go on from: this workdir's folder, or another's step


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
    steps = config.steps or math.ceil(config.epochs * num_examples / config.batch_size)
    schedule = make_schedule(config.schedule, steps)
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
        steps=steps,
        schedule=schedule,
        optimizer=optimizer,
        shapes=shapes,
        shardings=shardings,
    )


def prepare(
    config: TrainConfig,
    workdir: str,
    load: Callable[[Model, dict], dict] | None = None,
    clock: Clock | None = None,
) -> Run:
    """Builds and checks all parts of a run without compiling anything.

    `load(model, shapes)` gives the parameters to start from, where there are others than random
    ones; shapes stay in its result where fresh values belong. It isn't called on resuming. `clock`
    is one that runs already, if the time before this call counts too.

    Raises ValueError or FileNotFoundError for whatever doesn't fit, saying what to do.
    """
    clock = clock or Clock()
    mesh = make_mesh(config.mesh)
    data = config.data
    source = open_data(data)
    training = build_training(config, mesh, source.num_classes, len(source))
    model = training.model
    if config.loss.masks_patches:
        make, objective = make_masked, config.masked_patches
    else:
        make, objective = make_classification, config.loss
    evaluators = {
        **{name: make(c, model, mesh, objective) for name, c in config.classification.items()},
        **{name: make_fewshot(c, model, mesh) for name, c in config.fewshot.items()},
    }

    def batches(start_step: int) -> Iterator[dict[str, np.ndarray]]:
        return train_batches(
            source,
            data,
            batch_size=config.batch_size,
            image_size=model.image_size,
            seed=config.seed,
            start_step=start_step,
            rows=local_rows(mesh, config.batch_size),
        )

    batches(0).close()  # what is wrong with the preprocessing is found now
    values = dataclasses.asdict(config)
    path, step = open_workdir(workdir, values, may_change=MAY_CHANGE)
    check_agreement(
        {
            "config": hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16],
            "dataset": [len(source), source.num_classes],
            "devices here": [jax.local_device_count(), jax.local_devices()[0].device_kind],
            "devices in all": jax.device_count(),
            "jax": jax.__version__,
            "newest checkpoint": step,
        }
    )
    check_shared(path)
    resumes = path if step else find_checkpoint(config.resume) if config.resume else None
    return Run(
        **vars(training),
        workdir=path,
        source=source,
        evaluators=evaluators,
        batches=batches,
        clock=clock,
        loaded=load(model, training.shapes.params) if load and resumes is None else None,
        resumes=resumes,
    )


def train(run: Run) -> dict[str, float]:
    """Runs to the last step, from the newest checkpoint if there is one; returns the last record.

    Raises FloatingPointError when the loss or a parameter is no longer finite; the last checkpoint
    is then from before. Told to end by SIGTERM, it saves and exits with code
    `multihost.PREEMPTED`; started again, it goes on.
    """
    config, clock = run.config, run.clock
    keep_config(run.workdir, dataclasses.asdict(config))
    with ExitStack() as stack:
        enter = stack.enter_context
        enter(clock)
        enter(use_mesh(run.mesh))
        enter(compiled_kept(run.workdir, config.compilation_cache))
        preemption = enter(Preemption())
        with clock.within("restore" if run.resumes else "start"):
            state, notes = first_state(run)
            start = int(state.step)
        if start >= run.steps and run.resumes not in (None, run.workdir):
            raise ValueError(
                f"resume: {run.resumes} is at step {start} and the run has {run.steps} steps: "
                "nothing is left to do, set more"
            )
        metrics = enter(Metrics(run.workdir, run.steps, start))
        for note in notes:
            metrics.say(note)
        if start:
            metrics.say(f"resuming {run.resumes} from step {start} of {run.steps}")
        if start >= run.steps:
            metrics.say(f"{run.workdir} is finished: {run.steps} steps")
            return metrics.last()

        starts = Starts(run.workdir, clock, start, num_chips())
        starts.keep(start)
        checkpoints = enter(Checkpoints(run.workdir, config.checkpoint, metrics.saved))
        with clock.within("input"):
            local_batches = run.batches(start)
            stack.callback(local_batches.close)
            batches = (put_batch(run.mesh, batch) for batch in local_batches)
            first = next(batches)
        with clock.within("compile"):
            step = _compile(run, state, first)
        metrics.say(f"compiled in {clock.seconds['compile']:.1f} s")
        if start and _evaluates(config, start) and not all_agree(metrics.evaluated(start)):
            _evaluate(run, state, start, metrics)  # preempted before it came to that
        recorder = Recorder(
            metrics,
            clock,
            starts,
            start=start,
            log_every=config.log_every,
            batch_size=config.batch_size,
            flops_per_image=training_flops(run.model),
        )
        with recorder, clock.within("train"):
            batches = chain([first], batches)
            end = _take_steps(run, step, state, batches, recorder, checkpoints, preemption)
        with clock.within("save"):
            checkpoints.wait()
        starts.keep(end)
        metrics.say(starts.summary())
        if end < run.steps:
            metrics.say(f"told to end after step {end}: start again to go on from there")
            raise SystemExit(PREEMPTED)
        return metrics.last()


def _take_steps(
    run: Run,
    step: Callable,
    state: TrainState,
    batches: Iterator[dict],
    recorder: Recorder,
    checkpoints: Checkpoints,
    preemption: Preemption,
) -> int:
    """Trains until the last step or preemption; returns that step, whose save is under way."""
    config, metrics = run.config, recorder.metrics
    batch = next(batches)
    with Profile(run.workdir, config.profile_steps, run.clock) as profile:
        for done in range(int(state.step) + 1, run.steps + 1):
            with profile.step(done, state):
                state, values = step(state, batch)
            recorder.add(done, values)  # fetches the step before, while this one runs
            last = done == run.steps
            preempted = preemption.reached(done) and not last
            if not (last or preempted):
                with recorder.waiting():
                    batch = next(batches)
            evaluates = last or (_evaluates(config, done) and not preempted)
            saves = last or preempted or done % config.checkpoint.every == 0
            if evaluates or saves:
                recorder.flush()
            if evaluates:
                _evaluate(run, state, done, metrics)
            checkpoints.poll()
            if saves:
                with run.clock.within("save"):
                    checkpoints.save(state, run.model.description)
            if preempted:
                break
    return done


def _evaluates(config: TrainConfig, step: int) -> bool:
    return bool(config.eval_every) and step % config.eval_every == 0


def _compile(run: Run, state: TrainState, batch: dict) -> Callable:
    """The compiled step; other shapes than these are an error later, never a recompilation."""
    return run.lower(state, batch).compile()


def _evaluate(run: Run, state: TrainState, step: int, metrics: Metrics) -> None:
    with run.clock.within("evaluate"):
        params = state.params if state.ema is None else state.ema
        for name, evaluator in run.evaluators.items():
            start = time.perf_counter()
            values = {f"{name}/{key}": value for key, value in evaluator(params).items()}
            metrics.write(step, {**values, "seconds": time.perf_counter() - start})
            metrics.say(
                f"step {step}  " + "  ".join(f"{key} {value:.4g}" for key, value in values.items())
            )
