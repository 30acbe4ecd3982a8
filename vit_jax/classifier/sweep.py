"""A sweep: trials that differ in some fields of a recipe, and the best of them on the dev split.

Each trial is a run in `workdir/trials/NAME`, so a killed trial resumes. A finished trial's folder
has a `result.json` and no checkpoints. Trials share the workdir's compiled programs. Those that
differ only in the peak learning rate compile once, on CPUs and TPUs once per lane
(`parallel.lanes`), since jax caches their programs by device.
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax

from vit_jax.config import InputError
from vit_jax.evaluation.intervals import accuracy_interval
from vit_jax.parallel.lanes import ALONE, Lane, side_by_side
from vit_jax.parallel.multihost import barrier, is_main
from vit_jax.parallel.run_files import read_json, remove_tree, write_whole
from vit_jax.training.metrics import read_metrics
from vit_jax.training.recipe import TrainConfig

RESULT = "result.json"
Values = dict[str, Any]  # dotted field of the recipe -> its value in a trial


@dataclasses.dataclass(frozen=True)
class SweepConfig:
    """The trials: the product of `learning_rates` (schedule.peak) and `grid`.

    An empty sweep is one trial of the unchanged recipe.

    Attributes:
      learning_rates: values of schedule.peak.
      grid: (dotted field, values) pairs.
      devices: devices per trial; trials run side by side on the others. None: see
        `devices_of_a_trial`.
    """

    learning_rates: tuple[float, ...] = ()
    grid: tuple[tuple[str, tuple[int | float | str, ...]], ...] = ()
    devices: int | None = None

    def __post_init__(self):
        if self.devices is not None and self.devices < 1:
            raise InputError(f"sweep.devices = {self.devices}: expected at least 1")

    def trials(self) -> list[Values]:
        """The values of each trial."""
        axes = dict(self.grid)
        if self.learning_rates:
            axes = {"schedule.peak": self.learning_rates, **axes}
        if empty := [field for field, values in axes.items() if not values]:
            raise InputError(f"sweep: no values for {', '.join(empty)}: list some, or remove it")
        return [
            dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())
        ]


@dataclasses.dataclass(frozen=True)
class Trial:
    """A finished trial, measured on dev. Trials of earlier versions lack the last two fields.

    `step` is the step of its best evaluation if it may stop early.
    """

    values: Values
    accuracy: float
    loss: float
    examples: int
    step: int
    balanced_accuracy: float | None = None
    macro_f1: float | None = None

    def __str__(self) -> str:
        low, high = accuracy_interval(round(self.accuracy * self.examples), self.examples)
        return (
            f"{shown(self.values):40} {self.accuracy:7.2%}  [{low:.2%}, {high:.2%}]  "
            f"loss {self.loss:.4f}  step {self.step}"
        )

    def merit(self, metric: str) -> tuple[float, float]:
        """Returns the key that the best trial maximises: (metric, negative loss)."""
        if (value := getattr(self, metric)) is None:
            raise InputError(
                f"trial {trial_name(self.values)} has no {metric}: choose by accuracy, or start "
                "again in another --workdir"
            )
        return value, -self.loss


def make_trial(values: Values, scores: Mapping[str, float], step: int) -> Trial:
    """Builds a trial from `scores`, which has the fields' names."""
    names = ("accuracy", "loss", "examples", "balanced_accuracy", "macro_f1")
    return Trial(values, step=step, **{name: scores[name] for name in names if name in scores})


NAMES = {"schedule.peak": "learning rate"}  # displayed names of fields


def shown(values: Values) -> str:
    """Returns a trial's displayed name: "learning rate 0.01, weight_decay 0.05"."""
    if values.get("stop") == 0:
        return "linear probe"
    words = (f"{NAMES.get(k, k.rpartition('.')[2])} {v}" for k, v in values.items())
    return ", ".join(words) or "the recipe"


def trial_name(values: Values) -> str:
    """Returns a trial's folder name: "schedule.peak=0.01,optimizer.weight_decay=0.05"."""
    text = ",".join(f"{field}={value}" for field, value in values.items())
    return text.replace("/", "_") or "recipe"


def with_values(config: Any, values: Values) -> Any:
    """Returns the config with these values; raises ValueError for an unknown field."""
    for field, value in values.items():
        config = _replace(config, field.split("."), value, field)
    return config


def _replace(config: Any, path: list[str], value: Any, field: str) -> Any:
    name, *rest = path
    if not dataclasses.is_dataclass(config) or name not in vars(config):
        raise InputError(f"sweep: the recipe has no field {field}: check the name {name!r}")
    value = _replace(getattr(config, name), rest, value, field) if rest else value
    return dataclasses.replace(config, **{name: value})


def check_dev(examples: int, trials: list[Values]) -> None:
    """Raises ValueError for a dev split that is too small to distinguish that many trials."""
    needed = 4 * len(trials)
    if len(trials) > 1 and examples < needed:
        raise InputError(
            f"the dev split has {examples} images, too few to choose among {len(trials)} trials: "
            f"expected at least {needed}. Enlarge it (--config.workflow.split.dev_share), or try "
            "fewer (--config.workflow.sweep.learning_rates)"
        )


def devices_of_a_trial(config: TrainConfig, sweep: SweepConfig, trials: int) -> int:
    """Returns the number of devices per trial; with all devices, trials run one after another.

    With several processes each trial has all devices. With one process and without
    `sweep.devices`, it is the smallest number that divides all devices and the batch and leaves at
    most a quarter of the devices idle over all trials. The mesh's `fsdp` and `tensor` stay; a fixed
    `data` means all devices.
    """
    available, mesh = jax.device_count(), config.mesh
    if jax.distributed.is_initialized():
        if sweep.devices:
            raise InputError(
                f"sweep.devices = {sweep.devices}: the trials of several processes run one after "
                "another, each over all devices: leave it out, or start one process"
            )
        return available
    if sweep.devices:
        if sweep.devices > available:
            raise InputError(f"sweep.devices = {sweep.devices}: there are {available}")
        return sweep.devices
    if mesh.data != -1 or config.profile_steps:  # jax traces a whole process
        return available
    for size in range(mesh.fsdp * mesh.tensor, available, mesh.fsdp * mesh.tensor):
        rounds = math.ceil(trials / (available // size))
        busy = trials * size / (rounds * available)
        divides = available % size == 0 and config.batch_size % (size // mesh.tensor) == 0
        if divides and busy >= 0.75:
            return size
    return available


def run_trials(
    config: TrainConfig,
    trials: list[Values],
    workdir: Path,
    run: Callable[[TrainConfig, Path, Lane], None],
    lanes: Sequence[Lane] = (ALONE,),
) -> list[Trial]:
    """Runs the unfinished trials, one after another, or side by side on several lanes.

    `run` trains one config in one folder and lane, with "dev" evaluations.
    """
    jobs = {}
    for number, values in enumerate(trials, 1):
        folder = workdir / "trials" / trial_name(values)
        of = f"trial {number} of {len(trials)}: {shown(values)}"
        if (folder / RESULT).exists():
            read_result(folder)  # checks that it is whole before anything is removed
            remove_tree(folder / "checkpoints")
        else:
            jobs[trial_name(values)] = partial(_run_trial, config, values, folder, run, of)
    if len(lanes) == 1:
        for name, job in jobs.items():
            job(lanes[0])
            barrier(name)
    else:
        side_by_side(jobs, lanes)
    return [read_result(workdir / "trials" / trial_name(values)) for values in trials]


def read_result(folder: Path) -> Trial:
    """Reads a finished trial; raises ValueError if its file is damaged."""
    fields = dataclasses.fields(Trial)
    needed = tuple(field.name for field in fields if field.default is dataclasses.MISSING)
    remedy = f"remove {folder}: the trial is made again"
    found = read_json(folder / RESULT, remedy, keys=needed)
    return Trial(**{field.name: found[field.name] for field in fields if field.name in found})


def _run_trial(
    config: TrainConfig,
    values: Values,
    folder: Path,
    run: Callable[[TrainConfig, Path, Lane], None],
    of: str,
    lane: Lane,
) -> None:
    if is_main():
        print(of, flush=True)
    run(with_values(config, values), folder, lane)
    if is_main():
        trial = _score(values, folder, config.watched)
        write_whole(folder / RESULT, json.dumps(dataclasses.asdict(trial), indent=2) + "\n")
        remove_tree(folder / "checkpoints")


def _score(values: Values, folder: Path, watched: str) -> Trial:
    """Returns the last dev evaluation, or the first with the best value of the watched metric."""
    records = [r for r in read_metrics(folder) if "dev/accuracy" in r]
    record = records[-1]
    if watched:
        record = max(records, key=lambda r: (r[watched], -r["dev/loss"]))
    scores = {name.removeprefix("dev/"): value for name, value in record.items()}
    return make_trial(values, {**scores, "examples": int(scores["examples"])}, int(record["step"]))


def best_trial(trials: list[Trial], metric: str = "accuracy") -> Trial:
    """Returns the best trial on dev by a metric; ties go to the least loss."""
    return max(trials, key=lambda trial: trial.merit(metric))


def show_trials(trials: list[Trial], metric: str = "accuracy") -> str:
    """Returns the table of results, best first, with notes if the best is at the grid's edge."""
    ranked = sorted(trials, key=lambda trial: trial.merit(metric), reverse=True)
    chosen_by = "" if metric == "accuracy" else f"; chosen by {metric}"
    lines = [f"{'trial':40} dev accuracy, 95% interval{chosen_by}"]
    for trial in ranked:
        value = "" if metric == "accuracy" else f"  {metric} {trial.merit(metric)[0]:.2%}"
        lines.append(f"{trial}{value}")
    for field, value in ranked[0].values.items():
        tried = sorted({trial.values[field] for trial in trials if field in trial.values})
        if len(tried) > 1 and value in (tried[0], tried[-1]):
            end = "smallest" if value == tried[0] else "largest"
            name = NAMES.get(field, field)
            lines.append(f"note: the best {name}, {value}, is the {end} tried: widen the sweep")
    return "\n".join(lines)
