"""Draws all pictures of what a model learned, and returns their numbers: `visualize`."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

from vit_jax.config import InputError
from vit_jax.data.augment import parse_preprocess
from vit_jax.data.foreign_files import read_file
from vit_jax.data.sources import Source
from vit_jax.models.variants import Model
from vit_jax.pictures import attention, figures
from vit_jax.weights.trained import TrainedModel


def visualize(
    trained: TrainedModel,
    paths: Iterable[Path],
    source: Source | None = None,
    preprocess: str | None = None,
    shown: int = 8,
    say: Callable[[str], Any] = print,
) -> tuple[dict[str, Figure], dict]:
    """Returns the pictures by name, and their numbers.

    Args:
      trained: a model of any kind; one without patches only has a picture of its filters.
      paths: image files.
      source: a dataset's split, whose images come after the files.
      preprocess: as a recipe's `data.preprocess`; by default the model's own.
      shown: number of images to draw the rollout of.
      say: is called with a message for pictures that the model doesn't have.

    Raises ValueError for an image that can't be read, or without any image.
    """
    model, params = trained.architecture, trained.params
    components, shares = attention.filter_components(attention.rgb_filters(model, params))
    pictures = {"filters": figures.draw_filters(components, shares)}
    numbers: dict = {"filter_variance_shares": shares.tolist()}
    if model.grid is None:
        say(f"{model.config.variant} has no patches and no attention: its filters alone")
        return pictures, numbers
    try:
        table = attention.position_embeddings(model, params)
    except ValueError as error:
        say(f"no picture of positions: {error}")
    else:
        pictures["positions"] = figures.draw_positions(attention.cosine_similarity(table))
    preprocess = preprocess or trained.preprocessing
    images = read_images(paths, source, preprocess, model.image_size)
    kept, seen, distances, count = look(model, params, images, shown)
    pictures["rollout"] = figures.draw_rollout(kept, seen)
    pictures["attention_distance"] = figures.draw_distances(distances)
    numbers |= {"attention_distance_pixels": distances.tolist(), "images": count}
    return pictures, numbers


def read_images(
    paths: Iterable[Path], source: Source | None, preprocess: str, image_size: tuple[int, int]
) -> Iterator[np.ndarray]:
    """Yields the images of the files, then of the dataset: uint8 [H, W, 3]."""
    process = parse_preprocess(preprocess, image_size)
    named = itertools.chain(
        ((path, lambda path=path: read_file(path)) for path in paths),
        (
            (source.describe(i), lambda i=i: source[i]["image"])
            for i in range(len(source) if source else 0)
        ),
    )
    for number, (name, read) in enumerate(named):
        try:
            yield process(read(), np.random.default_rng(number))
        except ValueError as error:
            raise InputError(f"{name}: {error}") from error


def look(
    model: Model, params: dict, images: Iterator[np.ndarray], shown: int, batch_size: int = 8
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Runs the model on the images.

    Returns the images to show, their attention maps, the mean attention distances [L, H] in pixels,
    and the number of images in these means.
    """
    maps = jax.jit(lambda images: attention.attention_maps(model, params, images))
    distances = jax.jit(lambda images: attention.head_distances(model, params, images).sum(axis=1))
    kept, seen, total, count = [], [], 0.0, 0
    while batch := list(itertools.islice(images, batch_size)):
        if count < shown:
            kept += batch[: shown - count]
            seen += list(np.asarray(maps(np.stack(batch))))[: shown - count]
        total = total + np.asarray(distances(np.stack(batch)), np.float64)
        count += len(batch)
    if not count:
        raise InputError("no images: name image files, or give --dataset and --split")
    return np.stack(kept), np.stack(seen), total / count, count
