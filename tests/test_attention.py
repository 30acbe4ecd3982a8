"""Rollout, attention distance, similarity of positions, principal components of filters."""

import jax
import numpy as np
import pytest

from vit_jax.models.variants import ModelConfig, build_model
from vit_jax.pictures.attention import (
    attention_maps,
    cosine_similarity,
    filter_components,
    head_distances,
    mean_attention_distance,
    patch_distances,
    position_embeddings,
    rgb_filters,
    rollout,
)

SMALL = {"width": 32, "depth": 2, "mlp_dim": 32, "num_heads": 2, "dtype": "float32"}


def weights(*shape):
    logits = np.random.default_rng(0).normal(size=shape)
    return np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)


def test_rollout_is_a_share_of_each_input():
    rolled = rollout(weights(3, 2, 4, 5, 5))
    assert rolled.shape == (2, 5, 5)
    np.testing.assert_allclose(rolled.sum(axis=-1), 1.0, rtol=1e-6)
    assert (rolled >= 0).all()


def test_rollout_of_known_attention():
    identity = np.broadcast_to(np.eye(4), (3, 1, 2, 4, 4))
    np.testing.assert_allclose(rollout(identity)[0], np.eye(4), atol=1e-7)
    uniform = np.full((1, 1, 2, 4, 4), 0.25)
    np.testing.assert_allclose(rollout(uniform)[0], (np.eye(4) + 0.25) / 2, atol=1e-7)
    # Two layers: what token 1 took from token 0, token 2 takes from token 1.
    first, second = np.eye(3), np.eye(3)
    first[1], second[2] = [1, 0, 0], [0, 1, 0]
    rolled = rollout(np.stack([first, second])[:, None, None])[0]
    np.testing.assert_allclose(rolled[2], [0.25, 0.25, 0.5], atol=1e-7)


def test_distances_between_patches():
    distances = patch_distances((2, 3), (16, 16))
    assert distances.shape == (6, 6)
    assert distances[0, 1] == 16 and distances[0, 3] == 16
    assert distances[0, 5] == pytest.approx(np.hypot(16, 32))


def test_attention_to_oneself_has_no_distance_and_uniform_attention_the_mean_one():
    distances = patch_distances((3, 4), (8, 8))
    identity = np.broadcast_to(np.eye(13), (1, 1, 2, 13, 13))
    np.testing.assert_array_equal(mean_attention_distance(identity, distances), 0)
    uniform = np.full((2, 1, 3, 13, 13), 1 / 13)
    found = mean_attention_distance(uniform, distances)
    assert found.shape == (2, 1, 3)
    np.testing.assert_allclose(found, distances.mean(), rtol=1e-5)


@pytest.mark.parametrize(
    ("variant", "options"),
    [
        ("ViT-Ti/8", {"pool": "token"}),
        ("ViT-Ti/8", {"pool": "gap", "registers": 2, "scan": True}),
        ("R+Ti/16", {"stem_width": 32}),
    ],
)
def test_models(variant, options):
    model = build_model(ModelConfig(variant, **SMALL, **options), 3, (64, 96))
    params = jax.jit(model.init)(jax.random.key(0))
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 96, 3)).astype(np.uint8)
    maps = np.asarray(attention_maps(model, params, images))
    assert maps.shape == (2, *model.grid)
    assert (maps > 0).all() and (maps.sum(axis=(1, 2)) < 1).all()
    distances = head_distances(model, params, images)
    assert distances.shape == (2, 2, 2)
    assert (distances > 0).all() and (distances < np.hypot(64, 96)).all()
    assert position_embeddings(model, params).shape == (*model.grid, 32)
    side = 7 if "+" in variant else 8  # the root of a ResNet
    assert rgb_filters(model, params).shape == (side, side, 3, 32)


def test_similarity_of_positions():
    table = np.random.default_rng(0).normal(size=(2, 3, 8))
    similarity = cosine_similarity(table)
    assert similarity.shape == (2, 3, 2, 3)
    for row, column in np.ndindex(2, 3):
        assert similarity[row, column, row, column] == pytest.approx(1)
        assert similarity[0, 0, row, column] == pytest.approx(similarity[row, column, 0, 0])
    np.testing.assert_allclose(cosine_similarity(3 * table), similarity)


def test_positions_are_those_of_the_model():
    config = ModelConfig("ViT-Ti/8", **SMALL, position="learned_2d")
    model = build_model(config, 3, (16, 24))
    table = position_embeddings(model, jax.device_get(jax.jit(model.init)(jax.random.key(0))))
    np.testing.assert_array_equal(table[0, :, :16], np.broadcast_to(table[0, 0, :16], (3, 16)))
    np.testing.assert_array_equal(table[:, 1, 16:], np.broadcast_to(table[0, 1, 16:], (2, 16)))
    model = build_model(ModelConfig("ViT-Ti/8", **SMALL, position="rotary"), 3, (16, 24))
    with pytest.raises(ValueError, match="rotary positions in layers"):
        position_embeddings(model, {})


def test_components_are_those_that_filters_are_made_of():
    rng = np.random.default_rng(0)
    parts = np.linalg.qr(rng.normal(size=(4 * 4 * 3, 2)))[0].T
    filters = (rng.normal(size=(100, 2)) * [3, 1]) @ parts
    components, shares = filter_components(filters.T.reshape(4, 4, 3, 100), count=5)
    assert components.shape == (5, 4, 4, 3)
    assert shares[0] > shares[1] and shares[:2].sum() == pytest.approx(1)
    span = components[:2].reshape(2, -1)
    np.testing.assert_allclose(span.T @ span @ parts.T, parts.T, atol=1e-6)
