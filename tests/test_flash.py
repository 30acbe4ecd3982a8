"""Every implementation of attention equals plain attention, and is chosen by a rule."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from vit_jax.models import flash, flash_plan, hardware
from vit_jax.models.attention import attention_weights, even_attention
from vit_jax.models.hardware import choose_attention
from vit_jax.models.variants import ModelConfig, build_model
from vit_jax.parallel.mesh import (
    MeshConfig,
    make_mesh,
    platform,
    put_batch,
    state_shardings,
    use_mesh,
)


def inputs(tokens, heads=2, head_dim=16, images=2, dtype=jnp.float32):
    shape = (3, images, tokens, heads, head_dim)
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), dtype)


def plain(query, key, value):
    weights, total = attention_weights(query, key)
    y = jnp.einsum("bhnm,bmhk->bhnk", weights.astype(query.dtype), value) / total
    return y.astype(query.dtype).swapaxes(1, 2)


def kernel(query, key, value, biases=None):
    """Runs in Pallas' interpreter, which fills rows past the tokens with nan."""
    flat = (x.reshape(*x.shape[:2], -1) for x in (query, key, value))
    y = flash.flash_attention(*flat, biases, head_dim=query.shape[-1], interpret=True)
    return y.reshape(query.shape)


def value_and_gradients(function, qkv):
    """Differentiates a sum that weighs every output differently."""

    def loss(qkv):
        y = function(*qkv)
        return (y * jnp.cos(jnp.arange(y.size, dtype=jnp.float32).reshape(y.shape))).sum()

    return jax.jit(lambda qkv: (function(*qkv), jax.grad(loss)(qkv)))(qkv)


@pytest.mark.parametrize("tokens", [5, 8])
def test_the_token_that_cudnn_needs_changes_nothing(tokens):
    """Tests the code around cuDNN's call with XLA in its place, without a GPU."""
    qkv = inputs(tokens)
    expected = value_and_gradients(plain, qkv)
    found = value_and_gradients(lambda *x: even_attention(*x, implementation="xla"), qkv)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)
    text = jax.make_jaxpr(lambda *x: even_attention(*x, implementation="xla"))(*qkv)
    assert (f"[2,{tokens + 1},2,16]" in str(text)) == (tokens % 2 == 1)


@pytest.mark.parametrize(
    ("queries", "tokens", "heads", "head_dim", "images", "chunk"),
    [
        (17, 17, 3, 64, 3, 320),  # an odd number of heads: none are packed
        (37, 37, 4, 32, 2, 16),  # several chunks of queries
        (1, 16, 1, 128, 1, 320),  # no lanes free for ones; one query, as of the class token
        (21, 21, 8, 80, 1, 320),  # heads that don't divide 128 lanes, as ViT-H's
    ],
)
def test_the_kernel_equals_plain_attention(
    monkeypatch, queries, tokens, heads, head_dim, images, chunk
):
    """Compares outputs and gradients, also those of the biases, of which each image has one."""
    monkeypatch.setattr(flash_plan, "MAX_CHUNK", chunk)
    biases = np.random.default_rng(1).normal(size=(3, images, 1, heads * head_dim))
    biases = jnp.asarray(biases, jnp.float32)

    def add(x, bias):
        return x + bias.reshape(images, 1, heads, head_dim)

    query, key, value = inputs(tokens, heads, head_dim, images)
    both = query[:, :queries], key, value, *biases
    expected = value_and_gradients(lambda *x: plain(*map(add, x[:3], x[3:])), both)
    found = value_and_gradients(lambda *x: kernel(*x[:3], x[3:]), both)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=3e-5)


def test_heads_that_do_not_fit_together_are_padded(monkeypatch):
    monkeypatch.setattr(flash_plan, "MAX_BYTES", 0)
    qkv = inputs(18, heads=2, head_dim=72)
    expected, found = value_and_gradients(plain, qkv), value_and_gradients(kernel, qkv)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=3e-5)


def test_large_scores_neither_overflow_nor_vanish():
    """All scores of a query are far above or below the range of an exponential."""
    query, key, value = inputs(9, heads=2, head_dim=64)
    signs = jnp.array([1.0, -1.0])[:, None, None, None]  # of the two images
    large = 300.0 * signs * jnp.abs(query), jnp.abs(key), value
    found, grads = value_and_gradients(kernel, jnp.stack(large))
    np.testing.assert_allclose(found, plain(*large), atol=1e-3)
    assert np.isfinite(grads).all()


def test_gradients_through_the_kernel_are_the_same_on_a_mesh():
    """Images are split, and heads where `tensor` splits them."""
    found = gradients("pallas", MeshConfig(data=2, fsdp=2, tensor=2))
    for a, b in zip(found, gradients("xla", MeshConfig()), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max() + 1e-6)


def gradients(attention, mesh_config):
    mesh = make_mesh(mesh_config)
    sizes = {"width": 64, "depth": 2, "num_heads": 2, "mlp_dim": 64, "scan": True}
    config = ModelConfig("ViT-nano/8", **sizes, dtype="float32", attention=attention)
    model = build_model(config, 5, (16, 16))
    with use_mesh(mesh):
        params = jax.jit(model.init)(jax.random.key(0))
        shardings = state_shardings(mesh, dataclasses.replace(mesh_config, min_size=0), params)
        params = jax.device_put(params, shardings)
        images = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3)).astype(np.uint8)
        images = put_batch(mesh, {"image": images})["image"]
        loss = jax.jit(jax.grad(lambda p, x: (model.apply(p, x).features ** 3).mean()))
        found = loss(params, images)
    return [np.asarray(x) for x in jax.tree.leaves(found)]


def test_bfloat16_gradients_are_within_its_noise_of_float32s():
    """The kernel's error is no larger than plain attention's."""
    qkv = inputs(50, heads=2, head_dim=64, dtype=jnp.bfloat16)
    exact = jax.tree.leaves(value_and_gradients(plain, qkv.astype(jnp.float32)))

    def distances(function):
        found = jax.tree.leaves(value_and_gradients(function, qkv))
        return [
            np.linalg.norm(a.astype(jnp.float32) - b) / np.linalg.norm(b)
            for a, b in zip(found, exact, strict=True)
        ]

    fused, unfused = distances(kernel), distances(plain)
    assert max(fused) < 2**-7
    assert all(a < 1.05 * b for a, b in zip(fused, unfused, strict=True))


def abstract_device(kind):
    return jax.sharding.AbstractDevice(device_kind=kind, num_cores=None, platform=kind)


@pytest.mark.parametrize(
    ("wanted", "on", "dtype", "head_dim", "plain", "chosen"),
    [
        ("auto", "gpu", jnp.bfloat16, 64, False, "cudnn"),
        ("auto", "tpu", jnp.bfloat16, 36, False, "pallas"),
        ("auto", "tpu", jnp.bfloat16, 256, False, "xla"),
        ("auto", "TPU v3", jnp.bfloat16, 64, False, "xla"),
        ("auto", "gpu", jnp.float32, 64, False, "xla"),
        ("auto", "gpu", jnp.bfloat16, 36, False, "xla"),
        ("auto", "gpu", jnp.bfloat16, 64, True, "xla"),
        ("auto", "cpu", jnp.bfloat16, 64, False, "xla"),
        ("xla", "gpu", jnp.bfloat16, 64, False, "xla"),
        ("cudnn", "cpu", jnp.bfloat16, 64, False, "cudnn"),
    ],
)
def test_the_rule(monkeypatch, wanted, on, dtype, head_dim, plain, chosen):
    monkeypatch.setattr(hardware, "platform", on.split()[0].lower)
    monkeypatch.setattr(hardware, "device_kind", lambda: on)
    assert choose_attention(wanted, 5, head_dim, dtype, plain=plain) == chosen


def test_chips_whose_compiler_refuses_the_kernel(monkeypatch):
    monkeypatch.setattr(hardware, "device_kind", lambda: "TPU v3")
    with pytest.raises(ValueError, match=r"'pallas' on TPU v3: .* 'auto' or 'xla'"):
        choose_attention("pallas", 5, 64, jnp.bfloat16, plain=False)


def test_the_platform_is_that_of_the_mesh():
    """A plan compiles on a CPU for the chips of its mesh, and gets their program."""
    assert platform() == "cpu"
    mesh = make_mesh(MeshConfig())
    with use_mesh(mesh):
        assert jax.jit(lambda: int(platform() == "cpu"))() == 1
    types = (AxisType.Auto,) * len(mesh.axis_names)
    tpus = AbstractMesh(
        mesh.axis_sizes, mesh.axis_names, types, abstract_device=abstract_device("tpu")
    )
    with jax.sharding.use_abstract_mesh(tpus):
        assert platform() == "tpu"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": "flash"}, "unknown attention 'flash'"),
        ({"attention": "cudnn", "dtype": "float32"}, "needs dtype bfloat16, found float32"),
        ({"attention": "cudnn", "num_heads": 24}, "multiple of 8 features up to 128, found 4"),
        ({"attention": "pallas", "num_heads": 1, "width": 256}, "up to 128 features, found 256"),
        ({"attention": "cudnn", "attention_dropout": 0.1}, "which it never stores; use 'auto'"),
        ({"attention": "cudnn", "position": "relative"}, "support relative positions; use"),
    ],
)
def test_combinations_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        build_model(ModelConfig("ViT-nano/8", **options), 5, (16, 16))


def test_what_shows_the_weights_computes_them_whatever_was_chosen():
    config = ModelConfig("ViT-nano/8", depth=1, attention="cudnn")
    model = build_model(config, 5, (16, 16))
    params = model.init(jax.random.key(0))
    seen = model.intermediates(params, jnp.zeros((1, 16, 16, 3)))
    np.testing.assert_allclose(seen["attention"].sum(-1), 1.0, rtol=1e-6)
