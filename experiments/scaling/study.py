"""Defines scaling studies: grids that expand to runs with stable names. Doesn't import jax.

A study file (`studies/*.py`) has `get_study(arg) -> Study`. A grid is models x pretraining sets x
sweep x seeds x budgets, and tasks to fine-tune each result on. Each combination is a `Run` with a
config, a readable key, and a name that ends in the hash of all fields that define the run. A grid
can grow at any time without renaming existing runs.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from vit_jax.config import InputError, covered, fields_where, unknown
from vit_jax.recipes import call_in, merge

ROOT = Path(__file__).parent.parent.parent
FAMILIES = ("ViT", "ResNet", "hybrid")
Fields = Mapping[str, Any]  # dotted name of a recipe's field -> value


@dataclasses.dataclass(frozen=True)
class Model:
    """A model of the study. `family` determines its marker in figures."""

    name: str
    family: str
    fields: Fields

    def __post_init__(self):
        if self.family not in FAMILIES:
            raise unknown("family", self.family, FAMILIES)


@dataclasses.dataclass(frozen=True)
class PretrainingSet:
    """A dataset or subset of `examples` images; 0: tasks start from random weights."""

    name: str
    examples: int
    fields: Fields


@dataclasses.dataclass(frozen=True)
class Budget:
    """The length of pretraining: either steps or epochs."""

    steps: int | None = None
    epochs: float | None = None

    def __post_init__(self):
        if (self.steps is None) == (self.epochs is None):
            raise InputError(f"{self}: set exactly one of steps and epochs")

    @property
    def name(self) -> str:
        return f"{self.steps} steps" if self.steps else f"{self.epochs:g} epochs"

    def fields(self) -> dict[str, Any]:
        return {"steps": self.steps} if self.steps else {"epochs": float(self.epochs)}


@dataclasses.dataclass(frozen=True)
class Choice:
    """One point of a sweep, for example of the regularisation or learning rate."""

    name: str
    fields: Fields


@dataclasses.dataclass(frozen=True)
class Task:
    """A dataset to fine-tune on: a recipe of vit_jax.transfer, and a sweep over it."""

    name: str
    recipe: Mapping[str, Any]
    sweep: tuple[Choice, ...] = (Choice("", {}),)
    models: Callable[[Model], Fields] = lambda model: {}  # extra fields per model


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run of vit_jax.pretrain or vit_jax.transfer.

    In the config, "@NAME" is the workdir of another run.
    """

    kind: str  # pretrain | trunk: shared start of several runs, not evaluated | transfer
    labels: Mapping[str, Any]  # model, family, set, examples, budget, sweep, seed; task, task_sweep
    config: Mapping[str, Any]
    init: str | None = None  # name of the run that provides its initial parameters
    trunk: str | None = None  # name of the run that it continues, bit for bit
    trunk_steps: int = 0

    @property
    def key(self) -> str:
        """A readable name, unique in a study."""
        parts = [self.labels[k] for k in ("model", "set", "sweep", "budget")]
        parts.append(f"seed {self.labels['seed']}")
        parts += [self.labels[k] for k in ("task", "task_sweep") if k in self.labels]
        return " | ".join([p for p in parts if p] + ["trunk"] * (self.kind == "trunk"))

    @property
    def name(self) -> str:
        """The key as a file name, with the hash of all fields that define the run."""
        words = "".join(c if c.isalnum() or c in ".-+" else "_" for c in self.key)
        while "__" in words:
            words = words.replace("__", "_")
        return f"{words}-{self.hash}"

    @property
    def hash(self) -> str:
        kind = "transfer" if self.kind == "transfer" else "pretrain"
        text = json.dumps([kind, self.identity], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:10]

    @property
    def identity(self) -> dict[str, Any]:
        """The config without machine-dependent fields."""
        fields = flatten(self.config).items()
        return {name: value for name, value in fields if not covered(name, machine_fields())}


@functools.cache
def machine_fields() -> tuple[str, ...]:
    """Returns the fields of a recipe that change only the speed of a run."""
    from vit_jax.training.recipe import TrainConfig  # imports jax

    return tuple(fields_where(TrainConfig, changes="speed"))


@dataclasses.dataclass(frozen=True)
class Grid:
    """models x sets x sweep x seeds x budgets, in this order of loops, then tasks.

    `cooldown` is the share of a budget in which the learning rate falls to 0. With it, all budgets
    of a cell branch from one trunk with a constant or rsqrt schedule ("Scaling Vision
    Transformers", arXiv 2106.04560, section 3.5). A branch is bit-identical to a separate run, so
    its name doesn't depend on the trunk.
    """

    recipe: Mapping[str, Any]
    models: tuple[Model, ...]
    sets: tuple[PretrainingSet, ...]
    budgets: tuple[Budget, ...]
    seeds: tuple[int, ...] = (0,)
    sweep: tuple[Choice, ...] = (Choice("", {}),)
    tasks: tuple[Task, ...] = ()
    cooldown: float | None = None
    keep: Callable[[Model, PretrainingSet, Budget, Choice], bool] = lambda *_: True


@dataclasses.dataclass(frozen=True)
class Study:
    """Grids, most important first; runs that several grids share are executed once."""

    name: str
    grids: tuple[Grid, ...]
    # Upstream metric that selects the reported sweep point and evaluation; None: the last
    # evaluation of a single sweep point. It implements the early stopping of section 4.3.
    select: str | None = None
    task_select: str = "validation/accuracy"  # the same for a task's sweep
    # Group -> tasks and few-shot datasets, as for VTAB in Figure 2.
    groups: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    about: str = ""


def expand(study: Study) -> list[Run]:
    """Returns all runs in execution order.

    Raises ValueError for two different runs with the same key.
    """
    runs: dict[str, Run] = {}
    for grid in study.grids:
        for run in _expand_grid(grid):
            known = runs.setdefault(run.key, run)
            if known.hash != run.hash:
                raise InputError(
                    f"two runs are called {run.key!r} and differ in\n"
                    + "\n".join(differences(known.identity, run.identity))
                    + "\ngive their models, sets or sweep points other names"
                )
    return list(runs.values())


def _expand_grid(grid: Grid) -> Iterator[Run]:
    cells = itertools.product(grid.seeds, grid.sets, grid.models, grid.sweep)
    for seed, subset, model, choice in cells:
        budgets = [b for b in grid.budgets if grid.keep(model, subset, b, choice)]
        labels = {
            "model": model.name,
            "family": model.family,
            "set": subset.name,
            "examples": subset.examples,
            "sweep": choice.name,
            "seed": seed,
        }
        recipe = grid.recipe
        for fields in (subset.fields, model.fields, choice.fields, {"seed": seed}):
            recipe = merge(recipe, fields)
        if grid.cooldown is None:
            runs = [
                Run("pretrain", {**labels, "budget": b.name}, merge(recipe, b.fields()))
                for b in budgets
            ]
        else:
            runs = list(_branches(grid.cooldown, labels, recipe, budgets))
        if not subset.examples:
            labels |= {"budget": ""}
            for task in grid.tasks:
                yield from _transfers(labels, None, task, model)
            continue
        yield from runs
        for run in runs:
            for task in grid.tasks if run.kind == "pretrain" else ():
                yield from _transfers(run.labels, run.name, task, model)


def _branches(
    cooldown: float, labels: Fields, recipe: Mapping[str, Any], budgets: list[Budget]
) -> Iterator[Run]:
    """Yields the trunk to the first branching point, that branch, the trunk to the next, ..."""
    trunk = None
    for budget in sorted(budgets, key=lambda b: b.steps or 0):
        if budget.steps is None:
            raise InputError(f"{budget.name}: branches need budgets in steps")
        fall = round(cooldown * budget.steps)
        start = budget.steps - fall
        labelled = {**labels, "budget": budget.name}
        if len(budgets) > 1:
            fields = {
                "steps": start,
                "eval_every": None,
                "classification": {},
                "fewshot": {},
                "checkpoint.every": start,
            }
            fields |= {"evaluators": {}} if "evaluators" in recipe else {}
            trunk = Run(
                "trunk",
                {**labels, "budget": f"{start} steps"},
                merge(recipe, fields),
                trunk=trunk and trunk.name,
                trunk_steps=trunk.config["steps"] if trunk else 0,
            )
            yield trunk
        fields = {"steps": budget.steps, "schedule.cooldown": fall, "eval_every": None}
        yield Run(
            "pretrain",
            labelled,
            merge(recipe, fields),
            trunk=trunk and trunk.name,
            trunk_steps=start if trunk else 0,
        )


def _transfers(labels: Fields, init: str | None, task: Task, model: Model) -> Iterator[Run]:
    architecture = {k: v for k, v in model.fields.items() if k.startswith("model.")}
    dropped = ("model.head_bias", "model.representation_size", "model.dropout")  # of pretraining
    fields = {k: v for k, v in architecture.items() if k not in dropped}
    fields["seed"] = labels["seed"]
    if init:
        fields["init"] = f"@{init}"
    base = merge(task.recipe, fields)
    for choice in task.sweep:
        own = {**task.models(model), **choice.fields}
        names = {**labels, "task": task.name, "task_sweep": choice.name}
        yield Run("transfer", names, merge(base, own), init=init)


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Flattens nested mappings to dotted names, with tuples as lists as in JSON."""
    if isinstance(tree, Mapping) and (tree or not prefix):
        flat = {}
        for name, value in tree.items():
            flat |= flatten(value, f"{prefix}.{name}" if prefix else str(name))
        return flat
    return {prefix: list(tree) if isinstance(tree, tuple) else tree}


def differences(before: Fields, now: Fields) -> list[str]:
    """Returns one line for each field in which two flat configs differ."""
    return [
        f"  {name}: {before.get(name)!r} there, {now.get(name)!r} here"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]


def load_study(name: str) -> Study:
    """Loads a study by name, such as "mini", or by path; ":ARGUMENT" may follow.

    Raises ValueError for an unknown name, FileNotFoundError for a missing file.
    """
    name, _, arg = name.partition(":")
    folder = Path(__file__).parent / "studies"
    path = Path(name) if name.endswith(".py") else folder / f"{name}.py"
    if not path.is_file():
        if name.endswith(".py"):
            raise FileNotFoundError(f"no study file {name}")
        raise unknown("study", name, [p.stem for p in folder.glob("*.py")])
    study = call_in(path, "get_study", arg or None)
    if not isinstance(study, Study):
        raise InputError(f"{path}: get_study returned {study!r}: expected a Study")
    return study
