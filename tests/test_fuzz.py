"""Broken image files give an image or a ValueError, never a crash, a hang or much memory."""

import io
import resource
import time

import numpy as np
import pytest
from PIL import Image

from vit_jax.data import jpeg_markers
from vit_jax.data.augment import parse_preprocess
from vit_jax.data.decode import decode_image, open_image

SIZE = (24, 24)


def whole_files():
    """Makes small images of every kind to mutate."""
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


def mutate(file, rng):
    """Makes one to four faults in a file."""
    data = bytearray(file)
    for _ in range(rng.integers(1, 5)):
        at = int(rng.integers(len(data)))
        if rng.random() < 0.5:  # where the sizes stand
            at = int(rng.integers(min(len(data), 700)))
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


def check(count, seed):
    """Counts the mutated files that were read and those refused, by both ways to decode."""
    rng = np.random.default_rng(seed)
    files = whole_files()
    crop = parse_preprocess("inception_crop|flip", SIZE)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB
    outcomes = {"read": 0, "refused": 0}
    for i in range(count):
        data = mutate(files[i % len(files)], rng)
        start = time.process_time()
        for read in (decode_image, lambda data: crop(open_image(data), np.random.default_rng(0))):
            try:
                pixels = read(data)
            except ValueError as error:
                assert "cannot decode" in str(error)
                outcomes["refused"] += 1
            else:
                assert pixels.dtype == np.uint8
                assert pixels.ndim == 3 and pixels.shape[2] == 3
                outcomes["read"] += 1
        assert time.process_time() - start < 20, f"file {i} of seed {seed}"
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
    assert grown < 2 << 20, f"{grown} KiB"
    return outcomes


def test_some_broken_files():
    outcomes = check(360, seed=0)
    assert min(outcomes.values()) > 100  # both happen


@pytest.mark.slow
def test_ten_thousand_broken_files():
    """5,062 of 20,000 readings gave an image (Pillow 13.0.0, simplejpeg 1.9.0), in 14 s."""
    outcomes = check(10_000, seed=1)
    print(outcomes)
    assert min(outcomes.values()) > 3000


def test_unharmed_files_are_read():
    for file in whole_files():
        assert decode_image(file).shape == (70, 90, 3)
