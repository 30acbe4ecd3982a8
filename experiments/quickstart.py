"""Compares pretraining with random weights: a small model, generated images, handwritten digits.

vit_jax quickstart                    one seed, a few minutes on two cores
vit_jax quickstart --seeds=0,1,2      as the README states it

Runs the package's commands, which resume: a second call continues an interrupted one.
"""

import csv
import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import matplotlib as mpl
import numpy as np
from absl import flags

from vit_jax.command_line import run
from vit_jax.data.pipeline import DataConfig
from vit_jax.data.sources import open_source
from vit_jax.evaluation.protocols.fewshot import Config as FewshotConfig
from vit_jax.evaluation.protocols.fewshot import draw_shots, least_squares
from vit_jax.training.metrics import read_metrics

mpl.use("Agg")
import matplotlib.pyplot as plt

WORKDIR = flags.DEFINE_string("workdir", "runs/quickstart", "Folder of runs and figures.")
SEEDS = flags.DEFINE_list("seeds", ["0"], "Seeds of repetitions.")
DATASET = flags.DEFINE_enum("dataset", "strokes", ["strokes", "fractals"], "Pretraining dataset.")
STEPS = flags.DEFINE_integer("steps", 0, "Pretraining steps; 0: the recipe's.")
TRANSFER_STEPS = flags.DEFINE_integer("transfer_steps", 0, "Fine-tuning steps; 0: the recipe's.")

SHOTS = (1, 5, 10, 25)
L2 = 100.0  # of few-shot least squares; chosen on part of the digits' training split
STARTS = ("pretrained", "random weights")
COLORS = {"pretrained": "#0072B2", "random weights": "#D55E00"}  # suitable for colour blindness
MARKERS = {"pretrained": "o", "random weights": "s"}


def run_command(module: str, *arguments: str) -> None:
    """Prints and runs one of the package's commands."""
    command = ["vit_jax", module, *arguments]
    print("\n$ " + " ".join(command), flush=True)
    environment = {
        # Both fine-tuning runs have the same program and share its compilation.
        "JAX_COMPILATION_CACHE_DIR": str(Path(WORKDIR.value).absolute() / "compiled"),
        # XLA's CPU backend allocates new buffers in every step; page faults took 20% of the time.
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
        **os.environ,
    }
    # In a session of its own Ctrl-C comes from here alone; a second one would end it at once.
    process = subprocess.Popen(
        [sys.executable, "-m", *command], env=environment, start_new_session=True
    )
    try:
        code = process.wait()
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        sys.exit(process.wait())  # it says where it stopped
    if code:
        sys.exit(f"error: vit_jax {module} failed, see above; a second call continues from there")


def run_seed(seed: int, folder: Path) -> dict:
    """Runs one seed; returns its accuracies and curves."""
    steps = f",steps={STEPS.value}" if STEPS.value else ""
    transfer_steps = f":steps={TRANSFER_STEPS.value}" if TRANSFER_STEPS.value else ""
    pretrained = folder / "pretrain"
    run_command(
        "pretrain",
        f"--config=pretrain/formula:dataset={DATASET.value}{steps}",
        f"--workdir={pretrained}",
        f"--config.seed={seed}",
    )
    fewshot = {}
    for start in STARTS:
        name = start.replace(" ", "_")
        run_command(
            "transfer",
            f"--config=transfer/digits{transfer_steps}",
            f"--workdir={folder / name}",
            f"--config.init={pretrained if start == 'pretrained' else ''}",
            f"--config.seed={seed}",
        )
        output = folder / f"fewshot_{name}.json"
        run_command(
            "evaluate",
            f"--checkpoint={pretrained}",
            "--protocol=fewshot",
            "--dataset=digits",
            f"--shots={','.join(map(str, SHOTS))}",
            f"--l2={L2}",
            f"--output={output}",
            *(["--random_weights", f"--seed={seed}"] if start != "pretrained" else []),
        )
        fewshot[start] = json.loads(output.read_text())
    return {
        "fewshot": fewshot,
        "pretrain": read_metrics(pretrained),
        "transfer": {start: read_metrics(folder / start.replace(" ", "_")) for start in STARTS},
    }


@functools.cache
def raw_pixels() -> dict[int, float]:
    """Computes few-shot accuracy on the digits' 64 pixels, by shots, as a baseline."""
    pixels, labels = [], []
    for split in ("train", "test"):
        source = open_source("digits", split)
        examples = [source[i] for i in range(len(source))]
        pixels.append(np.stack([e["image"].reshape(-1) for e in examples]).astype(np.float32))
        labels.append(np.array([e["label"] for e in examples]))
    config = FewshotConfig(DataConfig("digits"), l2=L2)

    def accuracy(shots, seed):
        index = draw_shots(labels[0], shots, seed)
        predicted = least_squares(pixels[0][index], labels[0][index], pixels[1], config.l2)
        return np.mean(predicted == labels[1])

    return {
        shots: float(np.mean([accuracy(shots, seed) for seed in range(config.seeds)]))
        for shots in SHOTS
    }


def curve(records: list[dict], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns steps and values of one metric."""
    points = [(r["step"], r[name]) for r in records if name in r]
    return np.array([p[0] for p in points]), np.array([p[1] for p in points])


def make_table(results: list[dict]) -> list[dict]:
    """Returns a row per measurement: mean and deviation over seeds of both starts, in percent."""

    def row(name, measure, pixels=""):
        cells = {"accuracy on 599 held-out digits": name}
        for start in STARTS:
            values = [100 * measure(result, start) for result in results]
            spread = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
            cells[start] = f"{np.mean(values):.1f}{spread}"
        return {**cells, "raw pixels": pixels}

    def fewshot(shots):
        pixels = f"{100 * raw_pixels()[shots]:.1f}"
        return row(
            f"few-shot, {shots} a class", lambda r, s: r["fewshot"][s][f"{shots}shot"], pixels
        )

    fine_tuned = row(
        "fine-tuned on all 1,198", lambda r, s: curve(r["transfer"][s], "test/accuracy")[1][-1]
    )
    return [*map(fewshot, SHOTS), fine_tuned]


def draw(results: list[dict], folder: Path) -> list[Path]:
    """Draws three figures, with a curve per seed."""
    plt.rcParams.update({"font.size": 11, "axes.grid": True, "grid.alpha": 0.3})
    plt.rcParams["figure.constrained_layout.use"] = True
    figures = []

    def save(figure, name):
        figures.append(folder / f"{name}.png")
        figure.savefig(figures[-1], dpi=150, bbox_inches="tight")
        plt.close(figure)

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6))
    for result in results:
        left.plot(*curve(result["pretrain"], "loss"), color="#0072B2", alpha=0.8)
        steps, values = curve(result["pretrain"], "validation/accuracy")
        right.plot(steps, 100 * values, "o-", color="#0072B2", alpha=0.8)
    left.set(xlabel="step", ylabel="training loss (nats)", title=f"Pretraining on {DATASET.value}")
    right.set(xlabel="step", ylabel="upstream validation accuracy (%)", ylim=(0, 100))
    right.set_title("New instances of its classes")
    save(figure, "pretraining")

    figure, axes = plt.subplots(figsize=(5.5, 4))
    for start in STARTS:
        for i, result in enumerate(results):
            steps, values = curve(result["transfer"][start], "test/accuracy")
            label = start if i == 0 else None
            axes.plot(
                steps,
                100 * values,
                "-",
                marker=MARKERS[start],
                ms=4,
                color=COLORS[start],
                label=label,
            )
    axes.set(xlabel="fine-tuning step", ylabel="test accuracy (%)", title="Transfer to digits")
    axes.legend()
    save(figure, "transfer")

    figure, axes = plt.subplots(figsize=(5.5, 4))
    for start in STARTS:
        values = np.array(
            [[100 * r["fewshot"][start][f"{shots}shot"] for shots in SHOTS] for r in results]
        )
        # Deviation over seeds; with one seed, over draws of shots.
        draws = [results[0]["fewshot"][start][f"{shots}shot_std"] for shots in SHOTS]
        spread = values.std(axis=0, ddof=1) if len(values) > 1 else 100 * np.array(draws)
        axes.errorbar(
            SHOTS,
            values.mean(axis=0),
            spread,
            marker=MARKERS[start],
            color=COLORS[start],
            capsize=3,
            label=start,
        )
    pixels = [100 * raw_pixels()[shots] for shots in SHOTS]
    axes.plot(SHOTS, pixels, "^:", color="0.4", label="raw pixels")
    axes.set_xscale("log")
    axes.set_xticks(SHOTS, [str(s) for s in SHOTS])
    axes.minorticks_off()
    axes.set(
        xlabel="labelled images a class",
        ylabel="test accuracy (%)",
        title="Few-shot: least squares on features",
    )
    axes.legend()
    save(figure, "fewshot")
    return figures


def main(_) -> None:
    """Runs everything, prints the table and the figures' paths."""
    start = time.perf_counter()
    folder = Path(WORKDIR.value) / DATASET.value
    results = [run_seed(int(seed), folder / f"seed{seed}") for seed in SEEDS.value]
    figures = draw(results, folder)
    table = make_table(results)
    with (folder / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, table[0].keys())
        writer.writeheader()
        writer.writerows(table)

    widths = [max([len(name), *(len(row[name]) for row in table)]) for name in table[0]]
    print()
    for cells in (table[0].keys(), *(row.values() for row in table)):
        print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)))
    seeds = f"{len(results)} seed" + "s" * (len(results) > 1)
    print(f"\nPercent, {seeds}; took {time.perf_counter() - start:.0f} s. Figures:")
    for figure in figures:
        print(f"  {figure}")
    print(f"Runs, with metrics.jsonl and checkpoints: {folder}")


if __name__ == "__main__":
    run(main)
