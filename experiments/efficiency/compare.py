r"""Trains a small ViT with AdamW, Muon and a token schedule, and prints a table of what each costs.

python -m experiments.efficiency.compare --workdir=runs/efficiency

Images are the embedded strokes at 64 px, 64 patches each. Runs that are finished aren't repeated;
one that was interrupted goes on.
"""

import datetime
import os
import platform

import jax
from absl import app, flags

from vit_jax.config import build
from vit_jax.recipes import recipe
from vit_jax.training import loop
from vit_jax.training.clock import read_starts

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the runs.", required=True)
STEPS = flags.DEFINE_integer("steps", 400, "Steps of the full run.")
SEEDS = flags.DEFINE_integer("seeds", 1, "Seeds, from 0.")

# Three fifths of the steps at half of the side, then a growing side: 0.45 of the FLOPs.
STAGES = (
    {"share": 0.6, "image_size": 32},
    {"share": 0.2, "image_size": 48},
    {"share": 0.2},
)
# Optimizer, share of the full steps, highest learning rate, stages.
ROWS = {
    "AdamW": ("adamw", 1.0, 4e-3, ()),
    "Muon, half of the steps": ("muon", 0.5, 8e-3, ()),
    "Muon, half of the steps, stages": ("muon", 0.5, 8e-3, STAGES),
    "AdamW, stages": ("adamw", 1.0, 4e-3, STAGES),
    "AdamW, half of the steps": ("adamw", 0.5, 4e-3, ()),
}


def make_config(optimizer: str, share: float, peak: float, stages: tuple, seed: int) -> dict:
    """The recipe `pretrain/formula` at 64 px, for a row of the table."""
    steps = round(share * STEPS.value)
    config = recipe(f"pretrain/formula:steps={steps}", image_size=64, batch_size=64, seed=seed)
    config.optimizer.name = optimizer
    config.schedule.peak = peak
    config.stages = stages
    config.eval_every = None
    config.checkpoint.every = 100
    config.evaluators.validation.data.preprocess = "resize"
    return config.to_dict()


def run_row(name: str, values: tuple, seed: int) -> tuple[float, float, float]:
    """Trains, unless it is done: (exaFLOPs, seconds, accuracy)."""
    folder = f"{WORKDIR.value}/{name.replace(', ', '-').replace(' ', '_')}-{seed}"
    run = loop.prepare(build(loop.TrainConfig, make_config(*values, seed)), folder)
    last = loop.train(run)
    starts = read_starts(run.workdir)
    seconds = sum(sum(start["seconds"][s] for s in ("train", "input")) for start in starts)
    return run.flops(0, run.steps) / 1e18, seconds, last["validation/accuracy"]


def main(_: list[str]) -> None:
    """Prints a row for each method: means over the seeds, and the accuracy of each."""
    found = {}
    for seed in range(SEEDS.value):
        for name, values in ROWS.items():
            found.setdefault(name, []).append(run_row(name, values, seed))
    full = found["AdamW"]
    today = datetime.date.today()
    print(f"{today}, {os.cpu_count()} CPU cores ({platform.machine()}), jax {jax.__version__}\n")
    print("| method | steps | peak rate | FLOPs | seconds | accuracy |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, rows in found.items():
        flops, seconds, _ = (sum(column) / len(rows) for column in zip(*rows, strict=True))
        share = flops / (sum(row[0] for row in full) / len(full))
        accuracies = ", ".join(f"{row[2]:.3f}" for row in rows)
        steps = round(ROWS[name][1] * STEPS.value)
        print(
            f"| {name} | {steps} | {ROWS[name][2]:g} | {share:.2f} | {seconds:.0f} | {accuracies} |"
        )


if __name__ == "__main__":
    app.run(main)
