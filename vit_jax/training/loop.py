"""The training loop of pretraining and transfer: restore, step, log, evaluate, checkpoint.

`run.prepare` checks everything before anything is compiled, then `train` runs. A step ends in this
order: flush records, evaluate, save. So when a checkpoint exists, everything up to its step has
been recorded, and a restart from it repeats and loses nothing.
"""

import dataclasses
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing
from itertools import chain, islice
from typing import Any

import jax

from vit_jax.config import InputError, build
from vit_jax.costs.chips import num_chips
from vit_jax.parallel.mesh import put_batch, use_mesh
from vit_jax.parallel.multihost import all_agree
from vit_jax.parallel.preemption import PREEMPTED, Preemption
from vit_jax.parallel.watchdog import Watchdog, waits_for
from vit_jax.training.checkpoint import Checkpoints
from vit_jax.training.clock import Clock, Starts
from vit_jax.training.early_stopping import has_waited
from vit_jax.training.initial import first_state
from vit_jax.training.metrics import Metrics, Recorder
from vit_jax.training.profile import Profile
from vit_jax.training.programs import Programs
from vit_jax.training.recipe import TrainConfig
from vit_jax.training.result import Trained
from vit_jax.training.run import Run, prepare
from vit_jax.training.same_data import keep_data
from vit_jax.training.step import TrainState
from vit_jax.training.workdir import compiled_kept, keep_config


def pretrain(
    config: Mapping[str, Any] | TrainConfig, workdir: str | os.PathLike, clock: Clock | None = None
) -> Trained:
    """Trains a model from random weights, or resumes the run in the workdir.

    Args:
      config: a recipe, such as `vit_jax.recipe` returns, or the dataclass.
      workdir: the folder of the run.
      clock: a running clock, if the time before this call counts too.

    Raises ValueError or FileNotFoundError before anything is compiled if the recipe or the data
    don't fit; otherwise as `train`.
    """
    run = prepare(build(TrainConfig, config), os.fspath(workdir), clock=clock)
    return Trained(run.workdir, train(run))


def train(run: Run) -> dict[str, float]:
    """Trains to the last step, from the newest checkpoint if any; returns each metric's last value.

    After SIGTERM it saves and exits with code `preemption.PREEMPTED`; the same command resumes.
    After Ctrl-C it saves and raises KeyboardInterrupt; a second Ctrl-C ends it immediately.

    Raises FloatingPointError if the loss or a parameter is no longer finite. The last checkpoint is
    then from before.
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
        if start >= run.steps and run.resumes not in (None, run.workdir):
            raise InputError(
                f"resume: {run.resumes} is at step {start} and the run has {run.steps} steps: "
                "nothing is left to do; set more steps"
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
        if start >= run.steps or (start and _has_waited(run)):
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
            _evaluate(run, state, start, metrics)  # the run was preempted before this evaluation
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
            steps = _Loop(run, programs, recorder, checkpoints, preemption)
            end = steps.take_steps(state, chain([first], batches))
        with clock.within("save"):
            checkpoints.wait()
        starts.keep(end)
        metrics.say(starts.summary(jax.default_backend() != "cpu"))
        if preemption.interrupted:
            raise KeyboardInterrupt(f"stopped at step {end}; the same command resumes")
        if end < run.steps and not _has_waited(run):
            metrics.say(f"told to end after step {end}: start again to resume from there")
            raise SystemExit(PREEMPTED)
        return metrics.last()


def _finish(run: Run, state: TrainState, metrics: Metrics) -> dict[str, float]:
    """Ends a run that has no steps left; saves the initial state if `stop = 0`."""
    if run.resumes is None:
        with Checkpoints(run.workdir, run.config.checkpoint, metrics.saved) as checkpoints:
            checkpoints.save(state, run.description)
    metrics.say(f"{run.workdir} is finished: {int(state.step)} steps")
    return metrics.last()


def measure_step(run: Run, steps: int = 4) -> tuple[float, float]:
    """Measures a few steps of each stage; keeps nothing.

    Returns (mean seconds per step of the run, seconds of all compilations). Reading and preparing
    images counts.
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


@dataclasses.dataclass(frozen=True)
class _Loop:
    """The parts of a run that its steps use."""

    run: Run
    programs: Programs
    recorder: Recorder
    checkpoints: Checkpoints
    preemption: Preemption

    def take_steps(self, state: TrainState, batches: Iterator[dict]) -> int:
        """Trains until the last step or preemption; returns that step, whose save has begun."""
        run, recorder = self.run, self.recorder
        batch = next(batches)
        with Profile(run.workdir, run.config.profile_steps, run.clock) as profile:
            for done in range(int(state.step) + 1, run.steps + 1):
                waits_for(f"step {done} or the one before")
                step = self.programs.at(done - 1)
                # Only explicit transfers between host and devices are allowed.
                with jax.transfer_guard("disallow"):
                    with profile.step(done, state):
                        state, values = step(state, batch)
                    recorder.add(done, values)  # fetches the step before, while this one runs
                    last = done == run.steps
                    preempted = self.preemption.reached(done) and not last
                    if not (last or preempted):
                        waits_for(f"input of step {done + 1}")
                        with recorder.waiting():
                            batch = next(batches)
                if self._finish_step(state, done, last, preempted):
                    break
        return done

    def _finish_step(self, state: TrainState, done: int, last: bool, preempted: bool) -> bool:
        """Flushes records, evaluates and begins to save if due; returns whether the run ends."""
        run, config, metrics = self.run, self.run.config, self.recorder.metrics
        evaluates = last or (_evaluates(config, done) and not preempted)
        saves = last or preempted or done % config.checkpoint.every == 0
        if evaluates or saves:
            self.recorder.flush()
        if evaluates:
            _evaluate(run, state, done, metrics)
        if evaluates or saves:
            metrics.flush()
        last |= evaluates and _has_waited(run)
        self.checkpoints.poll()
        if saves or last:
            with run.clock.within("save"):
                self.checkpoints.save(state, run.description)
        return preempted or last


def _has_waited(run: Run) -> bool:
    """Whether early stopping ends the run."""
    return has_waited(run.workdir, run.watched, run.config.early_stopping)


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
