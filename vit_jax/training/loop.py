"""Restore -> step -> log -> evaluate -> checkpoint: the loop of both pretraining and transfer.

`prepare` finds what is wrong before anything is compiled; `train` then runs. The order at a step's
end is: records flushed, evaluation, checkpoint. So everything up to a checkpoint's step has been
recorded when it exists, and a run restarted from it repeats nothing and loses nothing.
"""

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from itertools import chain, islice
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vit_jax.config import InputError, build
from vit_jax.costs.chips import num_chips
from vit_jax.data.pipeline import open_data, train_batches
from vit_jax.data.sources import Source
from vit_jax.evaluation.registry import make_evaluator
from vit_jax.models.variants import Model
from vit_jax.parallel.lanes import ALONE, Lane
from vit_jax.parallel.mesh import (
    local_rows,
    make_mesh,
    put_batch,
    use_mesh,
)
from vit_jax.parallel.multihost import all_agree, check_agreement, check_shared
from vit_jax.parallel.preemption import PREEMPTED, Preemption
from vit_jax.parallel.run_files import Lock
from vit_jax.parallel.watchdog import Watchdog, waits_for
from vit_jax.training.checkpoint import Checkpoints, check_newest, check_other
from vit_jax.training.clock import Clock, Starts
from vit_jax.training.early_stopping import has_waited
from vit_jax.training.initial import first_state
from vit_jax.training.metrics import Metrics, Recorder
from vit_jax.training.profile import Profile
from vit_jax.training.programs import Programs
from vit_jax.training.recipe import TrainConfig, Training, build_training
from vit_jax.training.result import Trained
from vit_jax.training.same_data import (
    TRAIN,
    Facts,
    check_same_data,
    describe_data,
    digest,
    keep_data,
)
from vit_jax.training.step import TrainState
from vit_jax.training.workdir import compiled_kept, keep_config, open_workdir, or_start_over
from vit_jax.weights.trained import find_checkpoint, saved_steps


@dataclasses.dataclass(frozen=True)
class Run(Training):
    """Everything a run is made of, checked, with nothing computed yet."""

    workdir: Path
    source: Source
    evaluators: dict[str, Callable[[dict], dict[str, float]]]
    batches: Callable[[int], Iterator[dict[str, np.ndarray]]]  # this process's, from a step on
    description: dict  # of the model, kept in its checkpoints
    loaded: dict | None  # parameters to start from: numpy arrays, shapes where fresh ones belong
    clock: Clock
    lane: Lane
    watched: str  # the metric of early stopping; "" without it
    resumes: Path | None  # the checkpoint to go on from: this workdir's folder, or another's step
    notes: list[str]  # what to say about the recipe and damaged checkpoints
    facts: Facts  # what tells whether the data is the same at the next start
    lock: Lock | None  # on the workdir, as long as the run lives


def pretrain(
    config: Mapping[str, Any] | TrainConfig, workdir: str | os.PathLike, clock: Clock | None = None
) -> Trained:
    """Trains a model from random weights, or continues the run that is in the workdir.

    Args:
      config: a recipe, such as `vit_jax.recipe` returns, or the dataclass.
      workdir: the folder of the run.
      clock: one that runs already, if the time before this call counts too.

    Raises ValueError or FileNotFoundError, before anything is compiled, for a recipe or data that
    don't fit; otherwise as `train`.
    """
    run = prepare(build(TrainConfig, config), os.fspath(workdir), clock=clock)
    return Trained(run.workdir, train(run))


def prepare(
    config: TrainConfig,
    workdir: str,
    load: Callable[[Model, dict], dict] | None = None,
    clock: Clock | None = None,
    description: dict | None = None,
    lane: Lane = ALONE,
) -> Run:
    """Builds and checks all parts of a run without compiling anything.

    `load(model, shapes)` gives the parameters to start from, where there are others than random
    ones; shapes stay in its result where fresh values belong. It isn't called on resuming. `clock`
    is one that runs already, if the time before this call counts too. `description` is what
    checkpoints are to say beside `Model.description` and the classes' names. `lane` is for runs
    that go side by side.

    Raises ValueError or FileNotFoundError for whatever doesn't fit, saying what to do.
    """
    with Watchdog(config.hang_minutes, lane.label):
        waits_for("data, workdir and agreement")
        return _prepare(config, workdir, load, clock or Clock(), description, lane)


def _prepare(
    config: TrainConfig,
    workdir: str,
    load: Callable[[Model, dict], dict] | None,
    clock: Clock,
    description: dict | None,
    lane: Lane,
) -> Run:
    config.metrics.check_packages()
    mesh = make_mesh(config.mesh, lane.devices)
    data = config.data
    source = open_data(data)
    if source.num_classes < 2 and not (source.labels_per_example or config.loss.masks_patches):
        name = "".join(source.class_names or ())
        raise InputError(
            f"{data.dataset or 'the mixture'} has one class, {name!r}: expected two or more"
        )
    if config.loss.class_weights:
        names = source.class_names or tuple(map(str, range(source.num_classes)))
        counts = source.class_counts() if config.loss.class_weights == "balanced" else ()
        config = dataclasses.replace(config, loss=config.loss.weigh(names, counts))
    training = build_training(config, mesh, source.num_classes, len(source))
    model = training.model
    evaluators = {
        name: make_evaluator(evaluator, model, mesh, config.objective)
        for name, evaluator in config.evaluators.items()
    }

    def batches(start_step: int) -> Iterator[dict[str, np.ndarray]]:
        return train_batches(
            source,
            data,
            batch_size=config.batch_size,
            image_size={stage.start: stage.model.image_size for stage in training.stages},
            seed=config.seed,
            start_step=start_step,
            rows=local_rows(mesh, config.batch_size),
        )

    batches(0).close()  # what is wrong with the preprocessing is found now
    values, facts = dataclasses.asdict(config), describe_data(config, source)
    if training.teacher:
        training.teacher.check_classes(source.class_names)
        facts["teacher"] = training.teacher.fingerprint
    path, lock = open_workdir(workdir, config)
    check_agreement(
        {
            "config": hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16],
            "dataset": [len(source), source.num_classes],
            "examples to train on": digest({TRAIN: facts[TRAIN]}),
            "examples to evaluate on": digest(facts),
            "devices here": [jax.local_device_count(), jax.local_devices()[0].device_kind],
            "devices in all": jax.device_count(),
            "jax": jax.__version__,
            "newest checkpoint": max(saved_steps(path), default=0),
        }
    )
    check_shared(path)
    resumes, notes = _where_to_begin(path, training, facts)
    return Run(
        **vars(training),
        workdir=path,
        source=source,
        evaluators=evaluators,
        batches=batches,
        clock=clock,
        lane=lane,
        watched=config.watched,
        description={
            **model.description,
            **({"class_names": list(source.class_names)} if source.class_names else {}),
            **(description or {}),
        },
        loaded=load(model, training.shapes.params) if load and resumes is None else None,
        resumes=resumes,
        notes=[*training.advice, *notes],
        facts=facts,
        lock=lock,
    )


def _where_to_begin(
    workdir: Path, training: Training, facts: Facts
) -> tuple[Path | None, list[str]]:
    """What to resume, as `Run.resumes`, which is checked; and what to say about it."""

    def check() -> list[str]:
        check_same_data(workdir, facts)
        return check_newest(workdir, training.shapes)

    config, notes = training.config, []
    if saved_steps(workdir):
        notes = or_start_over(workdir, config, check)
    if saved_steps(workdir):
        return workdir, notes
    if not config.resume:
        return None, notes
    folder = find_checkpoint(config.resume)
    check_other(folder, training.shapes)
    return folder, notes


def train(run: Run) -> dict[str, float]:
    """Runs to the last step, from the newest checkpoint if there is one; returns the last record.

    Raises FloatingPointError when the loss or a parameter is no longer finite; the last checkpoint
    is then from before. Told to end by SIGTERM, it saves and exits with code
    `multihost.PREEMPTED`; started again, it goes on. After Ctrl-C it saves and raises
    KeyboardInterrupt; the second time at once.
    """
    config, clock = run.config, run.clock
    keep_config(run.workdir, dataclasses.asdict(config))
    keep_data(run.workdir, run.facts)
    with Watchdog(config.hang_minutes, run.lane.label), ExitStack() as stack:
        enter = stack.enter_context
        enter(clock)
        enter(use_mesh(run.mesh))
        enter(compiled_kept(run.workdir, config.compilation_cache))
        preemption = run.lane.preemption or enter(Preemption())
        with clock.within("restore" if run.resumes else "start"):
            state, notes = first_state(run, run.loaded, run.resumes, run.workdir)
            start = int(state.step)
        patience = (run.workdir, run.watched, config.early_stopping)
        if start >= run.steps and run.resumes not in (None, run.workdir):
            raise InputError(
                f"resume: {run.resumes} is at step {start} and the run has {run.steps} steps: "
                "nothing is left to do, set more"
            )
        metrics = enter(
            Metrics(
                *(run.workdir, run.steps, start),
                label=run.lane.label,
                config=config.metrics,
                recipe=dataclasses.asdict(config),
            )
        )
        for note in (*run.notes, *notes):
            metrics.say(note)
        if start:
            metrics.say(f"resuming {run.resumes} from step {start} of {run.steps}")
        if start >= run.steps or (start and has_waited(*patience)):
            return _finish(run, state, metrics)

        starts = Starts(run.workdir, clock, start, num_chips(run.mesh.size))
        starts.keep(start)

        def saved(step: int) -> None:
            starts.saved(step)
            metrics.saved(step)

        checkpoints = enter(Checkpoints(run.workdir, config.checkpoint, saved))
        with clock.within("input"):
            local_batches = run.batches(start)
            stack.callback(local_batches.close)
            batches = (put_batch(run.mesh, batch) for batch in local_batches)
            first = next(batches)
        with clock.within("compile"):
            programs = enter(Programs(run, first, start, clock))
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
            flops=run.flops,
            devices=run.mesh.size,
        )
        with recorder, clock.within("train"):
            batches = chain([first], batches)
            end = _take_steps(
                run, programs, state, batches, recorder, checkpoints, preemption, patience
            )
        with clock.within("save"):
            checkpoints.wait()
        starts.keep(end)
        metrics.say(starts.summary(jax.default_backend() != "cpu"))
        if preemption.interrupted:
            raise KeyboardInterrupt(f"stopped at step {end}; the same command goes on")
        if end < run.steps and not has_waited(*patience):
            metrics.say(f"told to end after step {end}: start again to go on from there")
            raise SystemExit(PREEMPTED)
        return metrics.last()


def _finish(run: Run, state: TrainState, metrics: Metrics) -> dict[str, float]:
    """Ends a run without a step to take; with `stop = 0` its initial state is saved."""
    if run.resumes is None:
        with Checkpoints(run.workdir, run.config.checkpoint, metrics.saved) as checkpoints:
            checkpoints.save(state, run.description)
    metrics.say(f"{run.workdir} is finished: {int(state.step)} steps")
    return metrics.last()


def measure_step(run: Run, steps: int = 4) -> tuple[float, float]:
    """Takes a few steps of each stage, of which nothing is kept.

    Returns the mean seconds of a step of the run, and the seconds of all compilations. Reading and
    preparing the images is included.
    """
    seconds = compilation = 0.0
    with use_mesh(run.mesh), compiled_kept(run.workdir, run.config.compilation_cache):
        state, _ = first_state(run, run.loaded, None, run.workdir)
        for stage in run.stages:
            with closing(run.batches(stage.start)) as local:
                batches = (put_batch(run.mesh, batch) for batch in local)
                batch, began = next(batches), time.perf_counter()
                with Programs(run.during(stage), batch, stage.start, run.clock) as programs:
                    step = programs.at(stage.start)
                compilation += time.perf_counter() - began
                state, _ = jax.block_until_ready(step(state, batch))  # the first is slower
                began = time.perf_counter()
                for batch in islice(batches, steps):
                    state, _ = jax.block_until_ready(step(state, batch))
                share = (stage.stop - stage.start) / run.scheduled
                seconds += share * (time.perf_counter() - began) / steps
    return seconds, compilation


def _take_steps(
    run: Run,
    programs: Programs,
    state: TrainState,
    batches: Iterator[dict],
    recorder: Recorder,
    checkpoints: Checkpoints,
    preemption: Preemption,
    patience: tuple[Path, str, int | None],
) -> int:
    """Trains until the last step or preemption; returns that step, whose save is under way."""
    config, metrics = run.config, recorder.metrics
    batch = next(batches)
    with Profile(run.workdir, config.profile_steps, run.clock) as profile:
        for done in range(int(state.step) + 1, run.steps + 1):
            waits_for(f"step {done} or the one before")
            step = programs.at(done - 1)
            # Between host and devices goes what is put or fetched by name, and nothing unasked.
            with jax.transfer_guard("disallow"):
                with profile.step(done, state):
                    state, values = step(state, batch)
                recorder.add(done, values)  # fetches the step before, while this one runs
                last = done == run.steps
                preempted = preemption.reached(done) and not last
                if not (last or preempted):
                    waits_for(f"input of step {done + 1}")
                    with recorder.waiting():
                        batch = next(batches)
            evaluates = last or (_evaluates(config, done) and not preempted)
            saves = last or preempted or done % config.checkpoint.every == 0
            if evaluates or saves:
                recorder.flush()
            if evaluates:
                _evaluate(run, state, done, metrics)
                last |= has_waited(*patience)
            checkpoints.poll()
            if saves or last:
                with run.clock.within("save"):
                    checkpoints.save(state, run.description)
            if preempted or last:
                break
    return done


def _evaluates(config: TrainConfig, step: int) -> bool:
    return bool(config.eval_every) and step % config.eval_every == 0


def _evaluate(run: Run, state: TrainState, step: int, metrics: Metrics) -> None:
    with run.clock.within("evaluate"):
        params = state.params if state.ema is None else state.ema
        for name, evaluator in run.evaluators.items():
            start = time.perf_counter()
            waits_for(f"evaluation {name} of step {step}")
            values = {f"{name}/{key}": value for key, value in evaluator(params).items()}
            metrics.write(step, {**values, "seconds": time.perf_counter() - start})
            metrics.say(
                f"step {step}  " + "  ".join(f"{key} {value:.4g}" for key, value in values.items())
            )
