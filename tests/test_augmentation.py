"""Colour jitter, mixup and cutmix against their formulas, and their distributions."""

import colorsys
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance
from scipy import stats

from vit_jax.parallel.mesh import MeshConfig, batch_sharding, make_mesh, use_mesh
from vit_jax.training.augmentation import (
    AugmentationConfig,
    augment,
    color_jitter,
    draw,
    inside_box,
)

ROWS = 8


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (ROWS, 12, 10, 3)).astype(np.uint8)
    return images, np.eye(ROWS, dtype=np.float32)  # a class a row: targets tell who was mixed


draw_once = jax.jit(draw, static_argnums=(0, 3))
augment_once, jitter_once = jax.jit(augment), jax.jit(color_jitter)


def draws_of(config, seed=0, step=0, rows=ROWS):
    return jax.tree.map(np.asarray, draw_once(config, seed, step, rows))


def test_without_augmentation_images_are_as_published(batch):
    images, targets = batch
    assert draws_of(AugmentationConfig()) == {}
    out, same = augment(images, targets, {})  # not compiled, which would round otherwise
    np.testing.assert_array_equal(out, (images.astype(np.float32) - 127.5) / 127.5)
    np.testing.assert_array_equal(same, targets)


@pytest.mark.parametrize("per_example", [False, True])
def test_mixup(batch, per_example):
    images, targets = batch
    draws = draws_of(AugmentationConfig(mixup=0.5, per_example=per_example))
    out, mixed = augment_once(images, targets, draws)
    share = draws["mixup"]
    assert len(np.unique(share)) == (ROWS if per_example else 1)
    plain = (images - 127.5) / 127.5
    for row in range(ROWS):
        partner, own = row ^ 1, share[row]
        expected = own * plain[row] + (1 - own) * plain[partner]
        np.testing.assert_allclose(out[row], expected, atol=1e-6)
        expected = own * targets[row] + (1 - own) * targets[partner]
        np.testing.assert_allclose(mixed[row], expected, atol=1e-6)
        assert np.argmax(mixed[row]) == row


@pytest.mark.parametrize("per_example", [False, True])
def test_cutmix_labels_are_shares_of_pixels(batch, per_example):
    images, targets = batch
    plain = ((images.astype(np.float32) - 127.5) / 127.5).round(4)
    kept_shares = []
    for step in range(5):
        draws = draws_of(AugmentationConfig(cutmix=1.0, per_example=per_example), step=step)
        out, mixed = augment_once(images, targets, draws)
        for row in range(ROWS):
            own = (np.asarray(out[row]).round(4) == plain[row]).all(-1)
            other = (np.asarray(out[row]).round(4) == plain[row ^ 1]).all(-1)
            assert (own | other).all()
            rows, columns = np.nonzero(~own)
            if len(rows):  # one rectangle
                assert len(rows) == (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
            assert mixed[row, row] == pytest.approx(own.mean(), abs=1e-6)
            assert mixed[row].sum() == pytest.approx(1, abs=1e-6)
            kept_shares.append(own.mean())
    assert len(set(kept_shares)) > (10 if per_example else 2)


def test_cutmix_box_by_the_authors_formula():
    height, width = 31, 64
    for kept, y, x in np.random.default_rng(0).random((50, 3)).astype(np.float32):
        found = inside_box(jnp.array([kept]), jnp.array([[y, x]]), (height, width))[0, ..., 0]
        side = np.sqrt(1 - kept)
        cut_height, cut_width = int(height * side), int(width * side)
        row, column = int(height * y), int(width * x)
        expected = np.zeros((height, width), bool)
        top, left = max(row - cut_height // 2, 0), max(column - cut_width // 2, 0)
        expected[top : row + cut_height // 2, left : column + cut_width // 2] = True
        np.testing.assert_array_equal(found, expected)


def test_shares_are_beta_distributed_and_a_fair_coin_chooses():
    config = AugmentationConfig(mixup=0.2, cutmix=1.0)
    steps = jax.jit(jax.vmap(lambda step: draw(config, 5, step, 2)))(jnp.arange(2000))
    mixup, cutmix = np.asarray(steps["mixup"]), np.asarray(steps["cutmix"])
    np.testing.assert_array_equal(mixup[:, 0], mixup[:, 1])
    mixup, cutmix = mixup[:, 0], cutmix[:, 0]
    cuts = cutmix < 1
    assert (mixup[cuts] == 1).all()
    assert 900 < cuts.sum() < 1100  # 4 standard deviations
    assert stats.kstest(cutmix[cuts], "uniform").pvalue > 1e-3
    assert stats.kstest(np.asarray(steps["centre"])[:, 0].ravel(), "uniform").pvalue > 1e-3
    beta = np.random.default_rng(0).beta(0.2, 0.2, 20_000)
    assert stats.ks_2samp(mixup[~cuts], np.maximum(beta, 1 - beta)).pvalue > 1e-3
    rows = draws_of(AugmentationConfig(0.8, 1.0, per_example=True), rows=64)
    assert 16 < (rows["cutmix"] < 1).sum() < 48


def test_draws_are_a_function_of_seed_step_and_row():
    config = AugmentationConfig(0.8, 1.0, per_example=True, brightness=0.5, hue=0.1)
    draws = draws_of(config)
    assert draws["jitter"].shape == (ROWS, 4)
    assert not draws["jitter"][:, 1:3].any()
    fewer = draws_of(config, rows=4)  # a row's own numbers don't depend on the batch
    for name, values in draws.items():
        np.testing.assert_array_equal(values[:4], fewer[name])
        assert not np.array_equal(values, draws_of(config, seed=1)[name])
        assert not np.array_equal(values, draws_of(config, step=1)[name])


def test_no_image_crosses_the_network():
    """With a batch split over 8 devices. Rolling it by a row would need communication."""
    mesh = make_mesh(MeshConfig())
    images = jax.ShapeDtypeStruct((32, 8, 8, 3), jnp.uint8, sharding=batch_sharding(mesh))
    targets = jax.ShapeDtypeStruct((32, 5), jnp.float32, sharding=batch_sharding(mesh))

    def collectives(function):
        split = batch_sharding(mesh)
        with use_mesh(mesh):
            text = jax.jit(function, out_shardings=split).lower(images, targets).compile().as_text()
        return re.findall(r"all-to-all|all-gather|all-reduce|collective-permute", text)

    config = AugmentationConfig(0.8, 1.0, brightness=0.2, contrast=0.2)
    assert not collectives(lambda x, y: augment(x, y, draw(config, 0, 1, 32)))
    assert collectives(lambda x, y: (jnp.roll(x, 1, axis=0), y))  # shows that the check can fail


def test_color_jitter_against_pillow():
    rng = np.random.default_rng(0)
    images = np.stack(
        [
            np.asarray(Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).resize((20, 16)))
            for _ in range(4)
        ]
    )
    jitter = rng.uniform(-0.8, 0.8, (4, 4)).astype(np.float32)
    jitter[:, 3] = 0
    found = np.asarray(jitter_once(images / np.float32(255), jitter)) * 255
    for row in range(4):
        expected = Image.fromarray(images[row])
        for kind, offset in zip(("Brightness", "Contrast", "Color"), jitter[row], strict=False):
            expected = getattr(ImageEnhance, kind)(expected).enhance(1 + offset)
        # Pillow rounds to whole numbers three times, which factors up to 1.8 carry on.
        assert np.abs(found[row] - np.asarray(expected)).max() < 6
        assert np.abs(found[row] - np.asarray(expected)).mean() < 1.5


def test_hue_against_colorsys():
    images = np.random.default_rng(0).random((6, 1, 5, 3)).astype(np.float32)
    images[0, 0, 0] = 0.3  # grey has no hue
    for turn in (-0.5, -0.2, 0.1, 0.4):
        jitter = np.tile(np.float32([0, 0, 0, turn]), (6, 1))
        found = np.asarray(jitter_once(images, jitter))
        for index in np.ndindex(6, 1, 5):
            hue, saturation, value = colorsys.rgb_to_hsv(*images[index].tolist())
            expected = colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value)
            np.testing.assert_allclose(found[index], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixup": -1.0}, "mixup = -1.0"),
        ({"hue": 0.6}, "hue = 0.6: expected 0 to 0.5"),
        ({"contrast": 1.5}, "contrast = 1.5: expected 0 to 1"),
        ({"per_example": True}, "per_example: set mixup or cutmix"),
    ],
)
def test_bad_augmentations(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        AugmentationConfig(**options)
