"""The models agree with the reference code, and options that change only speed change no number."""

import dataclasses
import functools
import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.models import hardware
from vit_jax.models.stacking import stack_layers, unstack_layers
from vit_jax.models.transformer import (
    drop_branch,
    dropout,
    further_remat,
    random_words,
)
from vit_jax.models.variants import ModelConfig, build_model
from vit_jax.weights.adapt import flatten, unflatten
from vit_jax.weights.bit import from_bit
from vit_jax.weights.official import from_official

REFERENCE = {"width": 48, "depth": 3, "num_heads": 3, "mlp_dim": 96, "dtype": "float32"}


# What each golden file is of (tests/golden/README.md): options beside REFERENCE's, and how its
# published names become ours.
GOLDEN = {
    "vit_token": {},
    "vit_token_prelogits": {"representation_size": 40},
    "vit_gap": {"pool": "gap"},
    "vit_nonsquare": {},
    "bigvision_tok": {},
    "bigvision_scan_tok": {},
    "bigvision_gap_rep": {"pool": "gap", "representation_size": 48},
    "bigvision_gap_sincos2d": {"pool": "gap", "position": "sincos_2d"},
    "bigvision_map": {"pool": "map"},
    "hybrid_stage3": {"variant": "R50+ViT-nano/16", "stages": (1, 2, 1), "stem_width": 32},
    "hybrid_root_only": {"variant": "R+ViT-nano/16", "stem_width": 32},
}
RESNETS = {"resnet_v1": (False, from_official), "resnet_v2_bit": (True, from_bit)}


def reference_model(name, image_size, **options):
    options = {"variant": "ViT-nano/8", **REFERENCE, **GOLDEN[name], **options}
    size = (128, 128) if name == "hybrid_root_only" else image_size
    model = build_model(ModelConfig(**options), 10, size)
    if name == "hybrid_root_only":  # its patch is 4, where the published one has 8
        return dataclasses.replace(model, image_size=image_size, module=model.module.clone(patch=4))
    return model


def small(image_size=(32, 32), num_classes=5, **options):
    options = {"variant": "ViT-nano/8", "depth": 2, "dtype": "float32", **options}
    return build_model(ModelConfig(**options), num_classes, image_size)


@functools.cache
def init(model):
    return jax.jit(model.init)(jax.random.key(0))


def run(model, params, *inputs):
    return jax.jit(model.apply)(params, *inputs)


def agree(model, params, io):
    expected = jax.eval_shape(model.init, jax.random.key(0))
    assert {k: v.shape for k, v in flatten(params).items()} == {
        k: v.shape for k, v in flatten(expected).items()
    }
    output = run(model, params, io["image"])
    np.testing.assert_allclose(output.logits, io["logits"], atol=2e-5, rtol=0)
    np.testing.assert_array_equal(output.logits.argmax(-1), io["logits"].argmax(-1))
    return output


@pytest.mark.parametrize(("scan", "remat"), [(False, "none"), (True, "full")])
@pytest.mark.parametrize("name", GOLDEN)
def test_reference(golden, name, scan, remat):
    published, io = golden(name)
    model = reference_model(name, io["image"].shape[1:3], scan=scan, remat=remat)
    params = unstack_layers(unflatten(from_official(published)))
    if scan:
        params = stack_layers(params, 3)
    output = agree(model, params, io)
    if "pre_logits" in io and model.config.representation_size:
        np.testing.assert_allclose(output.features, io["pre_logits"], atol=2e-5, rtol=0)
    inner = model.intermediates(params, io["image"])
    for ours, theirs in (("blocks", "encoder_blocks"), ("encoded", "encoded")):
        if theirs in io:
            np.testing.assert_allclose(inner[ours], io[theirs], atol=2e-5, rtol=0)
    np.testing.assert_allclose(inner["attention"].sum(-1), 1.0, rtol=1e-5)


@pytest.mark.parametrize(("name", "remat"), list(zip(RESNETS, ("none", "full"), strict=True)))
def test_resnet_reference(golden, name, remat):
    published, io = golden(name)
    preactivation, rename = RESNETS[name]
    config = ModelConfig(
        "R50x1",
        stages=(1, 2),
        stem_width=32,
        preactivation=preactivation,
        dtype="float32",
        remat=remat,
    )
    model = build_model(config, 10, io["image"].shape[1:3])
    output = agree(model, unflatten(rename(published)), io)
    np.testing.assert_allclose(output.features, io["pre_logits"], atol=2e-5, rtol=0)


# Totals for 224 px and 1,000 classes: google-research/vision_transformer (models_test.py). Its
# position embeddings have a slot for the class token, [1, 197, D]; ours, as big_vision's, have not.
TOTALS = {
    "ViT-Ti/16": 5_717_416,
    "ViT-S/32": 22_878_952,
    "ViT-S/16": 22_050_664,
    "ViT-B/32": 88_224_232,
    "ViT-B/16": 86_567_656,
    "ViT-B/8": 86_576_872,
    "ViT-L/32": 306_535_400,
    "ViT-L/16": 304_326_632,
    "ViT-H/14": 632_045_800,
    "R+Ti/16": 6_337_704,
    "R26+S/32": 36_431_912,
    "R26+B/32": 101_383_976,
    "R50+ViT-B/16": 98_659_112,
    "R50+L/32": 328_994_856,
    "Mixer-B/32": 60_293_428,
    "Mixer-B/16": 59_880_472,
    "Mixer-L/16": 208_196_168,
}
# To the last digit printed: arXiv 2106.04560, table 2, in millions, without head (g, G); arXiv
# 1912.11370's networks as timm counts them (R50x1 to R152x4), in units of 10,000.
ROUNDED = {
    "ViT-g/14": (1_011_200_000, 1, 100_000),
    "ViT-G/14": (1_842_800_000, 1, 100_000),
    "R50x1": (25_550_000, 1000, 10_000),
    "R101x1": (44_540_000, 1000, 10_000),
    "R152x2": (236_340_000, 1000, 10_000),
    "R152x4": (936_530_000, 1000, 10_000),
}


def count(variant, num_classes=1000):
    model = build_model(ModelConfig(variant), num_classes, (224, 224))
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    class_slot = 0 if model.grid is None else model.config.width
    return sum(leaf.size for leaf in jax.tree.leaves(shapes)) + class_slot


@pytest.mark.parametrize("variant", TOTALS)
def test_parameter_totals(variant):
    assert count(variant) == TOTALS[variant]


@pytest.mark.parametrize("variant", ROUNDED)
def test_rounded_parameter_totals(variant):
    total, num_classes, unit = ROUNDED[variant]
    assert abs(count(variant, num_classes) - total) <= unit


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


# A block's options beside the published ones; each has a law below or in test_positions.py.
OPTIONS = {
    "published": {},
    "beside": {
        "attention_dropout": 0.3,
        "stochastic_depth": 0.5,
        "qk_norm": True,
        "layer_scale": 0.1,
        "registers": 2,
        "pool": "map",
    },
    "parallel": {"parallel": True, "mlp": "swiglu", "stochastic_depth": 0.5},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_scan_and_remat_change_no_number(options):
    """Initial values are the same, and so are gradients with dropout on."""
    images = jax.random.uniform(jax.random.key(1), (4, 32, 32, 3), minval=-1)
    keys = jax.random.split(jax.random.key(2), 4)
    results = {}
    for scan in (False, True):
        # A scan does with "none" what it does with "dots".
        every = ("none", "full") if scan else ("none", "dots", "full")
        for remat in every if options is OPTIONS["published"] else ("full",):
            model = small(scan=scan, remat=remat, dropout=0.3, **options)
            params = init(model)
            # Not the features' deviation, which a LayerNorm makes 1 whatever the parameters are.
            loss = lambda p, f=model.apply: (f(p, images, keys).features ** 4).mean()  # noqa: E731
            value, grads = jax.jit(jax.value_and_grad(loss))(params)
            if scan:
                params, grads = unstack_layers(params), unstack_layers(grads)
            results[scan, remat] = params, value, grads
    params, value, grads = results[False, "full"]
    for other_params, other_value, other_grads in results.values():
        chex.assert_trees_all_equal(params, other_params)
        np.testing.assert_allclose(value, other_value, rtol=1e-6)
        chex.assert_trees_all_close(grads, other_grads, atol=1e-6, rtol=1e-4)


def test_remat_really_recomputes(monkeypatch):
    monkeypatch.setattr(hardware, "platform", lambda: "tpu")  # on CPUs some of it always is
    images = jnp.zeros((2, 32, 32, 3))

    def primitives(**options):
        model = small(**options)
        params = jax.eval_shape(model.init, jax.random.key(0))
        grad = jax.grad(lambda p: model.apply(p, images).features.sum())
        return str(jax.make_jaxpr(grad)(params))

    assert "remat" not in primitives(remat="none")
    assert "remat" in primitives(remat="full")
    assert primitives(remat="full") != primitives(remat="dots")
    assert "remat" in primitives(scan=True), "a scan would stack every factor of every derivative"


def test_cpus_compute_the_same_with_less_in_memory(monkeypatch):
    model, images = small(), jax.random.normal(jax.random.key(1), (2, 32, 32, 3))
    params = init(model)

    def loss(p):  # gradients are about 1; squares would sum to a constant after the LayerNorm
        return (model.apply(p, images).features ** 4).mean() / 100

    def gradients_and_hidden_layers():
        backward = jax.eval_shape(lambda p: jax.vjp(loss, p)[1], params)
        kept = [r.shape for r in jax.tree.leaves(backward)]
        hidden = model.config.mlp_dim
        return jax.jit(jax.grad(loss))(params), sum(
            s[0] == 2 and s[-1] == hidden for s in kept if s
        )

    found, kept = gradients_and_hidden_layers()
    monkeypatch.setattr(hardware, "platform", lambda: "tpu")
    expected, kept_elsewhere = gradients_and_hidden_layers()
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)
    assert kept < kept_elsewhere, "factors of GELU's derivative are kept"


@pytest.mark.parametrize("where", ["cpu", "tpu"])
def test_what_a_scan_keeps_of_attention(monkeypatch, where):
    """The scan over all layers but the last keeps plain attention's result, and never N x N."""
    monkeypatch.setattr(hardware, "platform", lambda: where)
    model, images = small(depth=3, scan=True), jnp.zeros((2, 32, 32, 3))
    params = jax.eval_shape(model.init, jax.random.key(0))
    tokens, heads = 17, model.config.num_heads

    backward = jax.eval_shape(
        lambda p: jax.vjp(lambda p: model.apply(p, images).features, p)[1], params
    )
    kept = {leaf.shape for leaf in jax.tree.leaves(backward)}
    weights, weighed = (2, 2, heads, tokens, tokens), (2, 2, heads, tokens, 32)
    assert weighed in kept and weights not in kept


def test_ways_to_remat_that_differ():
    """A scan does with "none" what "dots" does, so a search must not compile both."""
    assert further_remat("none", scan=False) == ["none", "dots", "full"]
    assert further_remat("none", scan=True) == ["none", "full"]
    assert further_remat("dots", scan=True) == ["dots", "full"]


def test_dots_keep_products_and_the_attention_kernel():
    """Forward and backward run the kernel once each; no matmul is recomputed."""
    images = jnp.zeros((2, 32, 32, 3))

    def count(remat):
        model = small(remat=remat, attention="pallas", depth=1, pool="gap")
        params = jax.eval_shape(model.init, jax.random.key(0))
        step = jax.jit(jax.grad(lambda p: model.apply(p, images).features.sum())).trace(params)
        products = step.lower().as_text().count("stablehlo.dot_general")
        return products, str(step.jaxpr).count("pallas_call")

    assert count("none") == count("dots")
    assert count("none")[1] == 2
    assert count("full")[0] > count("none")[0]
    assert count("full")[1] == 3


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


def test_what_drops_is_independent_of_its_row_column_and_image():
    """Correlations of two entries, and of four in a rectangle, are no larger than by chance."""
    keys = jax.random.split(jax.random.key(3), 32)
    signs = 2.0 * (np.asarray(random_words(keys, (98, 256))) >> 31) - 1
    rows, columns = signs[:, ::2] * signs[:, 1::2], signs[..., ::2] * signs[..., 1::2]
    rectangles = columns[:, ::2] * columns[:, 1::2]
    for products in (signs, rows, columns, rectangles, signs[::2] * signs[1::2]):
        assert abs(products.sum()) < 4 * np.sqrt(products.size)
    per_row, per_column = signs.sum(axis=2).var(), signs.sum(axis=1).var()
    np.testing.assert_allclose([per_row / 256, per_column / 98], 1, rtol=0.1)
    np.testing.assert_array_equal(
        random_words(keys, (1, 256)), random_words(keys, (98, 256))[:, :1]
    )


def test_attention_dropout_and_stochastic_depth_are_on():
    images = jax.random.uniform(jax.random.key(1), (4, 32, 32, 3))
    keys = jax.random.split(jax.random.key(2), 4)
    for name in ("attention_dropout", "stochastic_depth"):
        model = small(**{name: 0.5})
        params = init(model)
        on, off = run(model, params, images, keys).features, run(model, params, images).features
        assert np.abs(on - off).max() > 1e-3
        np.testing.assert_array_equal(off, run(small(), params, images).features)


def test_stochastic_depth_drops_whole_branches_more_in_deeper_layers():
    """An image's branch is dropped or scaled: in the first block never, in the last at 1/2."""
    y = jnp.ones((400, 3, 2))
    keys = jax.random.split(jax.random.key(0), 400)
    kept = np.asarray(drop_branch(y, 0.5, keys))
    assert set(np.unique(kept)) == {0.0, 2.0}
    assert (kept == kept[:, :1, :1]).all()
    assert kept.mean() == pytest.approx(1.0, abs=0.15)
    np.testing.assert_array_equal(drop_branch(y, 0.0, keys), y)

    model = small(depth=3, stochastic_depth=0.5)
    params = init(model)
    images = jax.random.uniform(jax.random.key(1), (16, 32, 32, 3))
    state = {}
    for name, given in (("on", jax.random.split(jax.random.key(3), 16)), ("off", None)):
        _, found = model.module.apply({"params": params}, images, given, mutable=["intermediates"])
        state[name] = found["intermediates"]["Transformer"]
    for i, same in ((0, True), (2, False)):
        on, off = (state[k][f"encoderblock_{i}"]["output"][0] for k in ("on", "off"))
        assert np.allclose(on, off, atol=1e-6) == same


@pytest.mark.parametrize("variant", ["ViT-mu/8", "R26x1", "Mixer-S/8"])
def test_without_classes_there_is_no_head(variant):
    model, headless = (build_model(ModelConfig(variant), n, (16, 16)) for n in (3, 0))
    shapes = [flatten(jax.eval_shape(m.init, jax.random.key(0))) for m in (model, headless)]
    assert shapes[0].keys() - shapes[1].keys() == {"head/kernel", "head/bias"}
    images = jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32)
    found = jax.eval_shape(headless.apply, unflatten(shapes[1]), images)
    assert found.logits.shape == found.features.shape


def test_layer_scale_scales_each_branch():
    images = jax.random.uniform(jax.random.key(1), (2, 32, 32, 3))
    model = small(layer_scale=1.0)
    params = init(model)
    plain = {k: v for k, v in flatten(params).items() if "layer_scale" not in k}
    expected = run(small(), unflatten(plain), images).features
    np.testing.assert_allclose(run(model, params, images).features, expected, atol=1e-6)
    off = unflatten({k: v * ("layer_scale" not in k) for k, v in flatten(params).items()})
    blocks = model.intermediates(off, images)["blocks"]
    np.testing.assert_array_equal(blocks[0], blocks[1])


def test_qk_norm_bounds_the_scores():
    """Scaling a query's weights changes nothing once queries are normalised."""
    images = jax.random.uniform(jax.random.key(1), (2, 32, 32, 3))
    for qk_norm in (True, False):
        model = small(qk_norm=qk_norm)
        params = init(model)
        scaled = {k: v * (100.0 if "/query/" in k else 1.0) for k, v in flatten(params).items()}
        before = model.intermediates(params, images)["attention"]
        after = model.intermediates(unflatten(scaled), images)["attention"]
        assert np.allclose(before[0], after[0], atol=1e-4) == qk_norm


def test_parallel_blocks_have_no_biases_where_vit_22b_has_none():
    names = set(flatten(init(small(parallel=True))))
    assert not [n for n in names if re.search("(query|key|value|Norm_.|norm)/bias", n)]
    assert not [n for n in names if "LayerNorm_1" in n]
    assert "Transformer/encoderblock_0/MlpBlock_0/Dense_0/bias" in names


def test_gelu_is_the_named_one():
    images = jax.random.uniform(jax.random.key(1), (2, 32, 32, 3))
    params = init(small())
    features = [run(small(mlp=mlp), params, images).features for mlp in ("gelu_tanh", "gelu")]
    assert 0 < np.abs(features[0] - features[1]).max() < 1e-2


def test_map_head_is_a_set_function_of_tokens():
    model = small(pool="map", position="none")
    params = init(model)
    images = jax.random.uniform(jax.random.key(1), (2, 32, 32, 3))
    upside_down = images.reshape(2, 4, 8, 32, 3)[:, ::-1].reshape(images.shape)  # rows of patches
    expected = run(model, params, images).features
    np.testing.assert_allclose(run(model, params, upside_down).features, expected, atol=1e-5)


@pytest.mark.parametrize("variant", ["R26x2", "R50+ViT-nano/16", "Mixer-S/16"])
def test_other_families_initial_values_and_dropout(variant):
    sizes = {"width": 32, "depth": 2, "mlp_dim": 32}
    stages = {"stages": (1, 1, 1), "stem_width": 32}
    options = {
        "R26x2": stages,
        "R50+ViT-nano/16": {**sizes, **stages, "num_heads": 2},
        "Mixer-S/16": {**sizes, "token_mlp_dim": 16},
    }[variant]
    rates = {} if variant == "R26x2" else {"dropout": 0.5, "stochastic_depth": 0.5}
    model = build_model(ModelConfig(variant, dtype="float32", **options), 4, (32, 32))
    params = init(model)
    images = jax.random.uniform(jax.random.key(1), (4, 32, 32, 3))
    output = run(model, params, images)
    assert not output.logits.any()
    assert np.isfinite(output.features).all()
    config = ModelConfig(variant, dtype="float32", remat="full", **options, **rates)
    same = build_model(config, 4, (32, 32))
    np.testing.assert_allclose(run(same, params, images).features, output.features, atol=1e-5)
    dropped = run(same, params, images, jax.random.split(jax.random.key(0), 4)).features
    assert (np.abs(dropped - output.features).max() > 1e-3) == bool(rates)


def test_resnet_takes_any_image_size_and_starts_as_its_shortcuts():
    config = ModelConfig("R26x1", stages=(1, 1), stem_width=32, preactivation=False)
    model = build_model(config, 3, (33, 47))
    params = init(model)
    assert not params["block1"]["unit1"]["gn3"]["scale"].any()
    assert run(model, params, jnp.zeros((1, 33, 47, 3))).features.shape == (1, 256)
    with pytest.raises(ValueError, match="R26x1 has no Transformer encoder"):
        model.intermediates(params, jnp.zeros((1, 33, 47, 3)))


def test_features_of_all_stages():
    """Mean and deviation of each stage; the gradient is finite on a constant image."""
    options = {"stages": (1, 1), "stem_width": 32, "dtype": "float32"}
    model = build_model(ModelConfig("R26x1", stage_features=True, **options), 0, (16, 24))
    params = init(model)
    images = jax.random.uniform(jax.random.key(1), (2, 16, 24, 3))
    features = run(model, params, images).features
    plain = build_model(ModelConfig("R26x1", **options), 0, (16, 24)).module

    @jax.jit
    def stages(params: dict) -> list[jax.Array]:
        _, state = plain.apply({"params": params}, images, capture_intermediates=True)
        captured = state["intermediates"]
        return [nn.relu(captured[name]["__call__"][0]) for name in ("block1", "gn_head")]

    expected = [f(stage, axis=(1, 2)) for stage in stages(params) for f in (np.mean, np.std)]
    np.testing.assert_allclose(features, np.concatenate(expected, axis=1), atol=1e-3)

    @jax.jit
    @jax.grad
    def gradient(params: dict) -> jax.Array:
        return model.apply(params, jnp.zeros((1, 16, 24, 3))).features.sum()

    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient(params)))


def test_a_model_can_be_built_again_from_its_own_description():
    for variant in ("ViT-nano/8", "R50x1", "R+Ti/16", "Mixer-S/16"):
        model = build_model(ModelConfig(variant), 3, (32, 32))
        assert build_model(model.config, 3, (32, 32)) == model


@pytest.mark.parametrize("side", [0, -1, 10**30])
def test_sizes_that_no_image_has(side):
    with pytest.raises(ValueError, match="expected sides of 1 to 32,768 pixels"):
        build_model(ModelConfig("R26x1"), 3, (32, side))


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
    chex.assert_trees_all_equal(params, unstack_layers(stacked))
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
        ({"stochastic_depth": -0.1}, r"stochastic_depth = -0.1: expected a rate"),
        ({"registers": -1}, "registers = -1: expected 0 or more"),
        ({"depth": 0}, "depth = 0: expected 1 or more"),
        ({"num_heads": -1}, "num_heads = -1: expected 1 or more"),
        ({"mlp_dim": 0}, "mlp_dim = 0: expected 1 or more"),
        ({"mlp": "gelu_erf"}, "did you mean 'gelu'"),
        ({"position": "1d"}, "unknown position '1d'"),
        ({"position_at": "layer"}, "did you mean 'layers'"),
        ({"variant": "R51x1"}, "did you mean 'R50x1'"),
        ({"variant": "R50x0"}, "unknown variant 'R50x0'"),
        ({"variant": "R50+ViT-B/8"}, "did you mean 'R50.ViT-B/32' or 'R50.ViT-B/16'"),
        ({"variant": "Mixer-X/16"}, "did you mean 'Mixer-"),
        (
            {"variant": "R50x1", "depth": None, "pool": "gap"},
            "model.pool = 'gap': R50x1 doesn't have this field",
        ),
        ({"variant": "Mixer-S/16", "num_heads": 2}, "model.num_heads = 2: Mixer-S/16 doesn't have"),
        (
            {"stem_width": 32},
            "model.stem_width = 32: ViT-nano/8 doesn't have this field; a ViT has",
        ),
        ({"variant": "R+Ti/16", "stem_width": 48}, "stem_width = 48: expected a multiple of 32"),
        ({"variant": "R50+ViT-B/16", "image_size": (200, 192)}, r"multiple of 16 \(192 or 208\)"),
        ({"num_classes": -1}, "num_classes = -1"),
    ],
)
def test_bad_configs(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)
