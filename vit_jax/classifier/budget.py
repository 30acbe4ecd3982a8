"""The time budget of a workflow: estimated beforehand, and kept within `workflow.minutes`.

`workdir/budget.json` holds the budget, so that a resumed workflow runs the same trials and steps.
"""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from vit_jax.classifier.recipe import TransferConfig
from vit_jax.classifier.sweep import Values
from vit_jax.config import InputError, covered
from vit_jax.parallel.multihost import all_agree, barrier, first_of_all, is_main
from vit_jax.parallel.run_files import read_json, write_whole

FILE = "budget.json"
FEWEST = 10  # steps of a run; fewer aren't worth its compilation
MARGIN = 0.85  # share of the remaining time to plan for, since steps may become slower
START = 3.0  # seconds per run besides compilation and steps: opening, restoring, saving
REPORT = 20.0  # seconds of the report without the model: hand-made features, figures, exports
SAME_TIME = ("schedule", "optimizer", "loss", "seed", "augmentation")  # don't change a step's cost


@dataclasses.dataclass(frozen=True)
class Budget:
    """The runs of a workflow.

    Attributes:
      trials: the values of each fine-tuning trial; if empty, the linear probe is the result.
      steps: steps of a trial and of the final run.
      seconds: expected time of all runs.
      minutes: the `workflow.minutes` that the budget was made for.
      device: `jax.default_backend()` at the first start.
      before: seconds that had passed when the budget was made.
      final: steps of the final run, see `settle_final`; None before the trials have ended.
    """

    trials: list[Values]
    steps: int
    seconds: float
    minutes: float | None
    device: str
    before: float = 0.0
    final: int | None = None

    def __str__(self) -> str:
        if not self.trials:
            return "no time for a step of fine-tuning: the linear probe is the result"
        return (
            f"run 1 of {len(self.trials) + 1}, about {_told(self.seconds)} on this "
            f"{self.device.upper()} in all: {self.steps:,} steps each"
        )


def _told(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


@dataclasses.dataclass(frozen=True)
class Cost:
    """Seconds of a step, of a run without its steps, and of the whole report."""

    step: float
    run: float
    report: float

    @classmethod
    def of(cls, step: float, compilation: float, steps_to_look: float, tests: float) -> "Cost":
        """Estimates the cost from a step, its compilation, and numbers of batches to evaluate.

        `steps_to_look` are a run's, `tests` the report's. Without gradients a batch takes a third
        of a step.
        """
        evaluations = START + compilation / 3 + steps_to_look * step / 3
        return cls(step, evaluations, compilation / 3 + tests * step / 3 + REPORT)


def settle(
    config: TransferConfig,
    workdir: Path,
    trials: Sequence[Values],
    scheduled: int,
    measure: Callable[[], Cost],
    *,
    lanes: int,
    started: float,
    probed: bool,
) -> Budget:
    """Reads the workflow's budget, or makes one that fits and writes it.

    Args:
      config: the recipe; `workflow.minutes` limits the time, None means no limit.
      workdir: the workflow's folder.
      trials: values of the sweep's trials.
      scheduled: steps of a run by the recipe.
      measure: measures a step; called once, not at a restart.
      lanes: number of trials that run side by side.
      started: the `time.perf_counter` that the minutes count from.
      probed: whether there is a linear probe, which needs no steps.

    Raises ValueError if the minutes are too few, or differ from those of the existing budget.
    """
    file, minutes = workdir / FILE, config.workflow.minutes
    if not all_agree(file.exists()):
        cost, problem = measure(), ""  # all processes measure together, one decides
        if is_main():
            before = round(time.perf_counter() - started, 1)
            budget = Budget([*trials], scheduled, 0.0, minutes, jax.default_backend(), before)
            left = 60 * (minutes or math.inf) - before
            try:
                budget = fit(budget, cost, MARGIN * left - cost.report, lanes, probed)
            except ValueError as error:
                problem = str(error)
            else:
                print(budget, flush=True)
                write_whole(file, json.dumps(dataclasses.asdict(budget), indent=2) + "\n")
        if problem := first_of_all(problem):
            raise InputError(problem)
        barrier("budget")
    budget = read(workdir)
    if budget.minutes != minutes:
        raise InputError(
            f"{file} was settled for workflow.minutes = {budget.minutes}, found {minutes}: set "
            "the same again, or start again in another --workdir"
        )
    return budget


def settle_final(workdir: Path, spent: float, lanes: int) -> int:
    """Settles the final run's steps: fewer if the trials, which took `spent` seconds, were slow."""
    budget = read(workdir)
    if budget.final is None and is_main():
        a_step = spent / (math.ceil(len(budget.trials) / lanes) * budget.steps)
        left = 60 * budget.minutes - budget.before - spent - REPORT
        steps = max(min(FEWEST, budget.steps), math.floor(MARGIN * left / a_step))
        budget = dataclasses.replace(budget, final=min(steps, budget.steps))
        write_whole(workdir / FILE, json.dumps(dataclasses.asdict(budget), indent=2) + "\n")
        if steps < budget.steps:
            print(f"steps were slower than measured: the final run has {steps:,}", flush=True)
    barrier("final budget")
    return read(workdir).final


def read(workdir: Path) -> Budget:
    """Reads the budget; raises ValueError if the file is damaged."""
    names = [field.name for field in dataclasses.fields(Budget)]
    remedy = "copy it back, or start again in another --workdir"
    found = read_json(workdir / FILE, remedy, keys=tuple(names))
    return Budget(**{name: found[name] for name in names})


def duration(cost: Cost, trials: int, steps: int, lanes: int) -> float:
    """Returns the seconds of the trials, the final run and the report."""
    if not trials:
        return cost.report
    rounds = math.ceil(trials / lanes) + 1
    return rounds * (cost.run + steps * cost.step) + cost.report


def fit(budget: Budget, cost: Cost, left: float, lanes: int, probed: bool) -> Budget:
    """Returns the budget with the most trials that fit `left` seconds with at least half the steps.

    It keeps the middle trials. If not even one trial with a tenth of the steps fits, only the probe
    remains. Raises ValueError if nothing fits.
    """
    trials, steps = budget.trials, budget.steps

    def chosen(kept: list[Values], steps: int) -> Budget:
        seconds = round(duration(cost, len(kept), steps, lanes), 1)
        return dataclasses.replace(budget, trials=kept, steps=steps, seconds=seconds)

    if left == math.inf:
        return chosen(trials, steps)
    for count in range(len(trials), 0, -1):
        rounds = math.ceil(count / lanes) + 1
        affordable = min(steps, math.floor((left / rounds - cost.run) / cost.step))
        if affordable >= steps / 2 or (count == 1 and affordable >= min(FEWEST, steps)):
            first = (len(trials) - count) // 2
            return chosen(trials[first : first + count], affordable)
    if probed:
        return chosen([], 0)
    needed = duration(cost, 1, min(FEWEST, steps), 1) / MARGIN
    raise InputError(
        f"workflow.minutes = {budget.minutes:g} are too few: a step takes {cost.step:.2g} s, and "
        f"{min(FEWEST, steps)} steps of a trial and of the final run {_told(needed)}. Allow more, "
        "or use a smaller model, image_size or batch_size"
    )


def check_sweep(config: TransferConfig) -> None:
    """Raises ValueError for a sweep whose trials take different times, if minutes are limited."""
    if config.workflow.minutes is None:
        return
    for field, _ in config.workflow.sweep.grid:
        if not covered(field, SAME_TIME) or field in ("schedule.warmup", "schedule.cooldown"):
            raise InputError(
                f"workflow.minutes sets the steps by one measured step: leave {field} out of "
                "workflow.sweep.grid, or minutes"
            )


def with_steps(config: TransferConfig, steps: int, scheduled: int) -> TransferConfig:
    """Returns the recipe with another number of steps; scales all fields that count steps."""
    if steps == scheduled:
        return config

    def scaled(value: int) -> int:
        return value * steps // scheduled

    schedule = dataclasses.replace(
        config.schedule,
        warmup=scaled(config.schedule.warmup),
        cooldown=scaled(config.schedule.cooldown),
    )
    every = config.eval_every and max(1, scaled(config.eval_every))
    return dataclasses.replace(
        config, steps=steps, epochs=None, schedule=schedule, eval_every=every
    )
