"""A study's own results in the forms of the paper's figures, over the paper's or beside them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from experiments.scaling import figures
from experiments.scaling.runner import Store
from experiments.scaling.study import FAMILIES, Study
from experiments.scaling.style import (
    HUES,
    ORDER,
    Looks,
    compact,
    family_legend,
    label_ends,
    new_figure,
    save,
)
from experiments.scaling.table import Point, average_tasks, grouped, kind_of, points, write_csv

Panel = Callable[[Axes], None]


def draw_study(study: Study, store: Store, folder: Path) -> list[Path]:
    """Figures and tables of what is done; a figure without points is left out, and said so.

    Raises ValueError if nothing is done.
    """
    records = store.collect()
    found = points(study, records)
    if not found:
        raise ValueError(f"study {study.name} has no finished run: `run` makes them")
    order = list(dict.fromkeys(m.name for grid in study.grids for m in grid.models))
    found.sort(key=lambda p: (order.index(p.model), p.examples, p.images_seen, p.seed, p.task))
    looks = make_looks(study)
    written = [folder / "points.csv"]
    write_csv(written[0], found)
    written += write_tables(found, folder)
    few = [t for t in sorted({p.task for p in found}) if t.endswith("-shot")]
    shots = max(map(kind_of, few), key=lambda s: int(s.split("-")[0]), default=None)
    tuned = [t for t in sorted({p.task for p in found}) if t.endswith("fine-tuned")]
    kind = shots or (tuned and "fine-tuned") or "upstream"
    averaged = average_tasks(found, kind)
    largest = max(p.examples for p in found)
    imagenet = "ImageNet fine-tuned"
    second = imagenet if imagenet in tuned else "upstream"

    def at(task: str) -> list[Point]:
        return averaged if task.startswith("average") else [p for p in found if p.task == task]

    drawings: dict[str, list[Panel]] = {
        "figure_3": [lambda a, t=t: by_set(a, at(t), looks) for t in tuned],
        "figure_4": [
            lambda a, t=t: by_size(a, at(t), looks)
            for t in (f"average {kind}", *[t for t in few if kind_of(t) == kind][:2])
        ],
        "figure_5": [
            lambda a, t=t: by_compute(a, [p for p in at(t) if p.examples == largest], looks)
            for t in (f"average {kind}", second)
        ],
        "figure_9": [
            lambda a, n=n: while_training(a, records, study, looks, n)
            for n in sorted({min(p.examples for p in found), largest})
        ],
        "figure_12": [lambda a: by_speed(a, found, looks)],
    }  # fmt: skip
    originals: dict[str, list[Panel]] = {
        "figure_3": [figures.figure_3_panel],
        "figure_4": [figures.figure_4_panel],
        "figure_5": [
            lambda a: figures.figure_5_panel(a, "avg5_computed", "average of 5 tasks", (88, 97)),
            lambda a: figures.figure_5_panel(a, "ImageNet", "ImageNet top-1", (75, 90)),
        ],
        "figure_9": [figures.figure_9_panel],
        "figure_12": [figures.figure_12_panel],
    }
    same_axes = {
        "figure_3": imagenet in tuned and {p.set for p in found} <= set(figures.SETS),
        "figure_4": few == ["ImageNet 5-shot"],
        "figure_5": imagenet in tuned and kind == "fine-tuned",
    }
    for name, all_panels in drawings.items():
        panels = [panel for panel in all_panels if _has_points(panel)]
        if not panels:
            print(f"{name}: no points yet")
        elif same_axes.get(name):
            figure, axes = new_figure(len(originals[name]), 5.2, 4.2)
            for original, panel, ax in zip(originals[name], panels, axes, strict=False):
                original(ax)
                fade(ax)
                panel(ax)
                low, high = ax.get_ylim()
                ax.set_ylim(min(low, ax.dataLim.y0 - 1), max(high, ax.dataLim.y1 + 1))
            written += save(figure, folder, f"{study.name}_{name}")
        else:
            figure, axes = new_figure(1 + len(panels), 4.0, 3.7)
            originals[name][0](axes[0])
            axes[0].set_title("the paper", fontsize=10)
            for panel, ax in zip(panels, axes[1:], strict=True):
                panel(ax)
            written += save(figure, folder, f"{study.name}_{name}")
    return written


def make_looks(study: Study) -> Looks:
    """The study's models behind the paper's, in the order of the study file."""
    models = {m.name: m.family for grid in study.grids for m in grid.models}
    if all(name in names for name, f in models.items() for names in [ORDER[f]]):
        return figures.LOOKS
    return Looks({f: [m for m, family in models.items() if family == f] for f in FAMILIES})


def _has_points(panel: Panel) -> bool:
    figure, axes = new_figure(1)
    panel(axes[0])
    drawn = axes[0].has_data()
    figure.clear()
    return drawn


def fade(axes: Axes) -> None:
    """Leaves the paper's points as a background."""
    for artist in (*axes.lines, *axes.collections):
        artist.set_alpha(0.3)
    for text in list(axes.texts):
        text.remove()
    if axes.get_legend():
        axes.get_legend().remove()


def spread(of: list[Point]) -> tuple[float, float, float]:
    """Mean, lowest and highest of the seeds."""
    values = [p.accuracy for p in of]
    return float(np.mean(values)), min(values), max(values)


def _curves(
    axes: Axes, found: list[Point], looks: Looks, x: Callable[[Point], float]
) -> list[tuple]:
    """A line a model, over its seeds' means, in a band from the lowest to the highest seed."""
    ends = []
    for model, of_model in grouped(found, lambda p: p.model).items():
        cells = sorted(grouped(of_model, x).items())
        means, lows, highs = np.array([spread(c) for _, c in cells]).T
        at = [value for value, _ in cells]
        axes.plot(at, means, **looks.style(model))
        axes.fill_between(at, lows, highs, color=looks.colour(model), alpha=0.18, lw=0)
        ends.append((model, at[-1], means[-1], looks.colour(model)))
    return ends


def by_size(axes: Axes, found: list[Point], looks: Looks) -> None:
    """Figure 4: accuracy against the size of the pretraining set, at the budget most common."""
    if not found:
        return
    budgets = grouped(found, lambda p: p.budget)
    sizes = {budget: len({p.examples for p in of}) for budget, of in budgets.items()}
    of = budgets[max(sizes, key=sizes.get)]
    ends = _curves(axes, of, looks, lambda p: p.examples)
    axes.set_xscale("log")
    ticks = sorted({p.examples for p in of})
    axes.set_xticks(ticks, [compact(n) for n in ticks])
    axes.minorticks_off()
    _describe(axes, of, "images for pretraining", of[0].budget)
    label_ends(axes, ends)


def by_compute(axes: Axes, found: list[Point], looks: Looks) -> None:
    """Figure 5: accuracy against compute; a model's budgets are joined."""
    if not found:
        return
    ends = _curves(axes, found, looks, lambda p: p.exaflops)
    axes.set_xscale("log")
    _describe(axes, found, "pretraining compute (exaFLOPs)", found[0].set)
    label_ends(axes, ends)
    family_legend(axes, [f for f in HUES if any(p.family == f for p in found)], loc="lower right")


def longest(found: list[Point]) -> str:
    """The largest budget."""
    return max(found, key=lambda p: p.images_seen).budget


def by_set(axes: Axes, found: list[Point], looks: Looks) -> None:
    """Figure 3: accuracy against the pretraining set, as categories."""
    if not found:
        return
    by_size = sorted(found, key=lambda p: p.examples)
    sets = list(dict.fromkeys(p.set for p in by_size))
    if set(sets) <= set(figures.SETS):
        sets = list(figures.SETS)
    cells = grouped(found, lambda p: (p.model, p.set)).values()
    of = [p for cell in cells for p in cell if p.budget == longest(cell)]
    ends = _curves(axes, of, looks, lambda p: sets.index(p.set))
    axes.set_xticks(range(len(sets)), sets)
    _describe(axes, of, "pretraining set", "longest budget")
    label_ends(axes, ends)


def while_training(
    axes: Axes, records: dict[str, dict], study: Study, looks: Looks, examples: int
) -> None:
    """Figure 9: few-shot accuracy (the mean over sets of the most shots) while pretraining."""
    curves: dict[str, list[dict[int, float]]] = {}
    for record in records.values():
        if record["status"] != "done" or record["kind"] != "pretrain":
            continue
        labels, evaluations = record["labels"], record["evaluations"]
        if labels["examples"] != examples or len(evaluations) < 2:
            continue
        metrics = sorted(k for k in evaluations[0] if k.endswith("shot"))
        most = max(metrics, key=lambda k: int(k.split("/")[1].removesuffix("shot")), default=None)
        metrics = [k for k in metrics if most and k.split("/")[1] == most.split("/")[1]]
        if metrics:
            curve = {e["step"]: 100 * float(np.mean([e[k] for k in metrics])) for e in evaluations}
            curves.setdefault(labels["model"], []).append(curve)
    ends = []
    for model, seeds in curves.items():
        steps = sorted(set.intersection(*(set(curve) for curve in seeds)))
        means = [float(np.mean([curve[s] for curve in seeds])) for s in steps]
        axes.plot(steps, means, **looks.style(model))
        ends.append((model, steps[-1], means[-1], looks.colour(model)))
    if ends:
        axes.set(xlabel="steps of pretraining", ylabel="average few-shot (%)")
        axes.set_title(f"{study.name}: {examples:,} images", fontsize=10)
        label_ends(axes, ends)


def by_speed(axes: Axes, found: list[Point], looks: Looks) -> None:
    """Figure 12: images a second in training, the fastest run of each model."""
    speeds = {
        model: max(p.img_per_sec for p in of)
        for model, of in grouped(found, lambda p: p.model).items()
    }
    names = sorted(speeds, key=speeds.get)
    figures.bars(axes, names, [speeds[n] for n in names], looks, "training, images / s here")


def _describe(axes: Axes, found: list[Point], x: str, title: str) -> None:
    counts = [len(of) for of in grouped(found, lambda p: (p.model, p.set, p.budget)).values()]
    axes.set(xlabel=x, ylabel=f"{found[0].task} (%)")
    several = f"{min(counts)} to {max(counts)}" if min(counts) < max(counts) else f"{counts[0]}"
    band = ", band: lowest to highest" if max(counts) > 1 else ""
    axes.set_title(f"{title}; seeds: {several}{band}", fontsize=8)


def write_tables(found: list[Point], folder: Path) -> list[Path]:
    """Table 5 (fine-tuned, by set and task) and Table 6 (a row a model and budget)."""
    written = []
    tuned = [p for p in found if p.task.endswith("fine-tuned")]
    models = list(dict.fromkeys(p.model for p in found))

    def cell(of: list[Point]) -> str:
        values = [p.accuracy for p in of]
        if not values:
            return ""
        deviation = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
        return f"{np.mean(values):.2f}{deviation}"

    table_5 = [
        {
            "pretrain": where,
            "downstream": task.removesuffix(" fine-tuned"),
            **{m: cell([p for p in of if p.model == m]) for m in models},
        }
        for (where, task), of in grouped(tuned, lambda p: (p.set, p.task)).items()
    ]
    tasks = sorted({p.task for p in found})
    cells = grouped(found, lambda p: (p.model, p.set, p.budget))
    table_6 = [
        {
            "name": model,
            "set": where,
            "budget": budget,
            "exaFLOPs": f"{of[0].exaflops:.4g}",
            "seeds": len({p.seed for p in of}),
            **{task: cell([p for p in of if p.task == task]) for task in tasks},
        }
        for (model, where, budget), of in cells.items()
    ]
    for name, rows in (("table5", table_5), ("table6", table_6)):
        if rows:
            write_csv(folder / f"{name}.csv", rows)
            written += [folder / f"{name}.csv", figures.write_markdown(folder / f"{name}.md", rows)]
    return written
