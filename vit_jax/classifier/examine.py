"""Examines a classifier: test predictions, most confident errors, attention."""

import io
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from scipy.special import log_softmax, softmax

from vit_jax.classifier.page import Picture
from vit_jax.config import InputError
from vit_jax.data.augment import parse_preprocess
from vit_jax.data.decode import decode_image
from vit_jax.data.pipeline import DataConfig
from vit_jax.data.sources import Source
from vit_jax.evaluation.by_class import measure_predictions
from vit_jax.evaluation.calibration import bin_predictions, calibration_error
from vit_jax.evaluation.features import make_batches, make_extractor
from vit_jax.evaluation.intervals import accuracy_interval
from vit_jax.models.variants import Model
from vit_jax.parallel.multihost import all_agree, barrier, is_main
from vit_jax.parallel.run_files import write_whole
from vit_jax.pictures.attention import attention_maps
from vit_jax.pictures.figures import heat


def keep_outputs(
    file: Path,
    model: Model,
    params: Callable[[], dict],
    mesh: Mesh,
    source: Source,
    data: DataConfig,
    batch_size: int,
    output: str = "logits",
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (logits [N, C], labels [N]) of a split; computes them once and keeps them in `file`.

    With `output` "features" it returns the head's inputs [N, D] instead of logits. `params` returns
    the parameters on the mesh.
    """
    if not all_agree(file.exists()):
        batches = make_batches(source, data, model, mesh, batch_size)
        write_outputs(file, *make_extractor(model, mesh, output)(params(), batches), output)
        barrier(file.name)
    return read_outputs(file, "remove it: it will be computed again", output)


def write_outputs(
    file: Path, outputs: np.ndarray, labels: np.ndarray, output: str = "logits"
) -> None:
    """Writes the file of `read_outputs` atomically."""
    if is_main():
        content = io.BytesIO()
        np.savez(content, **{output: outputs}, labels=labels)
        write_whole(file, content.getvalue())


def read_outputs(file: Path, remedy: str, output: str = "logits") -> tuple[np.ndarray, np.ndarray]:
    """Reads (outputs, labels) of `keep_outputs`; raises ValueError if the file is damaged."""
    try:
        with file.open("rb") as opened, np.load(opened) as arrays:
            return arrays[output], arrays["labels"]
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{file} is damaged ({error}): {remedy}") from error


def score_labels(labels: np.ndarray, predicted: np.ndarray) -> dict:
    """Returns accuracy with its 95% interval, balanced accuracy, macro F1, number of examples."""
    right = int((predicted == labels).sum())
    return {
        **measure_predictions(labels, predicted),
        "accuracy_interval": accuracy_interval(right, len(labels)),
        "examples": len(labels),
    }


def score(logits: np.ndarray, labels: np.ndarray, temperature: float) -> dict:
    """Returns `score_labels`, and loss and calibration without and with the temperature."""
    scores = {**score_labels(labels, logits.argmax(axis=1)), "temperature": temperature}
    for name, divisor in (("", 1.0), ("_at_temperature", temperature)):
        scaled = logits.astype(np.float64) / divisor
        losses = -log_softmax(scaled, axis=1)[np.arange(len(labels)), labels]
        scores[f"loss{name}"] = float(losses.mean())
        scores[f"ece{name}"] = calibration_error(bin_predictions(softmax(scaled, axis=1), labels))
    if logits.shape[1] > 5:
        top = np.argsort(-logits, axis=1, kind="stable")[:, :5]
        scores["top5"] = float((top == labels[:, None]).any(axis=1).mean())
    return scores


def worst_mistakes(
    source: Source, probabilities: np.ndarray, labels: np.ndarray, names: Sequence[str], most: int
) -> list[Picture]:
    """Returns the wrong predictions with the highest confidence."""
    predicted, confidence = probabilities.argmax(axis=1), probabilities.max(axis=1)
    wrong = np.flatnonzero(predicted != labels)
    wrong = wrong[np.argsort(-confidence[wrong], kind="stable")][:most]
    return [
        Picture(
            decode_image(source[int(i)]["image"]),
            f"{names[labels[i]]}, predicted as {names[predicted[i]]} ({confidence[i]:.1%}): "
            f"{Path(source.name(int(i))).name}",
        )
        for i in wrong
    ]


def where_it_looks(
    model: Model, params: dict, source: Source, preprocess: str, count: int
) -> list[tuple[Picture, Picture]]:
    """Returns attention rollouts of evenly spaced images; none for a model without attention."""
    if model.grid is None:
        return []
    prepare = parse_preprocess(preprocess, model.image_size)
    indices = np.unique(np.linspace(0, len(source) - 1, count).astype(int))
    images = np.stack([prepare(source[int(i)]["image"], np.random.default_rng(0)) for i in indices])
    maps = np.asarray(jax.jit(attention_maps, static_argnums=0)(model, params, images))
    factor = max(1, 192 // max(model.image_size))  # the map is finer than a small image
    images = images.repeat(factor, axis=1).repeat(factor, axis=2)
    return [
        (Picture(image, Path(source.name(int(i))).name), Picture(heat(image, seen), "attention"))
        for i, image, seen in zip(indices, images, maps, strict=True)
    ]
