"""The time of a workflow: told before it is spent, and kept within `workflow.minutes`.

What was settled is kept in `workdir/budget.json`, so that a run that goes on does the same.
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
FEWEST = 10  # steps of a run that are worth its compilation
MARGIN = 0.85  # of the time that is left: steps may become slower
START = 3.0  # seconds of a run that nothing is compiled for: opening, restoring, saving
REPORT = 20.0  # seconds of the report without the model: hand-made features, figures, exports
SAME_TIME = ("schedule", "optimizer", "loss", "seed", "augmentation")  # fields; a step's cost stays


@dataclasses.dataclass(frozen=True)
class Budget:
    """What a workflow runs.

    Attributes:
      trials: the values of each fine-tuning trial; none: the linear probe is the result.
      steps: of a trial and of the final run.
      seconds: expected, of all runs.
      minutes: the `workflow.minutes` that it was settled for.
      device: `jax.default_backend()` at the first start.
      before: seconds that had passed when it was settled.
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
    """Seconds: of a step, of what a run takes without its steps, and of the whole report."""

    step: float
    run: float
    report: float

    @classmethod
    def of(cls, step: float, compilation: float, steps_to_look: float, tests: float) -> "Cost":
        """From a step, its compilation, and how many batches a run and the report only look at.

        Without gradients a batch takes a third of a step.
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
    """What was settled before; or else what fits, which is then kept.

    Args:
      config: the recipe; its `workflow.minutes` is the budget, None for as long as it takes.
      workdir: the workflow's.
      trials: the sweep's.
      scheduled: steps of a run by the recipe.
      measure: measures a step; called once, not at a restart.
      lanes: trials that go side by side.
      started: the `time.perf_counter` that the minutes count from.
      probed: whether there is a linear probe, which needs no steps.

    Raises ValueError for minutes that are too few, or for others than were settled.
    """
    file, minutes = workdir / FILE, config.workflow.minutes
    if not all_agree(file.exists()):
        cost, problem = measure(), ""  # all processes compute together, one decides
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
            "the same again, or train anew in another --workdir"
        )
    return budget


def settle_final(workdir: Path, spent: float, lanes: int) -> int:
    """Steps of the final run: fewer if the trials, which took `spent` seconds, were slow; kept."""
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
    """What was settled; ValueError if the file is damaged."""
    names = [field.name for field in dataclasses.fields(Budget)]
    remedy = "copy it back, or train anew in another --workdir"
    found = read_json(workdir / FILE, remedy, keys=tuple(names))
    return Budget(**{name: found[name] for name in names})


def duration(cost: Cost, trials: int, steps: int, lanes: int) -> float:
    """Seconds of the trials, the final run and the report."""
    if not trials:
        return cost.report
    rounds = math.ceil(trials / lanes) + 1
    return rounds * (cost.run + steps * cost.step) + cost.report


def fit(budget: Budget, cost: Cost, left: float, lanes: int, probed: bool) -> Budget:
    """The budget with as many trials as leave at least half of the steps, within `left` seconds.

    Without room for one trial with a tenth of them, the probe alone remains. Of the trials those
    in the middle stay. ValueError if nothing fits.
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
        "or take a smaller model, image_size or batch_size"
    )


def check_sweep(config: TransferConfig) -> None:
    """ValueError for a sweep whose trials take different times, if minutes are to be kept."""
    if config.workflow.minutes is None:
        return
    for field, _ in config.workflow.sweep.grid:
        if not covered(field, SAME_TIME) or field in ("schedule.warmup", "schedule.cooldown"):
            raise InputError(
                f"workflow.minutes settles the steps by one measured step: leave {field} out of "
                "workflow.sweep.grid, or minutes"
            )


def with_steps(config: TransferConfig, steps: int, scheduled: int) -> TransferConfig:
    """The recipe with another number of steps; what it counts in steps is scaled alike."""
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
