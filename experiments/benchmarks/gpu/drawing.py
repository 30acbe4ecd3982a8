"""Draws images by formula and encodes them as JPEGs, for benchmarks."""

import functools
import io

import cv2
import numpy as np
from PIL import Image

from vit_jax.data import jpeg_markers

CLASSES = 20
TEXTURE = (750, 1000)  # height and width in pixels
QUALITY = 88  # gives about 60 KB at 500 x 375 pixels


@functools.cache
def _texture(number: int) -> np.ndarray:
    """Draws noise of all scales, with a hue and a grain of its own. float32 [H, W, 3]."""
    rng = np.random.Generator(np.random.Philox(key=np.array([1, number], np.uint64)))
    picture, cells, power = np.zeros((*TEXTURE, 3), np.float32), 4, rng.uniform(0.2, 0.4)
    while cells < TEXTURE[0]:
        grid = rng.standard_normal((cells, cells * 4 // 3, 3), np.float32)
        grid *= rng.uniform(0.5, 1.5, 3).astype(np.float32) / cells**power
        picture += cv2.resize(grid, TEXTURE[::-1], interpolation=cv2.INTER_CUBIC)
        cells *= 2
    return picture


def draw(index: int, size: tuple[int, int]) -> np.ndarray:
    """Draws a part of its class's texture over a part of another. uint8 [H, W, 3].

    `size` is (height, width), at most `TEXTURE`. Image i has the label i % `CLASSES`.
    """
    rng = np.random.Generator(np.random.Philox(key=np.array([0, index], np.uint64)))
    (rows, columns), parts = size, []
    for number in (index % CLASSES, CLASSES + int(rng.integers(CLASSES))):
        top, left = (int(rng.integers(a - b + 1)) for a, b in zip(TEXTURE, size, strict=True))
        parts.append(_texture(number)[top : top + rows, left : left + columns])
    return np.clip(128 + 40 * (parts[0] + parts[1]), 0, 255).astype(np.uint8)


def encode(pixels: np.ndarray, markers: bool) -> bytes:
    """Encodes a JPEG with 4:2:0 chroma; `markers` adds restart markers and their index."""
    across = -(-pixels.shape[1] // 16)  # blocks of 16 pixels in a row
    interval = max(n for n in range(1, across + 1) if across % n == 0 and n <= max(across // 4, 1))
    options = {"restart_marker_blocks": interval} if markers else {}
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=QUALITY, subsampling="4:2:0", **options)
    data = file.getvalue()
    if not markers:
        return data
    indexed = jpeg_markers.add_index(data)
    if indexed is None:
        raise ValueError(
            f"no index for a JPEG of {pixels.shape[1]} pixels and markers each {interval}"
        )
    return indexed
