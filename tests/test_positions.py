"""Position embeddings: every cell of the paper's Table 8, and the laws of each kind."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.models.positions import KINDS, PLACES, rotary_angles, rotate, sincos_2d
from vit_jax.models.stacking import stack_layers
from vit_jax.models.variants import ModelConfig, build_model
from vit_jax.weights.adapt import flatten

IMAGES = np.random.default_rng(0).uniform(-1, 1, (2, 16, 24, 3)).astype(np.float32)
CELLS = [(kind, place) for kind in KINDS[1:] for place in PLACES]


def vit(position, position_at=None, **options):
    sizes = {"width": 32, "depth": 2, "mlp_dim": 32, "num_heads": 2}
    config = ModelConfig(
        "ViT-mu/8",
        **sizes,
        position=position,
        position_at=position_at,
        dtype="float32",
        **options,
    )
    model = build_model(config, 3, IMAGES.shape[1:3])
    rng = np.random.default_rng(1)  # parameters far from zero, so that all of them matter
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return model, jax.tree.map(lambda s: 0.3 * rng.normal(size=s.shape).astype("f"), shapes)


def features(model, params, images=IMAGES):
    return np.asarray(jax.jit(model.apply)(params, images).features)


def move_patches(images):
    """Reorders the patches of 8 x 8 pixels."""
    patches = images.reshape(2, 2, 8, 3, 8, 3).swapaxes(2, 3).reshape(2, 6, 8, 8, 3)
    patches = patches[:, [3, 0, 5, 1, 4, 2]]
    return patches.reshape(2, 2, 3, 8, 8, 3).swapaxes(2, 3).reshape(images.shape)


@pytest.mark.parametrize("pool", ["token", "gap"])
def test_without_positions_patches_are_a_set(pool):
    model, params = vit("none", pool=pool)
    moved = features(model, params, move_patches(IMAGES))
    np.testing.assert_allclose(features(model, params), moved, atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize(("kind", "place"), CELLS)
def test_every_cell_knows_where_patches_are(kind, place):
    model, params = vit(kind, place)
    moved = features(model, params, move_patches(IMAGES))
    assert np.abs(features(model, params) - moved).max() > 1e-3


@pytest.mark.long
@pytest.mark.parametrize(("kind", "place"), CELLS)
def test_loop_and_scan_agree(kind, place):
    model, params = vit(kind, place)
    scanned, _ = vit(kind, place, scan=True)
    stacked = stack_layers(params, 2)
    np.testing.assert_allclose(features(model, params), features(scanned, stacked), atol=1e-5)
    assert jax.tree.structure(stacked) == jax.tree.structure(
        jax.eval_shape(scanned.init, jax.random.key(0))
    )


@pytest.mark.parametrize("kind", ["learned_1d", "learned_2d", "relative"])
def test_where_the_parameters_are(kind):
    """A table at the stem or shared; one in each of the two blocks."""

    def tables(place):
        names = flatten(vit(kind, place)[1])
        return [name for name in names if "embedding" in name and "kernel" not in name]

    learned = [n for n in tables("stem") if "/" not in n]
    assert learned == [n for n in tables("shared") if "/" not in n] != []
    inside = [n for n in tables("layers") if n.startswith("Transformer/encoderblock_")]
    assert len(inside) == 2 * len(learned)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_the_three_places_differ(kind):
    """With equal tables, the stem adds the table once and the other places add it twice."""
    results = {}
    for place in PLACES:
        model, params = vit(kind, place)
        # Drawn by size, so that a table is the same in every place.
        params = jax.tree.map(
            lambda p: 0.3 * np.random.default_rng(p.size).normal(size=p.shape).astype("f"), params
        )
        results[place] = features(model, params)
    np.testing.assert_allclose(results["layers"], results["shared"], atol=1e-5)
    assert np.abs(results["stem"] - results["shared"]).max() > 1e-3


def test_relative_keys_are_those_of_offsets():
    """With zero content keys, a score is the query with the key of its offset."""
    model, params = vit("relative", "shared", pool="gap")
    table = np.asarray(params["relative_embedding"])  # [2N - 1, H, K]
    block = params["Transformer"]["encoderblock_0"]["MultiHeadDotProductAttention_0"]
    block["key"] = jax.tree.map(jnp.zeros_like, block["key"])
    block["query"]["kernel"] = jnp.zeros_like(block["query"]["kernel"])
    query = np.asarray(block["query"]["bias"])  # [H, K], every token's
    weights = np.asarray(model.intermediates(params, IMAGES)["attention"])[0, 0]  # [H, N, N]
    n, m = np.mgrid[:6, :6]
    scores = np.einsum("hk,nmhk->hnm", query, table[n - m + 5]) / np.sqrt(16)
    expected = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    np.testing.assert_allclose(weights, expected, rtol=1e-4)


def test_rotary_scores_depend_on_the_difference_alone():
    rng = np.random.default_rng(0)
    query, key = rng.normal(size=(2, 16)).astype("f")
    angles = rotary_angles((5, 7), 16)
    q, k = (np.asarray(rotate(jnp.tile(x, (1, 35, 1, 1)), angles))[0, :, 0] for x in (query, key))
    scores = (q @ k.T).reshape(5, 7, 5, 7)
    np.testing.assert_allclose(scores[0, 0, 2, 3], scores[1, 2, 3, 5], rtol=1e-4)
    np.testing.assert_allclose(scores[3, 1, 1, 1], scores[4, 6, 2, 6], rtol=1e-4)
    assert abs(scores[0, 0, 2, 3] - scores[0, 0, 3, 2]) > 1e-3
    np.testing.assert_allclose(np.linalg.norm(q, axis=-1), np.linalg.norm(query), rtol=1e-5)


def test_prefix_tokens_are_not_rotated():
    model, params = vit("rotary", pool="token", registers=3)
    assert model.module.positions.prefix == 4
    assert params["registers"].shape == (1, 3, 32)
    assert features(model, params).shape == (2, 32)


def test_sincos_is_fixed_and_of_both_axes():
    table = sincos_2d((3, 5), 8).reshape(3, 5, 8)
    np.testing.assert_array_equal(table[0, :, :4], table[2, :, :4])  # columns
    np.testing.assert_array_equal(table[:, 0, 4:], table[:, 4, 4:])  # rows
    assert len({tuple(x) for x in table.reshape(15, 8)}) == 15
    assert not any("pos" in name for name in flatten(vit("sincos_2d")[1]))


@pytest.mark.parametrize(
    ("kind", "width", "heads", "unit"),
    [("learned_2d", 33, 1, 2), ("sincos_2d", 34, 2, 4), ("rotary", 36, 2, 8)],
)
def test_widths_that_do_not_fit(kind, width, heads, unit):
    config = ModelConfig("ViT-mu/8", width=width, num_heads=heads, position=kind)
    with pytest.raises(
        ValueError, match=f"width {width}: {kind} positions need a multiple of {unit}"
    ):
        build_model(config, 3, (16, 16))
