"""The report of a transfer, `report.html`, and its model card.

The page is one file with inline pictures and styles. It has no script and fetches nothing.
"""

import base64
import dataclasses
import html
import io
import re
import urllib.parse
from collections.abc import Iterable, Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from vit_jax.evaluation.calibration import BINS, bin_index
from vit_jax.evaluation.intervals import accuracy_interval

MISTAKES = 24
CELLS = 20  # maximum number of classes for a confusion matrix with numbers
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#777777"  # safe for colour-blind readers

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
h1{font-size:1.6rem;margin-bottom:0}h2{font-size:1.2rem;margin-top:2.2rem;border-top:1px solid #ddd;
padding-top:.8rem}table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.15rem .7rem .15rem 0;text-align:left;vertical-align:top}th{color:#555}
img{max-width:100%}figure{display:inline-block;margin:.4rem;
vertical-align:top;text-align:center;font-size:.8rem;max-width:15rem}figcaption{overflow-wrap:
anywhere}pre{background:#f5f5f5;padding:.7rem;white-space:pre-wrap;overflow-wrap:anywhere}
.big{font-size:2rem;font-weight:600}.sub{color:#555}.pair{display:inline-block}.bar{background:#0072B2;height:.7rem;
display:inline-block}.wide{overflow-x:auto;white-space:nowrap}
pre.table{white-space:pre;overflow-x:auto;overflow-wrap:normal}ul{padding-left:1.2rem}
"""


# Makes browsers refuse to fetch anything.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


@dataclasses.dataclass(frozen=True)
class Picture:
    """Pixels uint8 [H, W, 3] and a caption."""

    pixels: np.ndarray
    caption: str


@dataclasses.dataclass(frozen=True)
class Report:
    """The contents of the page. Shapes: N test images, C classes, M dev images."""

    title: str
    command: str
    facts: dict[str, str]  # of the model and the run
    class_names: Sequence[str]
    probabilities: np.ndarray  # [N, C]
    labels: np.ndarray  # [N]
    scores: dict[str, float]  # accuracy, accuracy_interval, loss, ece, temperature, ...
    baselines: Sequence[dict]  # "name", accuracy, accuracy_interval, balanced_accuracy, macro_f1
    remarks: Sequence[str]  # on baselines that the model doesn't beat
    data: str  # the audit's table
    findings: Sequence[str]  # of the audit
    trials: str  # the sweep's table
    curves: dict[str, list[dict[str, float]]]  # run -> its records
    mistakes: Sequence[Picture]
    attention: Sequence[tuple[Picture, Picture]]  # images and their attention rollouts
    files: dict[str, str]  # other files: path -> description


def confusion_matrix(labels: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """Returns [C, C] counts; rows are labels, columns predictions."""
    matrix = np.zeros((num_classes, num_classes), int)
    np.add.at(matrix, (labels, predicted), 1)
    return matrix


# A fixed salt makes reports reproducible. "$" in a class's name doesn't start a formula.
@mpl.rc_context({"svg.hashsalt": "vit_jax", "text.parse_math": False})
def render(report: Report) -> str:
    """Returns the page as HTML."""
    matrix = confusion_matrix(
        report.labels, report.probabilities.argmax(axis=1), len(report.class_names)
    )
    scores = report.scores
    low, high = scores["accuracy_interval"]
    sections = [
        f"<h1>{_text(report.title)}</h1>",
        f'<p><span class="big">{scores["accuracy"]:.1%}</span> of {len(report.labels):,} test '
        f"images correct, {low:.1%} to {high:.1%} with 95% confidence (Wilson)</p>",
        _table([], [[name, value] for name, value in report.facts.items()]),
        "<h2>Comparison with baselines</h2>",
        _list(report.remarks) if report.remarks else "<p>It beats every baseline.</p>",
        _baselines(report),
        "<h2>Data</h2>",
        f"<pre>{_text(report.data)}</pre>",
        _list(report.findings) if report.findings else "<p>No problems found.</p>",
        "<h2>Recall of each class</h2>",
        _recalls(matrix, report.class_names),
        "<h2>Confusion matrix</h2>",
        _chart(_confusion_figure(matrix, report.class_names), "confusion matrix"),
        _confused(matrix, report.class_names),
        "<h2>Calibration</h2>",
        _calibration(report),
        "<h2>Training</h2>",
        f'<pre class="table">{_text(report.trials)}</pre>',
        _chart(_curves_figure(report.curves), "training curves"),
        "<h2>Most confident errors</h2>",
        "".join(map(_figure, report.mistakes)) or "<p>No errors.</p>",
    ]
    if report.attention:
        pairs = (_figure(image, 224) + _figure(seen, 224) for image, seen in report.attention)
        sections += [
            "<h2>Attention</h2>",
            '<p class="sub">Attention rollout over all layers: the brighter a patch, the more it '
            "contributes to the output.</p>",
            "".join(f'<span class="pair">{pair}</span>' for pair in pairs),
        ]
    sections += [
        "<h2>Files</h2>",
        _table([], [[_link(name, what), what] for name, what in report.files.items()]),
        "<h2>Command</h2>",
        f"<pre>{_text(report.command)}</pre>",
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<link rel="icon" href="data:,">'  # otherwise browsers request one
        f"<title>{_text(report.title)}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(sections)
        + "\n</body></html>\n"
    )


def _baselines(report: Report) -> str:
    """Returns the table of the baselines' and, last, the model's test scores."""
    rows = []
    for entry in (*report.baselines, {"name": "this model", **report.scores}):
        low, high = entry["accuracy_interval"]
        metrics = (entry[name] for name in ("accuracy", "balanced_accuracy", "macro_f1"))
        accuracy, *others = (f"{value:.1%}" for value in metrics)
        rows.append([entry["name"], accuracy, f"{low:.1%} to {high:.1%}", *others])
    return _table(["on test", "accuracy", "95% interval", "balanced accuracy", "macro F1"], rows)


def _link(name: str, what: str) -> str:
    if what.startswith("not written"):
        return name
    return _Html(f'<a href="{html.escape(urllib.parse.quote(name))}">{_text(name)}</a>')


def model_card(report: Report) -> str:
    """Returns a Markdown card: the model, its intended use, evaluation and training data."""
    low, high = report.scores["accuracy_interval"]
    recalls = _recall_rows(
        confusion_matrix(
            report.labels, report.probabilities.argmax(axis=1), len(report.class_names)
        )
    )
    worst = sorted(range(len(recalls)), key=lambda i: recalls[i][2])[:5]
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", report.command)), default=0))
    lines = [
        f"# {_markdown(report.title)}",
        "",
        *(f"- {name}: {_markdown(value)}" for name, value in report.facts.items()),
        "",
        "## Intended use",
        "",
        f"Labels an image with one of {len(report.class_names)} classes: "
        + ", ".join(map(_markdown, report.class_names[:50]))
        + (", ..." if len(report.class_names) > 50 else "")
        + ". An image of anything else gets one of these labels too.",
        "",
        "## Evaluation",
        "",
        f"Accuracy {report.scores['accuracy']:.1%} on {len(report.labels):,} held-out images "
        f"({low:.1%} to {high:.1%}, 95% Wilson interval); expected calibration error "
        f"{report.scores['ece']:.3f}; balanced accuracy "
        f"{report.scores['balanced_accuracy']:.1%}, macro F1 {report.scores['macro_f1']:.1%}.",
        "",
        *(f"- baseline: {b['name']}, {b['accuracy']:.1%}" for b in report.baselines),
        *(f"- {_markdown(remark)}" for remark in report.remarks),
        "",
        "The lowest recalls:",
        "",
        *(
            f"- {_markdown(report.class_names[i])}: {recalls[i][2]:.1%} of {recalls[i][1]} images"
            for i in worst
        ),
        "",
        "## Training data",
        "",
        *(f"- {_markdown(line)}" for line in report.data.splitlines() if line),
        *(f"- {_markdown(finding)}" for finding in report.findings),
        "",
        "## How it was made",
        "",
        fence,
        report.command,
        fence,
        "",
    ]
    return "\n".join(lines)


def _markdown(text: object) -> str:
    """Escapes a text for Markdown, so that it is shown literally and on one line."""
    escaped = re.sub(r"(^[-+=]|[\\`*_\[\]#|~$])", r"\\\1", " ".join(str(text).split()))
    return html.escape(escaped, quote=False)


def _recall_rows(matrix: np.ndarray) -> list[tuple[int, int, float]]:
    """Returns (correct, images, recall) of each class; recall is NaN without images."""
    right, images = matrix.diagonal(), matrix.sum(axis=1)
    return [
        (int(r), int(n), r / n if n else float("nan")) for r, n in zip(right, images, strict=True)
    ]


def _recalls(matrix: np.ndarray, names: Sequence[str]) -> str:
    rows = []
    predicted = matrix.sum(axis=0)
    for i, (right, images, recall) in enumerate(_recall_rows(matrix)):
        precision = f"{right / predicted[i]:.1%}" if predicted[i] else "-"
        if not images:
            rows.append([names[i], "no test image", "", "", precision])
            continue
        low, high = accuracy_interval(right, images)
        bar = _Html(f'<span class="bar" style="width:{100 * recall:.1f}px"></span>')
        shown = (f"{right} of {images}", f"{recall:.1%}", f"{low:.1%} to {high:.1%}")
        rows.append([names[i], *shown, precision, bar])
    return _table(["class", "correct", "recall", "95% interval", "precision", ""], rows)


def _confused(matrix: np.ndarray, names: Sequence[str]) -> str:
    pairs = [(int(matrix[i, j]), i, j) for i, j in zip(*np.nonzero(matrix), strict=True) if i != j]
    rows = [[str(n), names[i], names[j]] for n, i, j in sorted(pairs, reverse=True)[:10]]
    return _table(["images", "class", "predicted as"], rows) if rows else ""


def _confusion_figure(matrix: np.ndarray, names: Sequence[str]) -> Figure:
    count = len(names)
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    side = min(3 + 0.35 * count, 9)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="prediction", ylabel="label")
    if count <= CELLS:
        short = [name if len(name) <= 16 else name[:15] + "…" for name in names]
        axes.set_xticks(range(count), short, rotation=90)
        axes.set_yticks(range(count), short)
        for i, j in zip(*np.nonzero(matrix), strict=True):
            color = "white" if shares[i, j] > 0.5 else "black"
            axes.text(j, i, str(matrix[i, j]), ha="center", va="center", color=color, fontsize=8)
    return figure


def _calibration(report: Report) -> str:
    scores = report.scores
    lines = [
        f"<p>Expected calibration error {scores['ece']:.3f} ({BINS} bins)",
        f", {scores['ece_at_temperature']:.3f} with logits divided by the temperature "
        f"{scores['temperature']:.3f}, which was fitted to the dev split. "
        "The model keeps it, and <code>predict</code> applies it.</p>",
    ]
    confidence = report.probabilities.max(axis=1)
    right = report.probabilities.argmax(axis=1) == report.labels
    bins = bin_index(confidence)
    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color=GREY, lw=1)
    for i in np.unique(bins):
        inside = bins == i
        x, y = confidence[inside].mean(), right[inside].mean()
        low, high = accuracy_interval(int(right[inside].sum()), int(inside.sum()))
        axes.errorbar(x, y, [[max(y - low, 0)], [max(high - y, 0)]], fmt="o", color=BLUE, capsize=2)
    axes.set(xlabel="confidence", ylabel="share correct", xlim=(0, 1.02), ylim=(0, 1.02))
    return "".join(lines) + _chart(figure, "confidence against accuracy")


def _curves_figure(curves: dict[str, list[dict[str, float]]]) -> Figure:
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, name, label in ((left, "loss", "training loss"), (right, "dev/accuracy", "dev")):
        drawn = 0
        for i, (run, records) in enumerate(curves.items()):
            points = [(r["step"], r[name]) for r in records if name in r]
            if points:
                color = ORANGE if run == "final" else mpl.colormaps["viridis"](i / len(curves))
                style = {"color": color, "lw": 2 if run == "final" else 1, "label": run}
                axes.plot(*zip(*points, strict=True), marker="." if name != "loss" else "", **style)
                drawn += 1
        axes.set(xlabel="step", ylabel=label + (" accuracy" if axes is right else ""))
        axes.grid(alpha=0.3)
        if 0 < drawn <= 10:
            axes.legend(fontsize=7)
    return figure


class _Html(str):
    """Text that is already markup."""


def _text(value: object) -> str:
    return value if isinstance(value, _Html) else html.escape(str(value))


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    top = "<tr>" + "".join(f"<th>{_text(cell)}</th>" for cell in head) + "</tr>" if head else ""
    body = "".join(
        "<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    table = f"<table>{top}{body}</table>"
    return f'<div class="wide">{table}</div>' if head else table


def _list(items: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{_text(item)}</li>" for item in items) + "</ul>"


def _figure(picture: Picture, side: int = 160) -> str:
    image = Image.fromarray(picture.pixels)
    if max(image.size) > side:
        image.thumbnail((side, side))
    else:
        factor = max(1, 128 // max(image.size))
        image = image.resize(
            (factor * image.width, factor * image.height), Image.Resampling.NEAREST
        )
    data = io.BytesIO()
    image.save(data, "PNG")
    caption = _text(picture.caption)
    shown = _image(data.getvalue(), "png", caption)
    return f"<figure>{shown}<figcaption>{caption}</figcaption></figure>"


def _chart(figure: Figure, name: str) -> str:
    data = io.BytesIO()
    figure.savefig(data, format="svg", metadata={"Date": None})
    return f"<p>{_image(data.getvalue(), 'svg+xml', name)}</p>"


def _image(data: bytes, kind: str, name: str) -> str:
    return f'<img alt="{name}" src="data:image/{kind};base64,{base64.b64encode(data).decode()}">'
