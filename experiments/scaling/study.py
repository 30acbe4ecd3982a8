"""What a scaling study is: grids that expand to runs with stable names. Imports nothing heavy.

A study file (`studies/*.py`) has `get_study(arg) -> Study`. A grid is models x pretraining sets x
sweep x seeds x budgets, and tasks to fine-tune each result on. Every combination is a `Run`: a
config, which a loop of the package trains, under a key for people and a name that ends in the hash
of what defines the run. So a grid may grow at any time, and what has run keeps its name.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import runpy
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from vit_jax.config import covered, fields_where, unknown
from vit_jax.recipes import merge

ROOT = Path(__file__).parent.parent.parent
FAMILIES = ("ViT", "ResNet", "hybrid")
Fields = Mapping[str, Any]  # dotted names of a recipe's fields, and their values


@dataclasses.dataclass(frozen=True)
class Model:
    """A column of the study. `family` chooses its marker in the figures."""

    name: str
    family: str
    fields: Fields

    def __post_init__(self):
        if self.family not in FAMILIES:
            raise unknown("family", self.family, FAMILIES)


@dataclasses.dataclass(frozen=True)
class PretrainingSet:
    """A set, or a subset, of `examples` images; with 0, tasks start from random weights."""

    name: str
    examples: int
    fields: Fields


@dataclasses.dataclass(frozen=True)
class Budget:
    """How long: exactly one of steps and epochs of the pretraining set."""

    steps: int | None = None
    epochs: float | None = None

    def __post_init__(self):
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(f"{self}: set exactly one of steps and epochs")

    @property
    def name(self) -> str:
        return f"{self.steps} steps" if self.steps else f"{self.epochs:g} epochs"

    def fields(self) -> dict[str, Any]:
        return {"steps": self.steps} if self.steps else {"epochs": float(self.epochs)}


@dataclasses.dataclass(frozen=True)
class Choice:
    """One point of a sweep, such as of the regularisation or of the learning rate."""

    name: str
    fields: Fields


@dataclasses.dataclass(frozen=True)
class Task:
    """A dataset to fine-tune on: a recipe of vit_jax.transfer, and what to sweep in it."""

    name: str
    recipe: Mapping[str, Any]
    sweep: tuple[Choice, ...] = (Choice("", {}),)
    models: Callable[[Model], Fields] = lambda model: {}  # what a model sets besides its own fields


@dataclasses.dataclass(frozen=True)
class Run:
    """One training, of the loop of vit_jax.pretrain or vit_jax.transfer.

    A config may hold "@NAME", which stands for the workdir of another run.
    """

    kind: str  # pretrain | trunk: without evaluations, for others to start from | transfer
    labels: Mapping[str, Any]  # model, family, set, examples, budget, sweep, seed; task, task_sweep
    config: Mapping[str, Any]
    init: str | None = None  # name of the run whose parameters it needs
    trunk: str | None = None  # name of a run of which it is the continuation, bit for bit
    trunk_steps: int = 0

    @property
    def key(self) -> str:
        """What people call it; unique in a study."""
        parts = [self.labels[k] for k in ("model", "set", "sweep", "budget")]
        parts.append(f"seed {self.labels['seed']}")
        parts += [self.labels[k] for k in ("task", "task_sweep") if k in self.labels]
        return " | ".join([p for p in parts if p] + ["trunk"] * (self.kind == "trunk"))

    @property
    def name(self) -> str:
        """The key as a file's name, and the hash of all that defines the run."""
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
        """The config without what may differ from machine to machine."""
        fields = flatten(self.config).items()
        return {name: value for name, value in fields if not covered(name, machine_fields())}


@functools.cache
def machine_fields() -> tuple[str, ...]:
    """Returns the fields of a recipe that change a run's speed and none of its numbers."""
    from vit_jax.training.recipe import TrainConfig  # imports jax

    return tuple(fields_where(TrainConfig, changes="speed"))


@dataclasses.dataclass(frozen=True)
class Grid:
    """models x sets x sweep x seeds x budgets, in this order of loops; then tasks.

    With `cooldown`, the part of a budget in which the learning rate falls to 0, all budgets of a
    cell are branches of one trunk with a constant or rsqrt schedule ("Scaling Vision Transformers",
    arXiv 2106.04560, section 3.5). A branch is bit for bit what a run from the beginning would be,
    so whether there is a trunk is no part of its name.
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
    """Grids, most important first; where they overlap, a run is made once."""

    name: str
    grids: tuple[Grid, ...]
    # Upstream metric that selects, among sweep points and evaluations, what is reported; None: the
    # last evaluation of the only sweep point. It stands for "early stopping" in section 4.3.
    select: str | None = None
    task_select: str = "validation/accuracy"  # the same for a task's sweep
    # Tasks and few-shot sets by group, as VTAB's in Figure 2.
    groups: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    about: str = ""


def expand(study: Study) -> list[Run]:
    """All runs, in the order in which they should be made.

    Raises ValueError for two different runs of one key.
    """
    runs: dict[str, Run] = {}
    for grid in study.grids:
        for run in _expand_grid(grid):
            known = runs.setdefault(run.key, run)
            if known.hash != run.hash:
                raise ValueError(
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
    """Trunk to the first branching point, that branch, trunk to the next, ..."""
    trunk = None
    for budget in sorted(budgets, key=lambda b: b.steps or 0):
        if budget.steps is None:
            raise ValueError(f"{budget.name}: branches need budgets in steps")
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
    dropped = ("model.head_bias", "model.representation_size")  # of the pretraining head alone
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
    """Nested mappings -> dotted names, with what JSON would make of tuples."""
    if isinstance(tree, Mapping) and (tree or not prefix):
        flat = {}
        for name, value in tree.items():
            flat |= flatten(value, f"{prefix}.{name}" if prefix else str(name))
        return flat
    return {prefix: list(tree) if isinstance(tree, tuple) else tree}


def differences(before: Fields, now: Fields) -> list[str]:
    """A line for each field in which two flat configs differ."""
    return [
        f"  {name}: {before.get(name)!r} there, {now.get(name)!r} here"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]


def load_study(name: str) -> Study:
    """`mini`, a path of a study file, either with `:ARGUMENT` behind it.

    Raises ValueError or FileNotFoundError with what there is.
    """
    name, _, arg = name.partition(":")
    folder = Path(__file__).parent / "studies"
    path = Path(name) if name.endswith(".py") else folder / f"{name}.py"
    if not path.is_file():
        if name.endswith(".py"):
            raise FileNotFoundError(f"no study file {name}")
        raise unknown("study", name, [p.stem for p in folder.glob("*.py")])
    found = runpy.run_path(str(path))
    if "get_study" not in found:
        raise ValueError(f"{path} has no get_study(arg)")
    return found["get_study"](arg or None)
