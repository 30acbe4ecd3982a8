"""Draws images by formula and encodes them as JPEGs, for benchmarks."""

import io

import cv2
import numpy as np
from PIL import Image

from vit_jax.data import jpeg_markers

CLASSES = 20
QUALITY = 88  # gives about 60 KB at 500 x 375 pixels


def draw(index: int, size: tuple[int, int]) -> np.ndarray:
    """Draws an image: noise at all scales, with a hue and a grain of its class. uint8 [H, W, 3]."""
    rng = np.random.Generator(np.random.Philox(key=np.array([0, index], np.uint64)))
    rows, columns = size
    label, picture = index % CLASSES, np.zeros((rows, columns, 3), np.float32)
    cells = 2
    while cells < rows:
        grid = rng.standard_normal((cells, cells * 4 // 3, 3), np.float32)
        grid[..., label % 3] *= 1.5
        power = 0.42 + 0.2 * (label // 3) / CLASSES
        picture += cv2.resize(grid, (columns, rows), interpolation=cv2.INTER_CUBIC) / cells**power
        cells *= 2
    return np.clip(128 + 45 * picture, 0, 255).astype(np.uint8)


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
