"""The size of a model, and the images, that are best for a budget: isoflop curves with intervals.

With a compute of C = N D a model of N FLOPs per image sees D images. The error E = c + A N^-a +
B D^-b (arXiv 2203.15556, equation 2) is fitted to the runs of one family on one task, and its
minimum over N at a given C is the best size. Intervals are those of a bootstrap over models and
seeds. Only sizes between the smallest and the largest trained model are considered.
"""

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments.scaling.extrapolate import LEVEL, Cell, predict, resampled
from experiments.scaling.style import HUES, log_axis, new_figure, save
from experiments.scaling.table import grouped
from vit_jax.config import InputError

FORM = "sum"
BUDGETS, SIZES = 4, 65  # per curve
FEWEST_SIZES, SAMPLES = 3, 100
GIGA = 1e9  # FLOPs per image, from exaFLOPs


@dataclasses.dataclass(frozen=True)
class Optimum:
    """The best size at a compute.

    Attributes:
      compute: exaFLOPs.
      size: GFLOPs of training per image of the best model.
      interval: of the size.
      error: at the best size, in (0, 1).
      at_end: whether the best size is the smallest or the largest trained model's.
      curve: errors at `sizes`.
      sizes: GFLOPs per image.
    """

    compute: float
    size: float
    interval: tuple[float, float]
    error: float
    at_end: bool
    curve: np.ndarray
    sizes: np.ndarray

    @property
    def images(self) -> float:
        return self.compute * GIGA / self.size

    def describe(self) -> str:
        low, high = self.interval
        note = ", the end of what was trained" if self.at_end else ""
        return (
            f"{_shown(self.compute)} exaFLOPs: {_shown(self.size)} GFLOPs per image ({_shown(low)} "
            f"to {_shown(high)}){note}, {self.images:.2e} images, accuracy {1 - self.error:.1%}"
        )


def _shown(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def optima(cells: Sequence[Cell], samples: int = SAMPLES) -> list[Optimum]:
    """Returns the best sizes at some computes, for cells of one task and family.

    Raises ValueError if the runs are too few to tell.
    """
    trained = sorted({cell.size for cell in cells})
    if len(trained) < FEWEST_SIZES:
        raise InputError(f"{len(trained)} sizes of models, expected at least {FEWEST_SIZES}")
    sizes = np.geomspace(trained[0], trained[-1], SIZES)
    scales = sorted(cell.scale for cell in cells)
    computes = np.geomspace(scales[len(scales) // 4], scales[-1], BUDGETS)
    targets = [
        dataclasses.replace(cells[0], size=size, data=compute / size, scale=compute)
        for compute in computes
        for size in sizes
    ]
    curves = predict(FORM, cells, targets).reshape(BUDGETS, SIZES)
    drawn = []
    for some in resampled(cells, samples):
        with contextlib.suppress(InputError):  # too few different runs were drawn
            drawn.append(predict(FORM, some, targets).reshape(BUDGETS, SIZES).argmin(axis=1))
    if len(drawn) < samples / 4:
        raise InputError("too few resamples of the runs determine a best size: add models")
    tail = (1 - LEVEL) / 2
    ends = GIGA * np.quantile(sizes[np.array(drawn)], [tail, 1 - tail], axis=0)
    return [
        Optimum(
            compute=float(compute),
            size=GIGA * sizes[best],
            interval=(low, high),
            error=float(curve[best]),
            at_end=best in (0, SIZES - 1),
            curve=curve,
            sizes=GIGA * sizes,
        )
        for compute, curve, best, low, high in zip(
            computes, curves, curves.argmin(axis=1), *ends, strict=True
        )
    ]


def show_isoflops(cells: Sequence[Cell], folder: Path) -> dict[str, list[dict]]:
    """Prints the best sizes of each task and family, draws their curves, and returns the values."""
    found, unknown = {}, {}
    for (task, family), of in grouped(cells, lambda c: (c.task, c.family)).items():
        try:
            found[task, family] = optima(of)
        except InputError as problem:
            unknown.setdefault(str(problem), []).append(f"{family} on {task}")
    for (task, family), of_task in found.items():
        print(f"\nbest size of a {family} on {task}")
        for optimum in of_task:
            print(f"  {optimum.describe()}")
    for problem, names in unknown.items():
        print(f"\nno best size of {', '.join(names)}: {problem}")
    if found:
        draw_isoflops(found, cells, folder)
    return {
        f"{task}: {family}": [
            {
                "exaflops": o.compute,
                "gflops_per_image": o.size,
                "interval": o.interval,
                "images": o.images,
                "error": o.error,
                "at_end": o.at_end,
            }
            for o in of_task
        ]
        for (task, family), of_task in found.items()
    }


def draw_isoflops(
    found: dict[tuple[str, str], list[Optimum]], cells: Sequence[Cell], folder: Path
) -> list[Path]:
    """Draws a panel for each task and family: a curve per budget, its minimum with the interval."""
    figure, axes = new_figure(len(found))
    for ax, ((task, family), of_task) in zip(axes, found.items(), strict=True):
        for rank, optimum in enumerate(of_task):
            shade = 0.35 + 0.65 * rank / max(len(of_task) - 1, 1)
            style = {"color": HUES[family], "alpha": shade}
            label = f"{_shown(optimum.compute)} exaFLOPs"
            ax.plot(optimum.sizes, 100 * optimum.curve, label=label, **style)
            ax.plot(optimum.size, 100 * optimum.error, "o", **style)
            ax.hlines(100 * optimum.error, *optimum.interval, lw=3, **style)
        trained = [c for c in cells if (c.task, c.family) == (task, family)]
        low = ax.get_ylim()[0]
        ax.plot([c.size * GIGA for c in trained], [low] * len(trained), "|", color="0.3", ms=8)
        log_axis(ax)
        ax.set(xlabel="training, GFLOPs per image", ylabel=f"{task} error (%)")
        ax.set_title(
            f"{family}: fitted error at fixed compute\nbar: {LEVEL:.0%} interval of the best size; "
            "ticks: trained models",
            fontsize=8,
        )
        ax.legend(fontsize=7)
    return save(figure, folder, "isoflops")
