"""Fitting a checkpoint to another model: every tensor accounted for."""

import chex
import jax
import numpy as np
import pytest

from vit_jax.models.transformer import stack_layers
from vit_jax.models.variants import ModelConfig, build_model
from vit_jax.weights.adapt import adapt, flatten, resize_position_embedding, unflatten
from vit_jax.weights.official import from_official


def params(num_classes=5, size=32, seed=0, **options):
    options = {"variant": "ViT-nano/8", "depth": 2, "dtype": "float32", **options}
    model = build_model(ModelConfig(**options), num_classes, (size, size))
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32), shapes)


def test_same_architecture_new_head():
    source, target = params(7, seed=0), params(3, seed=1)
    adapted, report = adapt(source, target, grid=(4, 4))
    for name, leaf in flatten(adapted).items():
        expected = target if name.startswith("head/") else source
        np.testing.assert_array_equal(leaf, flatten(expected)[name])
    assert report.initialised == report.dropped == ("head/bias", "head/kernel")
    assert set(report.loaded) | set(report.initialised) == set(flatten(target))
    assert not report.resized
    assert "initialised 2: head/bias, head/kernel" in str(report)


def test_pre_logits_are_dropped_with_the_head():
    """Fine-tuning takes off the whole pretraining head (section 3.2 of the paper)."""
    _, report = adapt(params(representation_size=20), params(), grid=(4, 4))
    assert "pre_logits/kernel" in report.dropped
    with pytest.raises(ValueError, match=r"pre_logits/bias \(20,\): in the checkpoint, not in"):
        adapt(params(representation_size=20), params(), grid=(4, 4), drop=())


@pytest.mark.parametrize("scan", [False, True])
def test_layers_are_stacked_as_the_target_has_them(scan):
    loop = params()
    target = params(scan=scan, seed=1)
    expected = stack_layers(loop, 2) if scan else loop
    for source in (loop, jax.device_get(stack_layers(loop, 2))):
        adapted, _ = adapt(source, target, grid=(4, 4))
        expected = {**expected, "head": target["head"]}
        chex.assert_trees_all_equal(adapted, expected)


def test_another_resolution_resizes_position_embeddings():
    adapted, report = adapt(params(size=32), params(size=48, seed=1), grid=(6, 6))
    assert report.resized == ("pos_embedding (1, 16, 96) -> (1, 36, 96)",)
    expected = resize_position_embedding(params(size=32)["pos_embedding"], (6, 6))
    np.testing.assert_array_equal(adapted["pos_embedding"], expected)


@pytest.mark.parametrize("side", [5, 12, 24])
def test_resize_reference(golden, side):
    _, io = golden("posemb_resize")
    resized = resize_position_embedding(io["posemb_7x7"][:, 1:], (side, side))
    np.testing.assert_allclose(resized, io[f"to_{side}x{side}"][:, 1:], atol=2e-6)


def test_resize_keeps_corners_and_goes_to_any_grid():
    square = np.random.default_rng(0).normal(size=(1, 16, 3)).astype(np.float32)
    resized = resize_position_embedding(square, (3, 7)).reshape(3, 7, 3)
    corners = square.reshape(4, 4, 3)
    for row in (0, -1):
        for column in (0, -1):
            np.testing.assert_allclose(resized[row, column], corners[row, column], rtol=1e-6)
    np.testing.assert_array_equal(resize_position_embedding(square, (4, 4)), square)
    with pytest.raises(ValueError, match="15 tokens are not of a square grid"):
        resize_position_embedding(square[:, :15], (4, 4))


def test_another_architecture_lists_both_sides():
    with pytest.raises(ValueError) as error:
        adapt(params(depth=3, pool="token"), params(mlp_dim=100, pool="gap"), grid=(4, 4))
    text = str(error.value)
    assert "  cls (1, 1, 96): in the checkpoint, not in the model" in text
    assert "encoderblock_2/LayerNorm_0/bias (96,): in the checkpoint, not in the model" in text
    assert "Dense_0/kernel: (96, 192) in the checkpoint, (96, 100) here" in text
    with pytest.raises(ValueError, match=r"cls \(1, 1, 96\): not in the checkpoint"):
        adapt(params(pool="gap"), params(pool="token"), grid=(4, 4))


def test_shapes_stay_where_fresh_values_belong():
    model = build_model(ModelConfig("ViT-nano/8", depth=2), 3, (32, 32))
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    adapted, _ = adapt(params(7, pool="token"), shapes, grid=(4, 4))
    assert isinstance(adapted["head"]["kernel"], jax.ShapeDtypeStruct)
    assert isinstance(adapted["cls"], np.ndarray)


def test_official_names(golden):
    published, _ = golden("vit_token")
    ours = from_official(published)
    position = published["Transformer/posembed_input/pos_embedding"]
    np.testing.assert_array_equal(ours["pos_embedding"], position[:, 1:])
    np.testing.assert_array_equal(ours["cls"], published["cls"] + position[:, :1])
    assert sum(a.size for a in ours.values()) == sum(a.size for a in published.values()) - 48
    chex.assert_trees_all_equal(flatten(unflatten(ours)), ours)
