"""Broken images and weight files: read exactly or a ValueError; no crash, hang or much memory."""

import pytest

from experiments.campaigns import files, weights
from vit_jax.data.decode import decode_image


def check(outcomes, least):
    assert not any(name.startswith("WRONG") for name in outcomes), outcomes
    assert min(outcomes[name] for name in ("read", "refused")) > least


def test_some_broken_images():
    check(files.images(360, seed=0), 100)


@pytest.mark.slow
def test_ten_thousand_broken_images():
    """Of 20,000 readings 5,062 gave an image (Pillow 13.0.0, simplejpeg 1.9.0), in 14 s."""
    check(files.images(10_000, seed=1), 3000)


def test_unharmed_images_are_read():
    for file in files.whole_images():
        assert decode_image(file).shape == (70, 90, 3)


def test_some_broken_weights(tmp_path):
    formats = ("npz", "hugging_face")
    outcomes = weights.weights(40, 0, tmp_path, formats)
    assert not any("WRONG" in name for name in outcomes), outcomes
    assert all(outcomes[f"{name}: refused"] > 10 for name in formats), outcomes
