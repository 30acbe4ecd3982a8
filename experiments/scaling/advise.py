"""Advises what to train for a budget: model, images, steps, learning rate, expected accuracy."""

import argparse
import math
from typing import Any

from experiments.scaling.extrapolate import LEVEL, REACH, Cell, Predictor, calibrate, make_cells
from experiments.scaling.findings import paper_points
from experiments.scaling.runner import Store
from experiments.scaling.study import Study, expand, load_study
from experiments.scaling.table import Point, grouped, points
from vit_jax.config import InputError, unknown
from vit_jax.costs.report import run_report
from vit_jax.costs.topology import Topology, parse_topology


def show_advice(study: Study | None, store: Store | None, options: argparse.Namespace) -> None:
    """Prints the advice for `options.budget` chip-hours; without a study from the paper's numbers.

    Raises ValueError for a budget or a number of images that the data don't reach.
    """
    topology = parse_topology(options.topology)
    if not (options.budget > 0 and 0 < options.mfu <= 1):
        raise InputError(
            f"budget = {options.budget:g} chip-hours, mfu = {options.mfu:g}: expected more than 0, "
            "and an mfu of at most 1"
        )
    found = points(study, store.records()) if study else paper_points()
    found = [p for p in found if p.examples and p.exaflops > 0]
    if not found:
        raise InputError(f"study {study.name} has no finished run: `run` makes them")
    source = f"the results of study {study.name}" if study else "Table 6 of the paper"
    found, notes = on_images(found, options.images)
    cells = grouped(make_cells(found), lambda c: c.task)
    usual = [task for task in ("upstream", "ImageNet") if task in cells]
    task = options.task or [*usual, *cells][0]
    if task not in cells:
        raise unknown("task", task, cells)
    compute = affordable(options.budget, topology, options.mfu, cells[task])
    predictor, reason = best_predictor([c for of in cells.values() for c in of])
    target, expected = choose(cells[task], compute, predictor)
    recipe = recipe_of(study or load_study("paper_models"), target.model)
    batch_size, steps = recipe["batch_size"], math.ceil(target.data / recipe["batch_size"])
    flops = 1e18 * target.size * batch_size
    report = run_report(topology, flops=flops, batch_size=batch_size, steps=steps, mfu=options.mfu)

    print(f"for {options.budget:,g} chip-hours of {topology.chip.name} on {topology}:")
    print(f"  model          {target.model}")
    epochs = target.data / found[0].examples
    print(f"  images         {target.data:,.0f}, {epochs:.3g} epochs of {found[0].set}")
    print(f"  steps          {steps:,} of {batch_size:,} images")
    print(f"  learning rate  {recipe['schedule']['peak']:g}")
    print(
        f"  cost           {target.scale:,.4g} exaFLOPs, {report['chip_hours']:,.4g} chip-hours, "
        f"{report['days']:,.3g} days at an assumed MFU of {options.mfu:.0%}"
    )
    if expected is None:
        notes.append(f"expected accuracy: the data don't say: {reason}")
    else:
        error, low, high = expected
        print(
            f"  accuracy       {1 - error:.1%} expected on {task}, {LEVEL:.0%} interval "
            f"{1 - high:.1%} to {1 - low:.1%}"
        )
    models = grouped(cells[task], lambda c: c.model)
    print(f"based on {source}: {len(cells[task])} budgets of {len(models)} models")
    times = target.data / max(cell.data for cell in models[target.model])
    if times > 1.5:
        notes.append(f"this is {times:.2g} times as long as the model's longest run")
    if expected is not None:
        print(predictor.describe())
    notes.append(
        "learning rate and batch size are the model's in those runs, which don't vary them"
    )
    for note in notes:
        print(f"note: {note}")


def on_images(found: list[Point], images: int | None) -> tuple[list[Point], list[str]]:
    """Returns the points of the largest pretraining set with at most `images`, and what to note."""
    sizes = sorted({p.examples for p in found})
    within = [size for size in sizes if images is None or size <= images]
    if not within:
        raise InputError(
            f"images = {images:,}: the smallest pretraining set of the data has {sizes[0]:,}, they "
            "say nothing of fewer"
        )
    notes = []
    if images is not None and images != within[-1]:
        notes.append(f"based on sets of {within[-1]:,} images; no run tells what {images:,} add")
    return [p for p in found if p.examples == within[-1]], notes


def affordable(budget: float, topology: Topology, mfu: float, cells: list[Cell]) -> float:
    """Returns the exaFLOPs of a budget in chip-hours; ValueError if no run is near them."""
    per_hour = topology.chip.peak_flops * mfu * 3600 / 1e18
    compute, scales = budget * per_hour, [cell.scale for cell in cells]
    smallest, largest = min(scales), REACH * max(scales)
    if not 0.999 * smallest <= compute <= 1.001 * largest:
        where = "below the smallest run", f"beyond {REACH} times the largest run"
        raise InputError(
            f"budget = {budget:g} chip-hours, {compute:.3g} exaFLOPs at an MFU of {mfu:.0%}: "
            f"{where[compute > smallest]} of the data, which say nothing there; expected "
            f"{smallest / per_hour:.3g} to {largest / per_hour:.3g} chip-hours"
        )
    return compute


def best_predictor(cells: list[Cell]) -> tuple[Predictor | None, str]:
    """Returns a predictor of models in the data, else of other models, else why there is none."""
    for known in (True, False):
        try:
            return calibrate(cells, known), ""
        except InputError as problem:
            reason = str(problem)
    return None, reason


def choose(
    cells: list[Cell], compute: float, predictor: Predictor | None
) -> tuple[Cell, tuple[float, float, float] | None]:
    """Returns the model for a compute, trained that long, and its (error, low, high).

    Only models with a run of at least a tenth of the compute are considered. Among models that the
    predictor can't tell apart it's the one with a run nearest to the compute. Without a prediction
    it's the one that was best within the compute.
    """
    tried = {cell.model for cell in cells if compute <= 1.001 * REACH * cell.scale}

    def distance(cell):
        return abs(math.log(cell.scale / compute))

    nearest = {c.model: c for c in sorted(cells, key=distance, reverse=True)}
    longer = [c.times(compute / c.scale) for c in nearest.values() if c.model in tried]
    expected = {}
    for target in longer if predictor else ():
        try:
            expected[target.model] = predictor(cells, target)
        except InputError:  # said by the caller if it's so for all
            continue
    if not expected:
        within = [c for c in cells if c.scale <= 1.001 * compute and c.model in tried]
        best = min(within, key=lambda c: c.error)
        return best.times(compute / best.scale), None
    least = min(error for error, _, _ in expected.values())
    alike = [t for t in longer if t.model in expected and expected[t.model][0] < 1.001 * least]
    target = min(alike, key=lambda t: distance(nearest[t.model]))
    return target, expected[target.model]


def recipe_of(study: Study, model: str) -> dict[str, Any]:
    """Returns the config of the model's runs."""
    name = model.replace("ResNet", "R")
    return next(dict(r.config) for r in expand(study) if r.labels["model"] in (model, name))
