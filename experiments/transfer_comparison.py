"""Compares four ways to use a pretrained model with a few hundred images, over five seeds.

python -m experiments.transfer_comparison --strokes=runs/strokes --fractals=runs/fractals

Datasets:

- scikit-learn's digits as a folder of PNG files;
- Fashion-MNIST's IDX files (`--fashion`, as in Debian's package dataset-fashion-mnist): 1,200
  images for training, 2,000 for testing;
- patches of photographs (`--photographs`; default: those of scikit-learn and, if installed,
  scikit-image): the left two thirds for training, the rest for testing.

For each start (strokes, fractals, random weights), chooses the learning rate on dev with one seed,
then makes one final run per seed. Evaluates frozen features with few-shot least squares and a
linear probe. Finished runs aren't repeated. Writes a table with the mean and 95% interval over
seeds (Student's t).
"""

import csv
import dataclasses
import importlib.util
import json
import platform
import resource
import time
from pathlib import Path

import jax
import numpy as np
from absl import app, flags
from PIL import Image
from scipy import stats

from vit_jax.classifier.recipe import TransferConfig, WorkflowConfig
from vit_jax.classifier.splits import SplitConfig, Splits
from vit_jax.classifier.start import prepare
from vit_jax.classifier.sweep import SweepConfig, with_values
from vit_jax.classifier.workflow import final_recipe, run_workflow
from vit_jax.data.pipeline import DataConfig
from vit_jax.data.sources import open_source
from vit_jax.evaluation.features import extract_split
from vit_jax.evaluation.protocols.classification import Config as ClassificationConfig
from vit_jax.evaluation.protocols.fewshot import draw_shots, least_squares
from vit_jax.evaluation.protocols.linear import L2, linear_probe
from vit_jax.models.variants import ModelConfig, build_model
from vit_jax.parallel.mesh import MeshConfig, make_mesh
from vit_jax.training import loop
from vit_jax.training.checkpoint import CheckpointConfig
from vit_jax.training.optimizer import OptimizerConfig, ScheduleConfig
from vit_jax.weights.trained import load

STROKES = flags.DEFINE_string("strokes", "", "Workdir of configs/pretrain/formula.py.")
FRACTALS = flags.DEFINE_string("fractals", "", "The same with dataset=fractals.")
PHOTOGRAPHS = flags.DEFINE_list("photographs", None, "Image files to cut patches from.")
FASHION = flags.DEFINE_string("fashion", "/usr/share/datasets/fashion-mnist", "IDX files.")
FOLDER = flags.DEFINE_string("folder", "runs/comparison", "Folder of runs and datasets.")
SEEDS = flags.DEFINE_integer("seeds", 5, "Number of final runs.")
STEPS = flags.DEFINE_integer("steps", 150, "Fine-tuning steps.")
DATASETS = flags.DEFINE_list("datasets", ["digits", "fashion", "photographs"], "Which.")
OUTPUT = flags.DEFINE_string("output", None, "CSV file for the table.")

SIDE, PATCHES = 32, 60
SHOTS, L2_FEWSHOT = 10, 100.0


def make_digits(folder: Path) -> None:
    """Writes 1,797 files, class/number.png."""
    source = {split: open_source("digits", split) for split in ("train", "test")}
    for split, images in source.items():
        for i in range(len(images)):
            record = images[i]
            path = folder / split / images.class_names[record["label"]] / f"{i:04}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(record["image"])
            image.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(path)


def find_photographs() -> list[Path]:
    """Returns the photographs of installed packages."""
    if PHOTOGRAPHS.value:
        return [Path(name) for name in PHOTOGRAPHS.value]
    from sklearn.datasets import load_sample_images

    found = [Path(name) for name in load_sample_images().filenames]
    if spec := importlib.util.find_spec("skimage"):
        names = "astronaut.png brick.png camera.png chelsea.png coffee.png coins.png grass.png "
        names += "gravel.png hubble_deep_field.jpg ihc.png retina.jpg rocket.jpg"
        found += [Path(spec.origin).parent / "data" / name for name in names.split()]
    return found


def make_photographs(folder: Path) -> None:
    """Writes random patches; classes are photographs; train and test parts don't overlap."""
    rng = np.random.default_rng(0)
    for file in find_photographs():
        with Image.open(file) as opened:
            image = opened.convert("RGB")
        image.thumbnail((320, 320))
        cut = 2 * image.width // 3
        for split, low, high, count in (
            ("train", 0, cut, PATCHES),
            ("test", cut, image.width, PATCHES // 2),
        ):
            target = folder / split / file.stem
            target.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                x = int(rng.integers(low, high - SIDE, endpoint=True))
                y = int(rng.integers(image.height - SIDE, endpoint=True))
                image.crop((x, y, x + SIDE, y + SIDE)).save(target / f"{i:03}.png")


MAKERS = {"digits": make_digits, "photographs": make_photographs}
PARTS = {  # train, dev and test splits, if not the default
    "fashion": SplitConfig(train="train[:1080]", dev="train[1080:1200]", test="test[:2000]")
}


@dataclasses.dataclass(frozen=True)
class Images:
    """A dataset's name for `open_source`, and its splits."""

    dataset: str
    parts: SplitConfig

    @property
    def learned_from(self) -> str:
        """The split of final runs and frozen features' classifiers: train and dev."""
        return "+".join(filter(None, (self.parts.train, self.parts.dev)))


def find_images(name: str, folder: Path) -> Images:
    """Returns a dataset's images; creates them if necessary."""
    if name in MAKERS and not folder.exists():
        MAKERS[name](folder)
    dataset = str(folder.absolute()) if name in MAKERS else FASHION.value
    return Images(dataset, PARTS.get(name, SplitConfig()))


def recipe(images: Images, init: str) -> TransferConfig:
    """Returns a recipe with AdamW at three learning rates."""
    variant = ModelConfig("ViT-nano/8", dtype="float32")
    return TransferConfig(
        model=variant,
        data=DataConfig(images.dataset, preprocess="resize|affine", num_threads=1),
        image_size=SIDE,
        batch_size=64,
        schedule=ScheduleConfig(1e-3, warmup=STEPS.value // 10),
        optimizer=OptimizerConfig(weight_decay=0.05),
        steps=STEPS.value,
        log_every=50,
        checkpoint=CheckpointConfig(every=1000, keep_last=1),
        init=init,
        workflow=WorkflowConfig(sweep=SweepConfig((1e-3, 3e-3, 1e-2))),
        split=images.parts,
    )


def fine_tune(images: Images, start: str, init: str, folder: Path) -> list[float]:
    """Returns the test accuracy per seed; the first is the sweep's final run."""
    config = recipe(images, init)
    first = folder / f"{start}_sweep"
    if not (first / "report.html").exists():
        run_workflow(config, first, "python -m experiments.transfer_comparison")
    results = json.loads((first / "results.json").read_text())
    kept = json.loads((first / "data" / "audit.json").read_text())
    final = with_values(final_recipe(config, Splits(**kept["splits"])), results["chosen"])
    test = dataclasses.replace(final.data, split=images.parts.test, preprocess="resize")
    shared = str((first / "compiled").absolute())
    accuracies = [results["accuracy"]]
    for seed in range(1, SEEDS.value):
        run = dataclasses.replace(
            final,
            seed=seed,
            evaluators={"test": ClassificationConfig(test, 64)},
            compilation_cache=shared,
        )
        last = loop.train(prepare(run, str(folder / f"{start}_seed{seed}")))
        accuracies.append(last["test/accuracy"])
    return accuracies


def frozen(images: Images, init: str) -> dict[str, list[float]]:
    """Evaluates features of a checkpoint or random weights: few-shot and linear probe."""
    if init:
        trained = load(init)
        params, model = trained.params, trained.architecture
    else:
        model = build_model(ModelConfig("ViT-nano/8", dtype="float32"), 10, (SIDE, SIDE))
        params = jax.device_get(jax.jit(model.init)(jax.random.key(0)))
    data = DataConfig(images.dataset, num_threads=1)
    parts = {"train": images.learned_from, "test": images.parts.test}
    sources = {name: open_source(data.dataset, part) for name, part in parts.items()}
    extract = extract_split(sources, data, model, make_mesh(MeshConfig()), 64)
    (x, y), (test, test_y) = extract(params, "train"), extract(params, "test")
    fewshot, linear = [], []
    for seed in range(SEEDS.value):
        index = draw_shots(y, SHOTS, seed)
        found = least_squares(x[index], y[index], test, L2_FEWSHOT)
        fewshot.append(float(np.mean(found == test_y)))
        order = np.random.default_rng(seed).permutation(len(y))
        dev, train = order[: len(y) // 10], order[len(y) // 10 :]
        predicted, _, _ = linear_probe((x[train], y[train]), (x[dev], y[dev]), test, L2)
        linear.append(float(np.mean(predicted == test_y)))
    return {f"few-shot, {SHOTS} a class": fewshot, "linear probe": linear}


def main(_) -> None:
    """Runs what is missing and writes the table."""
    began, rows = time.perf_counter(), []
    for dataset in DATASETS.value:
        folder = Path(FOLDER.value) / dataset
        images = find_images(dataset, folder / "images")
        for start, init in (
            ("strokes", STROKES.value),
            ("fractals", FRACTALS.value),
            ("random", ""),
        ):
            if start != "random" and not init:
                continue
            measured = frozen(images, init)
            measured["fine-tuned"] = fine_tune(images, start, init, folder)
            for method, values in measured.items():
                mean = np.mean(values)
                half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
                rows.append(
                    {
                        "dataset": dataset,
                        "start": start,
                        "method": method,
                        "accuracy": f"{100 * mean:.1f}",
                        "interval": f"{100 * half:.1f}",
                        "seeds": len(values),
                    }
                )
                print(rows[-1], flush=True)
    output = Path(OUTPUT.value or Path(FOLDER.value) / "table.csv")
    with output.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{output}: {time.perf_counter() - began:.0f} s, {peak:.2f} GiB of host memory at most, "
        f"{platform.processor() or platform.machine()}, jax {jax.__version__}"
    )


if __name__ == "__main__":
    app.run(main)
