"""Draws the panels of a study's figures, like those of arXiv 2010.11929."""

import itertools
from collections import Counter
from collections.abc import Callable
from itertools import cycle

import numpy as np
from matplotlib.axes import Axes

from experiments.scaling import figures
from experiments.scaling.style import (
    HUES,
    Looks,
    compact,
    family_legend,
    label_ends,
    label_points,
    log_axis,
)
from experiments.scaling.table import Point, average_tasks, grouped, kind_of


def _line(axes: Axes, model: str, x: list, values: list, looks: Looks, dashes: str = "-") -> tuple:
    """Draws the mean over seeds of `values` [x][seed], with a band from lowest to highest."""
    means = [float(np.mean(v)) for v in values]
    lows, highs = [min(v) for v in values], [max(v) for v in values]
    axes.plot(x, means, dashes, **looks.style(model))
    axes.fill_between(x, lows, highs, color=looks.colour(model), alpha=0.22, lw=0)
    if len(x) == 1:  # a band would be invisible
        axes.vlines(x, lows, highs, color=looks.colour(model), lw=1.6)
    return model, x[-1], means[-1], looks.colour(model)


def _curves(
    axes: Axes, found: list[Point], looks: Looks, x: Callable[[Point], float]
) -> list[tuple]:
    """Draws one line per model."""
    ends = []
    for model, of_model in grouped(found, lambda p: p.model).items():
        cells = sorted(grouped(of_model, x).items())
        values = [[p.accuracy for p in cell] for _, cell in cells]
        ends.append(_line(axes, model, [at for at, _ in cells], values, looks))
    return ends


def by_size(axes: Axes, found: list[Point], looks: Looks) -> None:
    """Draws Figure 4: accuracy against pretraining set size, at the most common budget."""
    budgets = grouped([p for p in found if p.examples], lambda p: p.budget)
    sizes = {budget: len({p.examples for p in of}) for budget, of in budgets.items()}
    if max(sizes.values(), default=0) < 2:
        return
    of = budgets[max(sizes, key=sizes.get)]
    ends = _curves(axes, of, looks, lambda p: p.examples)
    axes.set_xscale("log")
    ticks = sorted({p.examples for p in of})
    axes.set_xticks(ticks, [compact(n) for n in ticks])
    axes.minorticks_off()
    _describe(axes, of, "images for pretraining", f"{of[0].budget}; ")
    label_ends(axes, ends)


def by_compute(axes: Axes, found: list[Point], looks: Looks) -> None:
    """Draws Figure 5: accuracy against compute, with one line per model over budgets."""
    if not found:
        return
    ends = _curves(axes, found, looks, lambda p: p.exaflops)
    log_axis(axes)
    _describe(axes, found, "pretraining compute (exaFLOPs)", "a point per budget; ")
    family_legend(axes, [f for f in HUES if any(p.family == f for p in found)], loc="best")
    _label_marks(axes, ends)


def longest(found: list[Point]) -> str:
    """Returns the largest budget."""
    return max(found, key=lambda p: p.images_seen).budget


def by_set(axes: Axes, found: list[Point], looks: Looks) -> None:
    """Draws Figure 3: accuracy by pretraining set."""
    if not found:
        return
    by_size = sorted(found, key=lambda p: p.examples)
    sets = list(dict.fromkeys(p.set for p in by_size))
    if set(sets) <= set(figures.SETS):
        sets = list(figures.SETS)
    cells = grouped(found, lambda p: (p.model, p.set)).values()
    of = [p for cell in cells for p in cell if p.budget == longest(cell)]
    ends = _curves(axes, of, looks, lambda p: sets.index(p.set))
    axes.set_xticks(range(len(sets)), [name.replace(" ", "\n") for name in sets])
    _describe(axes, of, "pretraining set", "longest budget; ")
    label_ends(axes, ends)


def while_training(
    axes: Axes,
    records: dict[str, dict],
    looks: Looks,
    examples: int,
    models: list[str],
    dashed: tuple[str, ...] = ("-",),
) -> None:
    """Draws Figure 9: few-shot accuracy during pretraining, at the most common budget.

    The accuracy is the mean over datasets at the largest number of shots.
    """
    runs = [
        r
        for r in records.values()
        if r["status"] == "done" and r["kind"] == "pretrain" and r["labels"]["model"] in models
        if r["labels"]["examples"] == examples and len(r["evaluations"]) > 1
    ]
    budgets = Counter(r["labels"]["budget"] for r in runs)
    curves: dict[str, list[dict[int, float]]] = {}
    for record in [r for r in runs if r["labels"]["budget"] == max(budgets, key=budgets.get)]:
        labels, evaluations = record["labels"], record["evaluations"]
        metrics = sorted(k for k in evaluations[0] if k.endswith("shot"))
        most = max(metrics, key=lambda k: int(k.split("/")[1].removesuffix("shot")), default=None)
        metrics = [k for k in metrics if most and k.split("/")[1] == most.split("/")[1]]
        if metrics:
            curve = {e["step"]: 100 * float(np.mean([e[k] for k in metrics])) for e in evaluations}
            curves.setdefault(labels["model"], []).append(curve)
    ends = []
    for model, dashes in zip([m for m in models if m in curves], cycle(dashed), strict=False):
        steps = sorted(set.intersection(*map(set, curves[model])))
        values = np.array([[curve[s] for s in steps] for curve in curves[model]])
        ends.append(_line(axes, model, steps, values.T, looks, dashes))
    if ends:
        axes.set(xlabel="steps of pretraining", ylabel="average few-shot (%)")
        counts = [len(curves[name]) for name, *_ in ends]
        of = {r["labels"]["set"] for r in runs}
        _title(axes, f"pretrained on {sets_of(of)}", _seeds(counts))
        label_ends(axes, ends)


def by_rate(
    axes: Axes, models: dict[str, dict[float, list]], name: str, trained: str, looks: Looks
) -> None:
    """Draws the last loss against the peak learning rate, a line per model, its best rate ringed.

    `models` is {model: {rate: losses of seeds}}. Rates at which a seed diverged are left out.
    """
    ends = []
    for model in [m for m in looks.family if m in models]:
        rates = {rate: of for rate, of in models[model].items() if max(of) < np.inf}
        if not rates:
            continue
        ends.append(_line(axes, model, [*rates], [*rates.values()], looks))
        best = min(rates, key=lambda rate: np.mean(rates[rate]))
        at = [best], [np.mean(rates[best])]
        axes.scatter(*at, s=150, facecolors="none", edgecolors=[looks.colour(model)], zorder=3)
    if ends:
        axes.set_xscale("log")
        axes.set(xlabel="peak learning rate", ylabel="last loss")
        counts = [len(of) for rates in models.values() for of in rates.values()]
        _title(axes, f"{name}: pretrained on {trained}", f"ring: best rate; {_seeds(counts)}")
        axes.legend(axes.lines, [model for model, *_ in ends])


def by_speed(axes: Axes, found: list[Point], looks: Looks) -> None:
    """Draws Figure 12: images per second in training."""
    speeds = speed_of(found)
    names = sorted(speeds, key=speeds.get)
    figures.bars(axes, names, [speeds[n] for n in names], looks, "training, images / s here")
    _title(axes, _pretrained(found), "fastest run of each model")


def speed_of(found: list[Point]) -> dict[str, float]:
    """Returns images per second in training of each model's fastest run."""
    models = grouped(found, lambda p: p.model)
    return {model: max(p.img_per_sec for p in of) for model, of in models.items()}


def by_group(
    axes: Axes, found: list[Point], looks: Looks, tasks: tuple[str, ...], name: str
) -> None:
    """Draws Figure 2: mean accuracy over a group's tasks per model, at the longest budget."""
    found = [p for p in found if p.task.rpartition(" ")[0] in tasks]
    if not found:
        return
    models = grouped(average_tasks(found, kind_of(found[0].task)), lambda p: p.model)
    values = [[p.accuracy for p in of if p.budget == longest(of)] for of in models.values()]
    means = np.array([np.mean(v) for v in values])
    ends = np.array([(min(v), max(v)) for v in values]).T
    colours = [looks.colour(model) for model in models]
    figures.columns(axes, list(models), means, colours, np.abs(ends - means))
    axes.set(ylabel=f"{kind_of(found[0].task)} (%)")
    counts = [len(v) for v in values]
    task = f"{name}: {', '.join(tasks)}"
    _title(axes, f"{task}, {_pretrained(found)}", f"longest budget; {_seeds(counts)}")


def by_shape(axes: Axes, found: list[Point], base: str, scaled: dict[str, str], task: str) -> None:
    """Draws Figure 8: accuracy against compute per image, relative to the base model."""
    models = grouped(found, lambda p: p.model)
    if base not in models:
        return
    budgets = [b for b in {p.budget for p in models[base]}]
    budget = max(budgets, key=lambda b: sum(p.budget == b for p in found))

    def at(model: str) -> tuple[float, float]:
        of = [p for p in models[model] if p.budget == budget]
        return of[0].exaflops / of[0].images_seen, float(np.mean([p.accuracy for p in of]))

    unit, accuracy = at(base)
    lines: dict[str, list[tuple[float, float]]] = {}
    for model, axis in scaled.items():
        if any(p.budget == budget for p in models.get(model, ())):
            flops, value = at(model)
            lines.setdefault(axis, []).append((flops / unit, value))
    if lines:
        figures.scaled(axes, lines, accuracy, f"{task} (%)")
        of = [p for p in found if p.budget == budget]
        _title(axes, f"{base} scaled, {_pretrained(of)}", budget)


def against(axes: Axes, found: list[Point], looks: Looks, speed: bool) -> None:
    """Draws Figure 13: accuracy at the longest budget against compute or speed."""
    speeds, ends, shown = speed_of(found), [], []
    for model, of in grouped(found, lambda p: p.model).items():
        cell = [p for p in of if p.budget == longest(of)]
        x = speeds[model] if speed else cell[0].exaflops
        ends.append(_line(axes, model, [x], [[p.accuracy for p in cell]], looks))
        shown += cell
    if ends:
        log_axis(axes)
        x = "training, images / s here" if speed else "pretraining compute (exaFLOPs)"
        _describe(axes, shown, x, "longest budgets; ")
        _label_marks(axes, ends)


def _seeds(counts: list[int]) -> str:
    several = f"{min(counts)} to {max(counts)}" if min(counts) < max(counts) else f"{counts[0]}"
    return f"seeds: {several}" + (", band: lowest to highest" if max(counts) > 1 else "")


def _describe(axes: Axes, found: list[Point], x: str, budget: str) -> None:
    counts = [len(of) for of in grouped(found, lambda p: (p.model, p.set, p.budget)).values()]
    axes.set(xlabel=x, ylabel=f"{found[0].task} (%)")
    _title(axes, _pretrained(found), budget + _seeds(counts))


def _title(axes: Axes, trained: str, details: str) -> None:
    """Says what was trained, then how long and how often."""
    axes.set_title(f"{trained}\n{details}", fontsize=8)


def _pretrained(found: list[Point]) -> str:
    return f"pretrained on {sets_of({p.set for p in found if p.examples})}"


def sets_of(names: set[str]) -> str:
    """The name of one set, or the words that several begin with: "strokes" of "strokes 500"."""
    words = [name.split() for name in sorted(names)]
    common = list(itertools.takewhile(lambda at: len(set(at)) == 1, zip(*words, strict=False)))
    return " ".join(at[0] for at in common) or f"{len(names)} sets"


def _label_marks(axes: Axes, ends: list[tuple]) -> None:
    names, x, y, colours = zip(*ends, strict=True)
    marks = np.concatenate([line.get_xydata() for line in axes.lines])
    label_points(axes, names, x, y, marks=marks, colours=colours)
