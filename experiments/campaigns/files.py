"""Mutates image files: each is read, or refused with a ValueError."""

import io
import resource
import time
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from vit_jax.data import jpeg_markers
from vit_jax.data.augment import parse_preprocess
from vit_jax.data.decode import decode_image, open_image

CROP = parse_preprocess("inception_crop|flip", (24, 24))


def whole_images() -> list[bytes]:
    """Small images of every kind that is mutated."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:70, :90]
    smooth = np.stack([rows * 3, columns * 2, rows + columns], axis=2)
    pixels = (smooth + rng.integers(30, size=smooth.shape)).clip(0, 255).astype(np.uint8)
    image = Image.fromarray(pixels)
    alpha = image.convert("RGBA")
    alpha.putalpha(image.convert("L"))
    frames = {"save_all": True, "append_images": [image.rotate(90)]}
    kinds = [
        (image, "JPEG", {}),
        (image, "JPEG", {"progressive": True, "quality": 90}),
        (image, "JPEG", {"subsampling": 0, "restart_marker_rows": 1}),
        (image.convert("L"), "JPEG", {}),
        (image.convert("CMYK"), "JPEG", {}),
        (image, "PNG", {}),
        (alpha, "PNG", {}),
        (image.quantize(32), "PNG", {}),
        (Image.fromarray(pixels[:, :, 0].astype(np.uint16) * 257), "PNG", {}),
        (image, "WEBP", {}),
        (alpha, "WEBP", {"lossless": True}),
        (image, "WEBP", frames),
    ]
    files = []
    for picture, name, options in kinds:
        file = io.BytesIO()
        picture.save(file, name, **options)
        files.append(file.getvalue())
    file = io.BytesIO()
    image.save(file, "JPEG", restart_marker_blocks=2)
    return [*files, jpeg_markers.add_index(file.getvalue())]


def mutate(file: bytes, rng: np.random.Generator, header: int = 700, faults: int = 4) -> bytes:
    """Returns a file with one to `faults` faults, half of them in its first `header` bytes."""
    data = bytearray(file)
    for _ in range(rng.integers(1, faults + 1)):
        at = int(rng.integers(len(data)))
        if rng.random() < 0.5:
            at = int(rng.integers(min(len(data), header)))
        span = int(rng.integers(1, 65))
        match rng.integers(7):
            case 0:
                data[at] = rng.integers(256)
            case 1:
                data[at] ^= 1 << int(rng.integers(8))
            case 2:
                del data[at : at + span]
            case 3:
                data[at:at] = data[at : at + span]
            case 4:
                data[at : at + span] = rng.bytes(len(data[at : at + span]))
            case 5:
                data[at : at + 4] = b"\xff\xff\xff\xff"[: len(data[at : at + 4])]
            case 6:
                del data[at:]
        if not data:
            break
    return bytes(data)


def images(count: int, seed: int, folder: Path | None = None) -> dict[str, int]:
    """Counts how many mutated images were read and refused, by both ways of decoding.

    More than 20 s for one, 2 GiB more memory, and any exception but ValueError are wrong.
    """
    rng, files, outcomes = np.random.default_rng(seed), whole_images(), Counter()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB
    for i in range(count):
        data = mutate(files[i % len(files)], rng)
        began = time.process_time()
        for read in (decode_image, lambda data: CROP(open_image(data), np.random.default_rng(0))):
            outcomes[_read_image(read, data)] += 1
        if time.process_time() - began > 20:
            outcomes[f"WRONG: file {i} takes more than 20 s"] += 1
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
    if grown > 2 << 20:
        outcomes[f"WRONG: {grown >> 10} MiB more memory"] += 1
    return dict(outcomes)


def _read_image(read, data: bytes) -> str:
    try:
        pixels = read(data)
    except ValueError as error:
        return "refused" if "cannot decode" in str(error) else f"WRONG: {error}"
    except Exception as error:  # counted as wrong
        return f"WRONG: {type(error).__name__}: {error}"
    whole = pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3
    return "read" if whole else f"WRONG: {pixels.dtype} {pixels.shape}"
