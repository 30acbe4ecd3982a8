"""The models agree with the reference code, and with themselves whatever changes only speed."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.models.transformer import dropout, stack_layers, unstack_layers
from vit_jax.models.variants import ModelConfig, build_model
from vit_jax.weights.adapt import flatten, unflatten
from vit_jax.weights.official import from_official

REFERENCE = {"width": 48, "depth": 3, "num_heads": 3, "mlp_dim": 96, "dtype": "float32"}


def reference_model(name, image_size, **options):
    config = ModelConfig(
        "ViT-nano/8",
        **REFERENCE,
        pool="gap" if name == "vit_gap" else "token",
        representation_size=40 if name == "vit_token_prelogits" else None,
        **options,
    )
    return build_model(config, 10, image_size)


def small(image_size=(32, 32), num_classes=5, **options):
    options = {"variant": "ViT-nano/8", "depth": 2, "dtype": "float32", **options}
    return build_model(ModelConfig(**options), num_classes, image_size)


def init(model):
    return jax.jit(model.init)(jax.random.key(0))


def run(model, params, *inputs):
    return jax.jit(model.apply)(params, *inputs)


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("name", ["vit_token", "vit_token_prelogits", "vit_gap", "vit_nonsquare"])
def test_reference(golden, name, scan, remat):
    published, io = golden(name)
    model = reference_model(name, io["image"].shape[1:3], scan=scan, remat=remat)
    params = unflatten(from_official(published))
    if scan:
        params = stack_layers(params, 3)

    expected = jax.eval_shape(model.init, jax.random.key(0))
    assert {k: v.shape for k, v in flatten(params).items()} == {
        k: v.shape for k, v in flatten(expected).items()
    }
    logits = run(model, params, io["image"]).logits
    np.testing.assert_allclose(logits, io["logits"], atol=2e-5, rtol=0)
    np.testing.assert_array_equal(logits.argmax(-1), io["logits"].argmax(-1))
    inner = model.intermediates(params, io["image"])
    np.testing.assert_allclose(inner["blocks"], io["encoder_blocks"], atol=2e-5, rtol=0)
    np.testing.assert_allclose(inner["encoded"], io["encoded"], atol=2e-5, rtol=0)


# Totals for 224 px and 1,000 classes of google-research/vision_transformer (models_test.py). Its
# position embeddings have a slot for the class token, [1, 197, D]; ours, as big_vision's, have not.
@pytest.mark.parametrize(
    ("variant", "width", "total"),
    [
        ("ViT-Ti/16", 192, 5_717_416),
        ("ViT-S/32", 384, 22_878_952),
        ("ViT-S/16", 384, 22_050_664),
        ("ViT-B/32", 768, 88_224_232),
        ("ViT-B/16", 768, 86_567_656),
        ("ViT-B/8", 768, 86_576_872),
        ("ViT-L/32", 1024, 306_535_400),
        ("ViT-L/16", 1024, 304_326_632),
        ("ViT-H/14", 1280, 632_045_800),
    ],
)
def test_parameter_totals(variant, width, total):
    model = build_model(ModelConfig(variant), 1000, (224, 224))
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) + width == total


def test_initial_values():
    model = small(pool="token", representation_size=20, head_bias=-10.0, depth=3)
    params = init(model)
    assert not params["head"]["kernel"].any()
    assert (params["head"]["bias"] == -10.0).all()
    assert not params["cls"].any()
    assert np.std(params["pos_embedding"]) == pytest.approx(0.02, rel=0.1)
    block = params["Transformer"]["encoderblock_0"]
    limit = np.sqrt(6 / (96 + 96))  # xavier_uniform, over all heads together
    query = block["MultiHeadDotProductAttention_0"]["query"]["kernel"]
    assert 0.95 * limit < np.abs(query).max() <= limit
    assert 0 < np.std(block["MlpBlock_0"]["Dense_0"]["bias"]) < 1e-5
    other = params["Transformer"]["encoderblock_1"]["MultiHeadDotProductAttention_0"]["query"]
    assert (query != other["kernel"]).all()


def test_scan_and_remat_change_no_number():
    """The same initial values, and the same gradients with dropout on."""
    images = jax.random.uniform(jax.random.key(1), (4, 32, 32, 3), minval=-1)
    keys = jax.random.split(jax.random.key(2), 4)
    results = {}
    for scan in (False, True):
        for remat in ("none", "dots", "full"):
            model = small(scan=scan, remat=remat, dropout=0.3)
            params = init(model)
            loss = lambda p, model=model: model.apply(p, images, keys).features.std()  # noqa: E731
            value, grads = jax.jit(jax.value_and_grad(loss))(params)
            if scan:
                params, grads = unstack_layers(params, 2), unstack_layers(grads, 2)
            results[scan, remat] = params, value, grads
    params, value, grads = results[False, "none"]
    for other_params, other_value, other_grads in results.values():
        chex.assert_trees_all_equal(params, other_params)
        np.testing.assert_allclose(value, other_value, rtol=1e-6)
        chex.assert_trees_all_close(grads, other_grads, atol=1e-6, rtol=1e-4)


def test_remat_really_recomputes():
    images = jnp.zeros((2, 32, 32, 3))

    def primitives(**options):
        model = small(**options)
        params = jax.eval_shape(model.init, jax.random.key(0))
        grad = jax.grad(lambda p: model.apply(p, images).features.sum())
        return str(jax.make_jaxpr(grad)(params))

    assert "remat" not in primitives(remat="none")
    assert "remat" in primitives(remat="full")
    assert primitives(remat="full") != primitives(remat="dots")


def test_dropout_depends_on_each_images_key_alone():
    model = small(dropout=0.5, pool="gap")
    params = init(model)
    images = jax.random.uniform(jax.random.key(1), (4, 32, 32, 3))
    keys = jax.random.split(jax.random.key(2), 4)
    together = run(model, params, images, keys).features
    apart = jnp.concatenate(
        [run(model, params, images[i : i + 2], keys[i : i + 2]).features for i in (0, 2)]
    )
    np.testing.assert_allclose(together, apart, atol=1e-6)
    without = run(model, params, images).features
    assert np.abs(together - without).max() > 0.1
    other = run(model, params, images, keys[::-1]).features
    assert np.abs(together - other).max() > 0.1


def test_dropout_rate_and_scale():
    keys = jax.random.split(jax.random.key(0), 8)
    y = dropout(jnp.ones((8, 100, 100)), 0.25, keys)
    assert set(np.unique(y)) == {0.0, np.float32(1 / 0.75)}
    assert np.mean(y == 0) == pytest.approx(0.25, abs=0.01)
    assert (y[0] != y[1]).any()


def test_uint8_images_are_normalised():
    model = small()
    params = init(model)
    pixels = np.arange(2 * 32 * 32 * 3, dtype=np.uint8).reshape(2, 32, 32, 3)
    floats = pixels.astype(np.float32) / 127.5 - 1.0
    np.testing.assert_allclose(
        run(model, params, pixels).features, run(model, params, floats).features, atol=1e-5
    )


def test_bfloat16_computes_in_it_and_keeps_float32():
    model = small(dtype="bfloat16")
    params = init(model)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    images = jax.random.uniform(jax.random.key(1), (2, 32, 32, 3), minval=-1)
    output = run(model, params, images)
    assert output.logits.dtype == output.features.dtype == jnp.float32
    assert model.intermediates(params, images)["blocks"].dtype == jnp.bfloat16
    exact = run(small(), params, images).features
    assert 0 < np.abs(output.features - exact).max() < 0.1


def test_layers_stack_and_unstack():
    params = init(small(depth=3))
    stacked = stack_layers(params, 3)
    chex.assert_trees_all_equal(params, unstack_layers(stacked, 3))
    assert jax.tree.structure(stacked) == jax.tree.structure(init(small(depth=3, scan=True)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "ViT-B16"}, "did you mean 'ViT-B/16'"),
        ({"variant": "ViT-X/16"}, "unknown variant 'ViT-X/16'"),
        ({"variant": "ViT-B/0"}, "unknown variant"),
        ({"image_size": (30, 32)}, r"30x32 is not a multiple .* multiple of 8 \(24 or 32\)"),
        ({"num_heads": 5}, "width 96 does not divide into 5 heads"),
        ({"pool": "map_"}, "unknown pool"),
        ({"dtype": "float16"}, "unknown dtype"),
        ({"remat": "dot"}, "did you mean 'dots'"),
        ({"dropout": 1.0}, r"dropout = 1.0: expected a rate"),
        ({"num_classes": 0}, "num_classes = 0"),
    ],
)
def test_bad_configs(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)
