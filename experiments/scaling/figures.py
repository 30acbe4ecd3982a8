"""Draws Figures 2 to 5, 8, 9, 12, 13 and Tables 5 and 6 of arXiv 2010.11929.

Without a study, draws the paper's numbers from `paper/*.csv`. With a study, adds its results: over
the paper's faded points for the same task and axes, otherwise in separate panels.
"""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from experiments.scaling.style import (
    HUES,
    MARKERS,
    ORDER,
    OTHERS,
    Looks,
    family_legend,
    label_ends,
    label_points,
    new_figure,
    save,
)
from experiments.scaling.table import read_csv

PAPER = Path(__file__).parent / "paper"
SETS = ("ImageNet", "ImageNet-21k", "JFT-300M")
VTAB = {"VTAB": 19, "Natural": 7, "Specialized": 4, "Structured": 8}
SCALED = ("All", "Depth", "Patch size", "Width MLP", "Width")
IMAGES = {"9M": 9e6, "30M": 30e6, "90M": 90e6, "300M": 300e6}


def paper(name: str) -> list[dict[str, str]]:
    return read_csv(PAPER / f"{name}.csv")


def _short(name: str) -> str:
    """Converts the paper's names to ours."""
    return name.replace("ResNet", "R").replace(" (BiT)", "")


LOOKS = Looks()


def figure_2_panel(axes: Axes, group: str = "VTAB", named: bool = True) -> None:
    """Draws one group of VTAB's tasks, or all."""
    rows = paper("fig2_vtab")
    colours = [LOOKS.colour("ViT-H/14"), LOOKS.colour("R152x4"), OTHERS[1], OTHERS[0]]
    names = [row["model"] for row in rows] if named else []
    columns(axes, names, np.array([float(row[group]) for row in rows]), colours)
    axes.set_title(f"{group} ({VTAB[group]} tasks)", fontsize=10)
    axes.set_ylabel(f"{group}, {VTAB[group]} tasks (%)" if named else "")


def figure_2() -> Figure:
    """Draws VTAB by groups of tasks."""
    figure, axes = new_figure(len(VTAB), 2.3, 3.4)
    for panel, group in zip(axes, VTAB, strict=True):
        figure_2_panel(panel, group, named=False)
    names = [row["model"] for row in paper("fig2_vtab")]
    axes[0].set_ylabel("accuracy (%)")
    figure.legend(axes[0].containers[0], names, loc="outside lower center", ncols=4)
    return figure


def columns(
    axes: Axes,
    names: list[str],
    values: np.ndarray,
    colours: list,
    errors: np.ndarray | None = None,
) -> None:
    """Draws vertical bars [N], from just below the lowest, with errors [2, N] below and above."""
    bars = axes.bar(range(len(values)), values, color=colours, yerr=errors, ecolor="0.25")
    axes.bar_label(bars, fmt="%.1f", fontsize=8, padding=1)
    below, above = (0, 0) if errors is None else errors
    low, high = np.min(values - below), np.max(values + above)
    low = 5 * (low // 5) - 5
    axes.set(ylim=(low, high + 0.08 * (high - low)), xticks=[])
    if names:
        axes.set_xticks(range(len(names)), names, rotation=35, ha="right", fontsize=8)
    axes.grid(axis="x", visible=False)


def figure_3_panel(axes: Axes) -> None:
    """Draws fine-tuned ImageNet accuracy by pretraining set, with BiT as a band."""
    band = paper("fig3_bit_band")
    low = [float(row["bit_low_R50x1"]) for row in band]
    high = [float(row["bit_high_R152x4"]) for row in band]
    axes.fill_between(range(3), low, high, color="0.85", label="BiT, R50x1 to R152x4", zorder=0)
    rows = {r["pretrain"]: r for r in paper("table5") if r["downstream"] == "ImageNet"}
    for model in ORDER["ViT"][1:]:
        found = [(i, float(rows[s][model])) for i, s in enumerate(SETS) if rows[s][model]]
        axes.plot(*zip(*found, strict=True), **LOOKS.style(model), linestyle=":", label=model)
    axes.set_xticks(range(3), SETS)
    axes.set(xlabel="pretraining set", ylabel="ImageNet top-1 (%), fine-tuned", ylim=(70, 90))
    axes.set_xlim(-0.25, 2.25)
    axes.legend(loc="lower right")


def figure_4_panel(axes: Axes) -> None:
    """Draws linear 5-shot ImageNet accuracy by subset of JFT."""
    ends = []
    for row in paper("fig4"):
        model = _short(row["model"])
        values = [float(row[size]) for size in IMAGES]
        axes.plot(IMAGES.values(), values, **LOOKS.style(model))
        ends.append((model, IMAGES["300M"], values[-1], LOOKS.colour(model)))
    axes.set_xscale("log")
    axes.set_xticks(list(IMAGES.values()), list(IMAGES))
    axes.minorticks_off()
    axes.set(xlabel="images of JFT for pretraining", ylabel="ImageNet 5-shot (%)", ylim=(28, 74))
    label_ends(axes, ends)


def figure_5_panel(axes: Axes, column: str, title: str, limits: tuple[float, float]) -> None:
    """Draws accuracy against pretraining compute for three families."""
    rows = paper("table6")
    names, x, y = [], [], []
    for row in rows:
        name = _short(row["name"])
        names.append(name.replace("R50x1+", "R50+") + ("*" if row["epochs"] == "14" else ""))
        x.append(float(row["exaFLOPs"]))
        y.append(float(row[column]))
        axes.scatter(
            x[-1], y[-1], s=LOOKS.area(name), color=LOOKS.colour(name), marker=LOOKS.marker(name),
            edgecolors="white", linewidths=0.6, zorder=3,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set(xlabel="pretraining compute (exaFLOPs)", ylabel=f"{title} (%)", ylim=limits)
    axes.set_xlim(35, 9000)
    family_legend(axes, HUES, loc="lower right", title="* 14 epochs, others 7", title_fontsize=7)
    label_points(axes, names, x, y)


def figure_8_panel(axes: Axes, metric: str, title: str, base: float) -> None:
    """Draws models with depth, width, patch or MLP width scaled."""
    lines = {
        axis: [
            (float(r["relative_compute"]), 100 * float(r["accuracy"]))
            for r in rows
            if r["metric"] == metric
        ]
        for axis, rows in _by(paper("fig8"), "axis").items()
    }
    scaled(axes, lines, base, f"{title} (%)")


def scaled(axes: Axes, lines: dict[str, list[tuple[float, float]]], base: float, y: str) -> None:
    """Draws (relative compute, accuracy) per scaled dimension; each line contains the base."""
    markers = dict(zip(SCALED, "oDs^v", strict=True))
    colours = dict(zip(SCALED, ("#000000", *HUES.values(), OTHERS[0]), strict=True))
    for axis in [axis for axis in SCALED if lines.get(axis)]:
        style = {"color": colours[axis], "marker": markers[axis], "markeredgecolor": "white"}
        axes.plot(*zip(*sorted({*lines[axis], (1.0, base)}), strict=True), **style, label=axis)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.set(xlabel="relative compute", ylabel=y)
    axes.legend(title="scaled", loc="best")


def figure_9_panel(axes: Axes) -> None:
    """Draws class token against global average pooling during pretraining."""
    rows = paper("fig9")
    styles = {
        "CLS lr=8e-4": (HUES["ViT"], "-"),
        "GAP lr=8e-4": (HUES["ResNet"], "--"),
        "GAP lr=3e-4": (HUES["hybrid"], "-."),
    }
    for name, (colour, line) in styles.items():
        found = [(float(r["epoch"]), float(r[name])) for r in rows if r[name]]
        axes.plot(*zip(*found, strict=True), line, color=colour, lw=1.8, label=name)
    axes.set(xlabel="epochs of pretraining", ylabel="ImageNet 5-shot (%)", xlim=(0, 7))
    axes.legend()


def figure_12_panel(axes: Axes) -> None:
    """Draws the peak inference speed of one TPUv3 core."""
    rows = sorted(paper("fig12"), key=lambda r: float(r["img_per_sec_per_core"]))
    names = [row["model"] for row in rows]
    values = [float(row["img_per_sec_per_core"]) for row in rows]
    bars(axes, names, values, LOOKS, "inference, images / s / TPUv3 core, 224 px")


FIGURE_13 = (
    {"column": "exaflops", "label": "pretraining compute (exaFLOPs)", "limits": (30, 1200)},
    {
        "column": "img_per_sec_per_core",
        "label": "inference, images / s / TPUv3 core",
        "limits": (40, 9000),
    },
)


def figure_13_panel(panel: Axes, column: str, label: str, limits: tuple[float, float]) -> None:
    """Draws axial models: 5-shot accuracy against compute or speed."""
    for row in paper("fig13"):
        axial = row["model"].startswith("Axial")
        colour = HUES[row["family"]]
        at = float(row[column]), float(row["imagenet_5shot"])
        panel.scatter(
            *at, s=60, marker=MARKERS[row["family"]], edgecolors=colour, linewidths=1.5,
            facecolors="none" if axial else colour,
        )  # fmt: skip
        panel.annotate(row["model"], at, (6, 4), textcoords="offset points", fontsize=7)
    panel.set_xscale("log")
    panel.set(xlabel=label, ylabel="ImageNet 5-shot (%)", xlim=limits)
    panel.set_title("filled: full attention; hollow: axial", fontsize=8)


def _by(rows: list[dict[str, str]], column: str) -> dict[str, list[dict[str, str]]]:
    groups: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        groups.setdefault(row[column], []).append(row)
    return groups


def bars(axes: Axes, names: list[str], values: list[float], looks: Looks, label: str) -> None:
    colours = [looks.colour(name) for name in names]
    bars = axes.barh(names, values, color=colours)
    axes.bar_label(bars, fmt="{:,.0f}", fontsize=8, padding=3)
    axes.set_xscale("log")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set(xlabel=label, xlim=(min(values) / 2, max(values) * 2.5))
    axes.grid(axis="y", visible=False)


def draw_paper(folder: Path) -> list[Path]:
    """Draws the paper's figures and tables from its numbers; returns the paths."""
    written = save(figure_2(), folder, "figure_2")
    for name, panel in (("3", figure_3_panel), ("4", figure_4_panel), ("9", figure_9_panel)):
        figure, axes = new_figure(1, 5.2)
        panel(axes[0])
        written += save(figure, folder, f"figure_{name}")
    figure, (left, right) = new_figure(2, 5.2, 4.4)
    figure_5_panel(left, "avg5_computed", "average of 5 tasks", (88, 97))
    figure_5_panel(right, "ImageNet", "ImageNet top-1", (75, 90))
    written += save(figure, folder, "figure_5")
    figure, (left, right) = new_figure(2)
    figure_8_panel(left, "ImageNet5", "ImageNet 5-shot", 43.6)
    figure_8_panel(right, "Avg5", "average 5-shot", 68.2)
    written += save(figure, folder, "figure_8")
    figure, axes = new_figure(1, 5.2)
    figure_12_panel(axes[0])
    written += save(figure, folder, "figure_12")
    figure, panels = new_figure(2)
    for panel, about in zip(panels, FIGURE_13, strict=True):
        figure_13_panel(panel, **about)
    written += save(figure, folder, "figure_13")
    for name in ("table5", "table6"):
        written.append(write_markdown(folder / f"{name}.md", paper(name)))
    return written


def write_markdown(path: Path, rows: list[dict]) -> Path:
    """Writes rows as a Markdown table."""
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    lines += ["| " + " | ".join(str(value) for value in row.values()) + " |" for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path
