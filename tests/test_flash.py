"""Every way to compute attention gives the plain way's numbers, and is chosen by a rule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from vit_jax.models import attention
from vit_jax.models.attention import attention_weights, choose_attention, flash_attention
from vit_jax.models.variants import ModelConfig, build_model
from vit_jax.parallel.mesh import MeshConfig, make_mesh, platform, use_mesh


def inputs(tokens, heads=2, head_dim=16, dtype=jnp.float32):
    shape = (3, 2, tokens, heads, head_dim)
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), dtype)


def plain(query, key, value):
    weights = attention_weights(query, key).astype(query.dtype)
    return jnp.einsum("bhnm,bmhk->bnhk", weights, value)


def value_and_gradients(function, qkv):
    """Of a sum that weighs every output differently."""

    def loss(qkv):
        y = function(*qkv)
        return (y * jnp.cos(jnp.arange(y.size, dtype=y.dtype).reshape(y.shape))).sum()

    return jax.jit(lambda qkv: (function(*qkv), jax.grad(loss)(qkv)))(qkv)


@pytest.mark.parametrize("tokens", [5, 8])
def test_the_token_that_cudnn_needs_changes_nothing(tokens):
    """The code around cuDNN's call, with XLA in its place: there is no GPU here."""
    qkv = inputs(tokens)
    expected = value_and_gradients(plain, qkv)
    found = value_and_gradients(lambda *x: flash_attention(*x, implementation="xla"), qkv)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)
    text = jax.make_jaxpr(lambda *x: flash_attention(*x, implementation="xla"))(*qkv)
    assert (f"[2,{tokens + 1},2,16]" in str(text)) == (tokens % 2 == 1)


def abstract_device(kind):
    return jax.sharding.AbstractDevice(device_kind=kind, num_cores=None, platform=kind)


@pytest.mark.parametrize(
    ("wanted", "on", "dtype", "head_dim", "plain", "chosen"),
    [
        ("auto", "gpu", jnp.bfloat16, 64, False, "cudnn"),
        ("auto", "gpu", jnp.float32, 64, False, "xla"),
        ("auto", "gpu", jnp.bfloat16, 36, False, "xla"),
        ("auto", "gpu", jnp.bfloat16, 64, True, "xla"),
        ("auto", "cpu", jnp.bfloat16, 64, False, "xla"),
        ("xla", "gpu", jnp.bfloat16, 64, False, "xla"),
        ("cudnn", "cpu", jnp.bfloat16, 64, False, "cudnn"),
    ],
)
def test_the_rule(monkeypatch, wanted, on, dtype, head_dim, plain, chosen):
    monkeypatch.setattr(attention, "platform", lambda: on)
    query = jax.ShapeDtypeStruct((1, 5, 2, head_dim), dtype)
    assert choose_attention(wanted, query, plain=plain) == chosen


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
        ({"attention": "cudnn", "attention_dropout": 0.1}, "which it never has; use 'auto'"),
        ({"attention": "cudnn", "position": "relative"}, "relative positions change its scores"),
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
