"""Draws a study's results like the paper's figures, over or beside the paper's results."""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.scaling import figures
from experiments.scaling import study_panels as panels
from experiments.scaling.runner import Store
from experiments.scaling.shapes import pooled_models, scaled_models
from experiments.scaling.study import FAMILIES, Study
from experiments.scaling.style import ORDER, Looks, new_figure, save
from experiments.scaling.table import (
    Point,
    average_tasks,
    grouped,
    kind_of,
    losses_by_rate,
    points,
    write_csv,
)
from vit_jax.config import InputError

Panel = Callable[[Axes], None]
IMAGENET = "ImageNet fine-tuned"


@dataclasses.dataclass(frozen=True)
class Drawing:
    """One of the paper's figures for a study; `lacks` explains missing `own` panels."""

    original: list[Panel]
    own: list[Panel]
    lacks: str
    same_axes: bool = False  # draw over the paper's faded points, for the same task
    size: tuple[float, float] = (4.2, 3.7)  # of a panel, in inches


def draw_study(study: Study, store: Store, folder: Path) -> list[Path]:
    """Draws figures and tables of finished runs; prints why a figure isn't drawn.

    Raises ValueError without finished runs.
    """
    records = store.collect()
    found = points(study, records)
    if not found:
        raise InputError(f"study {study.name} has no finished run: `run` makes them")
    order = list(dict.fromkeys(m.name for grid in study.grids for m in grid.models))
    found.sort(key=lambda p: (order.index(p.model), p.examples, p.images_seen, p.seed, p.task))
    written = [folder / "points.csv"]
    write_csv(written[0], found)
    written += write_tables(found, records, folder)
    for name, drawing in drawings(study, found, records).items():
        shown = [panel for panel in drawing.own if _has_points(panel)]
        if shown:
            written += save(_draw(drawing, shown), folder, f"{study.name}_{name}")
        else:
            print(f"{name}: not drawn, {drawing.lacks}")
    return written


def _draw(drawing: Drawing, shown: list[Panel]) -> Figure:
    if drawing.same_axes:
        figure, axes = new_figure(len(drawing.original), 5.2, 4.2)
        for original, panel, ax in zip(drawing.original, shown, axes, strict=False):
            original(ax)
            fade(ax)
            panel(ax)
            low, high = ax.get_ylim()
            ax.set_ylim(min(low, ax.dataLim.y0 - 1), max(high, ax.dataLim.y1 + 1))
        return _legend_once(figure)
    figure, axes = new_figure(bool(drawing.original) + len(shown), *drawing.size)
    for original in drawing.original[:1]:
        original(axes[0])
        axes[0].set_title("the paper", fontsize=10)
    for panel, ax in zip(shown, axes[bool(drawing.original) :], strict=True):
        panel(ax)
    return _legend_once(figure)


def _legend_once(figure: Figure) -> Figure:
    """Removes legends that tell nothing new after those of the panels before."""
    told: set[str] = set()
    for ax in figure.axes:
        if legend := ax.get_legend():
            entries = {text.get_text() for text in legend.get_texts()}
            if entries <= told:
                legend.remove()
            told |= entries
    return figure


def drawings(study: Study, found: list[Point], records: dict[str, dict]) -> dict[str, Drawing]:
    """Returns the figures by name, each with the paper's and the study's panels."""
    looks = make_looks(study)
    tasks = sorted({p.task for p in found})
    few = [t for t in tasks if t.endswith("-shot")]
    shots = max(map(kind_of, few), key=lambda s: int(s.split("-")[0]), default=None)
    tuned = [t for t in tasks if t.endswith("fine-tuned")]
    kind = shots or (tuned and "fine-tuned") or "upstream"
    average = f"average {kind}"
    both = [average, *[t for t in few if kind_of(t) == kind][:2]]
    everything = found + average_tasks(found, kind)
    largest = max(p.examples for p in found)
    smallest = min(p.examples for p in found if p.examples)
    names = list(dict.fromkeys(p.model for p in found))
    second = IMAGENET if IMAGENET in tuned else "upstream"
    base, scaled = scaled_models(study)

    def at(task: str, examples: int | None = None) -> list[Point]:
        some = [p for p in everything if p.task == task]
        return some if examples is None else [p for p in some if p.examples == examples]

    def training(models: list[str], *dashed: str) -> list[Panel]:
        about = {"records": records, "looks": looks, "models": models, "dashed": dashed}
        sizes = sorted({smallest, largest})
        return [partial(panels.while_training, examples=n, **about) for n in sizes]

    best = "fine-tuned" if tuned else kind
    of_best = [p for p in found if kind_of(p.task) == best and p.examples == largest]
    trained = panels.sets_of({p.set for p in found if p.examples})
    every = {"all": sum(study.groups.values(), ()), **study.groups} if study.groups else {}
    return {
        "figure_2": Drawing(
            [figures.figure_2_panel],
            [
                partial(panels.by_group, found=of_best, looks=looks, tasks=some, name=name)
                for name, some in every.items()
            ],
            "the study has no groups of tasks, or no results on them",
        ),
        "figure_3": Drawing(
            [figures.figure_3_panel],
            [partial(panels.by_set, found=at(t), looks=looks) for t in tuned],
            "nothing is fine-tuned yet",
            same_axes=IMAGENET in tuned and {p.set for p in found} <= set(figures.SETS),
        ),
        "figure_4": Drawing(
            [figures.figure_4_panel],
            [partial(panels.by_size, found=at(t), looks=looks) for t in both],
            "there are no two sizes of the pretraining set yet",
            same_axes=few == ["ImageNet 5-shot"],
        ),
        "figure_5": Drawing(
            [
                partial(figures.figure_5_panel, **about)
                for about in (
                    {"column": "avg5_computed", "title": "average of 5 tasks", "limits": (88, 97)},
                    {"column": "ImageNet", "title": "ImageNet top-1", "limits": (75, 90)},
                )
            ],
            [
                partial(panels.by_compute, found=at(t, largest), looks=looks)
                for t in (average, second)
            ],
            "nothing is evaluated yet",
            same_axes=IMAGENET in tuned and kind == "fine-tuned",
            size=(5.2, 4.2),
        ),
        "figure_8": Drawing(
            [partial(figures.figure_8_panel, metric="Avg5", title="average 5-shot", base=68.2)],
            [
                partial(panels.by_shape, found=at(t, largest), base=base, scaled=scaled, task=t)
                for t in both
            ],
            "no two ViTs of the study differ in depth, width, MLP or patch alone",
        ),
        "figure_9": Drawing(
            [figures.figure_9_panel],
            training(pooled_models(study), "-", "--", "-."),
            "no two models of the study differ in model.pool alone, or none has several "
            "evaluations",
        ),
        "figure_12": Drawing(
            [figures.figure_12_panel],
            [partial(panels.by_speed, found=found, looks=looks)],
            "",
        ),
        "figure_13": Drawing(
            [partial(figures.figure_13_panel, **figures.FIGURE_13[0])],
            [
                partial(panels.against, found=at(average, largest), looks=looks, speed=speed)
                for speed in (False, True)
            ],
            "nothing is evaluated yet",
        ),
        "training": Drawing([], training(names, "-"), "nothing is evaluated several times"),
        "rates": Drawing(
            [],
            [
                partial(panels.by_rate, models=models, name=name, trained=trained, looks=looks)
                for name, models in losses_by_rate(records.values()).items()
            ],
            "no model is pretrained with several learning rates",
        ),
    }


def make_looks(study: Study) -> Looks:
    """Returns styles for the paper's models, then the study's in the order of its file."""
    models = {m.name: m.family for grid in study.grids for m in grid.models}
    if all(name in names for name, f in models.items() for names in [ORDER[f]]):
        return figures.LOOKS
    return Looks({f: [m for m, family in models.items() if family == f] for f in FAMILIES})


def _has_points(panel: Panel) -> bool:
    figure, axes = new_figure(1)
    panel(axes[0])
    drawn = axes[0].has_data()
    plt.close(figure)
    return drawn


def fade(axes: Axes) -> None:
    """Fades the points drawn so far to a background."""
    for artist in (*axes.lines, *axes.collections):
        artist.set_alpha(0.3)
    for text in list(axes.texts):
        text.remove()
    if axes.get_legend():
        axes.get_legend().remove()


def best_rates(records: dict[str, dict]) -> list[dict[str, str]]:
    """Returns a row for each sweep and model: its best peak learning rate, by the last loss."""
    rows = []
    for name, models in losses_by_rate(records.values()).items():
        for model, rates in models.items():
            best = min(rates, key=lambda rate: np.mean(rates[rate]))
            seeds = min(map(len, rates.values()))
            by_seed = (min(rates, key=lambda rate: rates[rate][i]) for i in range(seeds))
            rows.append(
                {
                    "sweep": name,
                    "model": model,
                    "best rate": f"{best:g}",
                    "loss": f"{np.mean(rates[best]):.3f}",
                    "best rate of each seed": ", ".join(f"{rate:g}" for rate in by_seed),
                }
            )
    return rows


def write_tables(found: list[Point], records: dict[str, dict], folder: Path) -> list[Path]:
    """Writes Table 5 (fine-tuned, by set and task), Table 6 (by model and budget), best rates."""
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
    tables = {"table5": table_5, "table6": table_6, "rates": best_rates(records)}
    for name, rows in tables.items():
        if rows:
            write_csv(folder / f"{name}.csv", rows)
            written += [folder / f"{name}.csv", figures.write_markdown(folder / f"{name}.md", rows)]
    return written
