"""Styles of all figures: the same colour for a model everywhere, suitable for colour blindness.

The family determines the hue (Okabe & Ito's blue, vermilion and green) and the marker; the size
within the family determines shade and marker area. Figures are also readable in grey.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib as mpl

from vit_jax.config import InputError
from vit_jax.parallel.run_files import written_locally

mpl.use(mpl.get_backend() if mpl.is_interactive() else "Agg")  # a notebook shows its figures
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, LogFormatterSciNotation, LogLocator, NullFormatter
from matplotlib.transforms import Bbox

HUES = {"ViT": "#0072B2", "ResNet": "#D55E00", "hybrid": "#009E73"}
HALO = [withStroke(linewidth=2, foreground="white")]  # for text that may cross a line
MARKERS = {"ViT": "o", "ResNet": "s", "hybrid": "D"}
# The paper's models, from small to large; a study's models follow.
ORDER = {
    "ViT": ["ViT-b/32", "ViT-B/32", "ViT-B/16", "ViT-L/32", "ViT-L/16", "ViT-H/14"],
    "ResNet": ["R50x1", "R50x2", "R101x1", "R152x1", "R152x2", "R152x4", "R200x3"],
    "hybrid": ["R50x1+ViT-B/32", "R50x1+ViT-B/16", "R50x1+ViT-L/32", "R50x1+ViT-L/16"],
}
OTHERS = ("#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")  # lines that aren't models


class Looks:
    """Colours, markers and areas of the models of the paper or a study."""

    def __init__(self, sizes: dict[str, Iterable[str]] | None = None):
        self._order = {f: list(m) for f, m in (sizes or ORDER).items()}
        self.family = {model: family for family, all_ in self._order.items() for model in all_}

    def _rank(self, model: str) -> float:
        """Returns 0 for the smallest of its family, 1 for the largest."""
        models = self._order[self.family[model]]
        return models.index(model) / max(len(models) - 1, 1)

    def colour(self, model: str) -> tuple[float, float, float]:
        hue, rank = np.array(to_rgb(HUES[self.family[model]])), self._rank(model)
        if rank < 0.5:  # towards white
            return tuple(hue + (1 - hue) * 0.5 * (1 - 2 * rank))
        return tuple(hue * (1 - 0.6 * (2 * rank - 1)))  # towards black

    def marker(self, model: str) -> str:
        return MARKERS[self.family[model]]

    def area(self, model: str) -> float:
        return 30 + 90 * self._rank(model)

    def style(self, model: str) -> dict:
        """Returns the style of a line through the model's points."""
        return {
            "color": self.colour(model),
            "marker": self.marker(model),
            "markersize": self.area(model) ** 0.5,
            "markeredgecolor": "white",
            "markeredgewidth": 0.6,
            "linewidth": 1.6,
        }


def new_figure(panels: int, width: float = 4.4, height: float = 3.6) -> tuple[Figure, list[Axes]]:
    """Creates a row of panels; sizes in inches per panel."""
    plt.rcParams.update(
        {
            "font.size": 10,
            "axes.grid": True,
            "grid.alpha": 0.25,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "figure.constrained_layout.use": True,
            "legend.frameon": False,
            "legend.fontsize": 8,
            "pdf.fonttype": 42,
        }
    )
    figure, axes = plt.subplots(1, panels, figsize=(width * panels, height), squeeze=False)
    return figure, list(axes[0])


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Saves as PDF and PNG without the date, so that files are reproducible."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.{kind}" for kind in ("pdf", "png")]
    for path in paths:
        metadata = {"CreationDate": None} if path.suffix == ".pdf" else {"Software": None}
        with written_locally(path) as local:
            figure.savefig(local, dpi=160, metadata=metadata)
    plt.close(figure)
    return paths


def label_ends(axes: Axes, ends: list[tuple[str, float, float, tuple]]) -> None:
    """Labels ends of lines (name, x, y, colour) on the right, without overlaps."""
    ends = sorted(ends, key=lambda end: end[2])
    at = [axes.transData.transform(end[1:3]) * 72 / axes.figure.dpi for end in ends]  # in points
    rows = [row for _, row in at]

    def neighbours(i: int) -> list[int]:
        return [j for j, (column, _) in enumerate(at) if i != j and abs(column - at[i][0]) < 60]

    for i in range(len(ends)):
        for j in sorted(neighbours(i)):
            if j < i and rows[i] - rows[j] < 10:
                rows[i] = rows[j] + 10
    top = axes.transAxes.transform((0, 1))[1] * 72 / axes.figure.dpi - 3
    for i in reversed(range(len(ends))):  # back down, to stay in the panel
        rows[i] = min([rows[i], top, *(rows[j] - 10 for j in neighbours(i) if j > i)])
    for (name, x, y, colour), (_, row), moved in zip(ends, at, rows, strict=True):
        axes.annotate(
            name, (x, y), (9, moved - row), textcoords="offset points", va="center", fontsize=8,
            color=np.array(colour) * 0.85, annotation_clip=False,
            path_effects=HALO,
        )  # fmt: skip


def label_points(
    axes: Axes,
    names: Sequence[str],
    x: Sequence[float],
    y: Sequence[float],
    *,
    marks: np.ndarray | None = None,
    colours: Sequence | None = None,
) -> None:
    """Labels scattered points where no label, point, further mark or legend is covered.

    Call it last: a label that is moved away from its point by more than a line gets a leader.
    `marks` [N, 2] are in the axes' data, like x and y; `colours` are the points'.
    """
    axes.figure.canvas.draw()  # lays the panels out
    renderer = axes.figure.canvas.get_renderer()
    pixel = axes.figure.dpi / 72
    points = axes.transData.transform(np.column_stack([x, y]) if marks is None else marks)
    colours = ["0.3"] * len(names) if colours is None else [np.array(c) * 0.85 for c in colours]
    taken = [Bbox.from_extents(*(point - 5 * pixel), *(point + 5 * pixel)) for point in points]
    if legend := axes.get_legend():
        taken.append(legend.get_window_extent(renderer))
    panel = axes.get_window_extent(renderer)
    angles = np.deg2rad([-35, 145, 35, -145, 0, 180, 90, -90, 65, -65, 115, -115])
    offsets = [
        (distance * np.cos(angle), distance * np.sin(angle))
        for distance in (9, 14, 20, 27, 35)
        for angle in angles
    ]
    for name, colour, *at in zip(names, colours, x, y, strict=True):
        for offset in offsets:
            away = np.hypot(*offset) > 14
            label = axes.annotate(
                name, at, offset, textcoords="offset points", va="center", fontsize=7, color=colour,
                ha="left" if offset[0] > 3 else "right" if offset[0] < -3 else "center",
                path_effects=HALO, arrowprops={"arrowstyle": "-", "lw": 0.5} if away else None,
            )  # fmt: skip
            label.update_positions(renderer)
            box = Text.get_window_extent(label, renderer)
            inside = panel.x0 < box.x0 and box.x1 < panel.x1 and panel.y0 < box.y0
            if inside and box.y1 < panel.y1 and not any(box.overlaps(other) for other in taken):
                break
            label.remove()
        else:
            raise InputError(f"no room for the label {name}: enlarge the figure")
        taken.append(box)


def log_axis(axes: Axes) -> None:
    """Sets a logarithmic x axis with a readable number of labels."""
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    steps = (1, 2, 5) if high < 30 * low else (1,)
    axes.xaxis.set_major_locator(LogLocator(subs=steps))
    if low >= 1:
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    else:
        axes.xaxis.set_major_formatter(LogFormatterSciNotation(minor_thresholds=(99, 99)))
    axes.xaxis.set_minor_formatter(NullFormatter())


def compact(number: int) -> str:
    """Formats 9,000,000 as 9M."""
    return f"{number / 1e6:g}M" if number >= 1e6 else f"{number:,}"


def family_legend(axes: Axes, families: Iterable[str], **kwargs) -> None:
    handles = [
        Line2D([], [], color=HUES[f], marker=MARKERS[f], linestyle="", label=f) for f in families
    ]
    axes.legend(handles=handles, **kwargs)
