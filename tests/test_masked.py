"""Masked patch prediction: what is corrupted, what is predicted, and that it is learned."""

import dataclasses

import jax
import numpy as np
import pytest

from vit_jax.losses.masked_patches import (
    MASK,
    MaskedPatchConfig,
    colors_4x4,
    corrupt,
    masked_patch_losses,
    mean_color,
    patch_outputs,
    pixels,
    quantize,
    split_patches,
)
from vit_jax.models.variants import ModelConfig, build_model

CONFIG = MaskedPatchConfig()
SMALL = {"width": 32, "depth": 1, "mlp_dim": 32, "num_heads": 2, "dtype": "float32", "pool": "gap"}


def keys(number):
    return jax.random.split(jax.random.key(0), number)


def test_half_of_the_patches_are_corrupted_as_the_paper_says():
    sources, corrupted = jax.vmap(lambda key: corrupt(CONFIG, key, 200))(keys(50))
    itself = np.arange(200)
    assert (corrupted.sum(axis=1) == 100).all()
    assert ((sources == MASK).sum(axis=1) == 80).all()
    another = (sources != MASK) & (sources != itself)
    assert (another.sum(axis=1) == 10).all()
    assert (corrupted[(sources == MASK) | another]).all()
    assert sources.max() < 200
    # Patches everywhere are chosen, and not the same in each image.
    assert (np.abs(corrupted.mean(axis=0) - 0.5) < 0.35).all()
    assert (sources[0] != sources[1]).any()
    taken = np.asarray(sources)[another]
    assert abs(taken.mean() - 99.5) < 15 and len(np.unique(taken)) > 150


def test_patches_are_cut_as_the_model_cuts_them():
    images = np.random.default_rng(0).normal(size=(2, 4, 6, 3)).astype(np.float32)
    patches = split_patches(images, (2, 3))
    assert patches.shape == (2, 6, 2, 2, 3)
    np.testing.assert_array_equal(patches[1, 4], images[1, 2:4, 2:4])


def test_colours_have_three_bits():
    levels = np.array([0, 31, 32, 255, 128]) / 127.5 - 1
    for channel, unit in enumerate((64, 8, 1)):
        colors = np.full((5, 3), -1.0)
        colors[:, channel] = levels
        np.testing.assert_array_equal(quantize(colors), np.array([0, 0, 1, 7, 4]) * unit)


def test_targets():
    images = np.random.default_rng(0).uniform(-1, 1, (2, 16, 24, 3)).astype(np.float32)
    patches = split_patches(images, (2, 3))
    assert mean_color(patches).shape == (2, 6, 1)
    expected = np.floor((images[0, 8:16, 8:16].mean(axis=(0, 1)) + 1) * 4) @ [64, 8, 1]
    assert mean_color(patches)[0, 4, 0] == expected
    assert colors_4x4(patches).shape == (2, 6, 16)
    expected = np.floor((images[0, 8:10, 10:12].mean(axis=(0, 1)) + 1) * 4) @ [64, 8, 1]
    assert colors_4x4(patches)[0, 4, 1] == expected
    np.testing.assert_array_equal(pixels(patches)[0, 4].reshape(8, 8, 3), images[0, 8:16, 8:16])


@pytest.mark.long
@pytest.mark.parametrize(
    ("variant", "target"),
    [("ViT-Ti/8", "mean_color"), ("ViT-Ti/8", "pixels"), ("R+Ti/16", "mean_color")],
)
def test_nothing_of_a_masked_patch_is_seen(variant, target):
    config = dataclasses.replace(CONFIG, target=target)
    cell = (32, 32) if "+" in variant else (8, 8)
    options = {**SMALL, "patch_outputs": patch_outputs(config, cell)}
    if "+" in variant:
        options["stem_width"] = 32
    model = build_model(ModelConfig(variant, **options), 0, (64, 64))
    params = jax.jit(model.init)(jax.random.key(0))
    head = params["patch_head"]["kernel"]
    params["patch_head"]["kernel"] = 0.1 * jax.random.normal(jax.random.key(1), head.shape)
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3)).astype(np.uint8)
    sources = np.broadcast_to(np.arange(np.prod(model.grid)), (2, np.prod(model.grid))).copy()
    sources[:, 0] = MASK
    apply = jax.jit(lambda images, sources: model.apply(params, images, None, sources).patches)
    found = apply(images, sources)
    if "+" not in variant:  # a stem sees over the edges of its cells
        other = images.copy()
        other[:, : cell[0], : cell[1]] = 0
        np.testing.assert_array_equal(apply(other, sources), found)
        sources[:, 0] = 1
        assert np.abs(apply(other, sources) - found).max() > 1e-4
    losses, right, _ = masked_patch_losses(config, model, params, images, keys(2), train=False)
    assert losses.shape == right.shape == (2,) and np.isfinite(losses).all()
    if target == "mean_color":
        assert abs(losses.mean() - np.log(512)) < 1  # as good as a guess


def test_what_no_model_can_do_is_refused():
    with pytest.raises(ValueError, match="did you mean 'mean_color'"):
        MaskedPatchConfig(target="mean_colour")
    with pytest.raises(ValueError, match="sum to 1"):
        MaskedPatchConfig(masked=0.9, swapped=0.2)
    with pytest.raises(ValueError, match=r"corrupted = 0.0"):
        MaskedPatchConfig(corrupted=0.0)
    with pytest.raises(ValueError, match="patches of 14 x 14: 4 must divide"):
        patch_outputs(MaskedPatchConfig(target="colors_4x4"), (14, 14))
    with pytest.raises(ValueError, match="R26x1 doesn't have this field"):
        build_model(ModelConfig("R26x1", patch_outputs=512), 0, (32, 32))
