"""Image files to the probabilities of a model's own classes."""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np

from vit_jax.data.augment import parse_preprocess
from vit_jax.data.decode import decode_image
from vit_jax.data.files import IMAGE_ENDINGS
from vit_jax.models.variants import Model


def find_images(paths: Iterable[str]) -> list[Path]:
    """Files as they are named; of folders all images inside, sorted."""
    found = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = (p for p in sorted(path.rglob("*")) if p.suffix.lower() in IMAGE_ENDINGS)
            found += [p for p in inside if p.is_file() and not p.name.startswith(".")]
        else:
            found.append(path)
    return found


def predict(
    model: Model,
    params: dict,
    files: Sequence[Path],
    preprocess: str = "resize",
    *,
    temperature: float = 1.0,
    batch_size: int = 32,
) -> Iterator[tuple[Path, np.ndarray | str]]:
    """Yields (file, probabilities [C], or why it can't be read), in the order of `files`."""
    prepare = parse_preprocess(preprocess, model.image_size)

    def read(file: Path) -> np.ndarray | str:
        try:
            image = prepare(decode_image(file.read_bytes()), np.random.default_rng(0))
            if image.shape != (*model.image_size, 3):
                raise ValueError(f"{preprocess} gives {image.shape}, expected {model.image_size}")
            return image
        except (OSError, ValueError) as error:
            return str(error)

    @jax.jit
    def forward(params: dict, images: jax.Array) -> jax.Array:
        return jax.nn.softmax(model.apply(params, images).logits / temperature)

    with ThreadPoolExecutor(8) as threads:
        for start in range(0, len(files), batch_size):
            group = files[start : start + batch_size]
            images = list(threads.map(read, group))
            good = [image for image in images if not isinstance(image, str)]
            rows = iter(())
            if good:
                padding = [np.zeros_like(good[0])] * (batch_size - len(good))
                rows = iter(np.asarray(forward(params, np.stack(good + padding))))
            for file, image in zip(group, images, strict=True):
                yield file, image if isinstance(image, str) else next(rows)
