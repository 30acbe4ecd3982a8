r"""Draws what a model learned: the pictures of Figures 6, 7, 10, 11 and 14 of arXiv 2010.11929.

vit_jax visualize --model=runs/b16 --output=pictures photo.jpg another.png
vit_jax visualize --model=L_16.npz --output=pictures --dataset=imagenet2012 \
    --split='validation[:128]' --preprocess='central_crop(0.875)'

filters: principal components of the filters on the image. positions: similarity of the position
embeddings. attention_distance: how far each head looks, averaged over the images. rollout: where
the model looks in each image. Each as PNG and PDF, and their numbers in visualize.json. A ResNet
has filters alone. `--model` is whatever `evaluate --checkpoint` reads.
"""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from absl import flags
from matplotlib.figure import Figure

from vit_jax.command_line import run
from vit_jax.config import explained_errors
from vit_jax.data.augment import parse_preprocess
from vit_jax.data.decode import decode_image
from vit_jax.data.files import read_file
from vit_jax.data.listing import find_images
from vit_jax.data.sources import open_source
from vit_jax.models.variants import Model
from vit_jax.pictures import attention, figures
from vit_jax.weights.trained import load

MODEL = flags.DEFINE_string("model", None, "A run's workdir, a checkpoint, a file or its URL.")
OUTPUT = flags.DEFINE_string("output", None, "Folder for the pictures.")
DATASET = flags.DEFINE_string("dataset", "", "Name, as in a recipe's data.dataset.")
SPLIT = flags.DEFINE_string("split", "test[:128]", "Split of the dataset.")
DATA_DIR = flags.DEFINE_string("data_dir", None, "Where prepared datasets lie.")
PREPROCESS = flags.DEFINE_string("preprocess", "resize", "As in a recipe's data.preprocess.")
SHOWN = flags.DEFINE_integer("shown", 8, "Images whose rollout is drawn.", lower_bound=1)
flags.mark_flag_as_required("output")


def read_images(paths: list[Path], image_size: tuple[int, int]) -> Iterator[np.ndarray]:
    """The images of the files, or of the dataset, one after another: uint8 [H, W, 3]."""
    preprocess = parse_preprocess(PREPROCESS.value, image_size)
    source = open_source(DATASET.value, SPLIT.value, DATA_DIR.value) if DATASET.value else []
    named = itertools.chain(
        ((path, lambda path=path: read_file(path)) for path in paths),
        (
            (f"{DATASET.value} {SPLIT.value}: example {i}", lambda i=i: source[i]["image"])
            for i in range(len(source))
        ),
    )
    for number, (name, read) in enumerate(named):
        try:
            yield preprocess(decode_image(read()), np.random.default_rng(number))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error


def look(
    model: Model, params: dict, images: Iterator[np.ndarray], shown: int, batch_size: int = 8
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """(the images to show, their maps, pixels [L, H], how many images those are the mean of)."""
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
        raise ValueError("no images: name image files, or give --dataset and --split")
    return np.stack(kept), np.stack(seen), total / count, count


def visualize(paths: list[str]) -> tuple[dict[str, Figure], dict]:
    """The pictures by name, and their numbers."""
    trained = load(MODEL.value)
    model, params = trained.architecture, trained.params
    components, shares = attention.filter_components(attention.rgb_filters(model, params))
    pictures = {"filters": figures.draw_filters(components, shares)}
    numbers: dict = {"filter_variance_shares": shares.tolist()}
    if model.grid is None:
        print(f"{model.config.variant} has no patches and no attention: its filters alone")
        return pictures, numbers
    try:
        table = attention.position_embeddings(model, params)
    except ValueError as error:
        print(f"no picture of positions: {error}")
    else:
        pictures["positions"] = figures.draw_positions(attention.cosine_similarity(table))
    images = read_images(find_images(paths), model.image_size)
    kept, seen, distances, count = look(model, params, images, SHOWN.value)
    pictures["rollout"] = figures.draw_rollout(kept, seen)
    pictures["attention_distance"] = figures.draw_distances(distances)
    numbers |= {"attention_distance_pixels": distances.tolist(), "images": count}
    return pictures, numbers


def main(arguments: list[str]) -> None:
    """Draws, and says where."""
    with explained_errors():
        pictures, numbers = visualize(arguments[1:])
        folder = Path(OUTPUT.value)
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in pictures.items():
            for ending in ("png", "pdf"):
                figure.savefig(folder / f"{name}.{ending}", dpi=200)
        (folder / "visualize.json").write_text(json.dumps(numbers, indent=1) + "\n")
        print(f"{', '.join(pictures)} in {folder}")


if __name__ == "__main__":
    run(main, "model", rest="IMAGE ...")
