"""The linear layer is flax's, parameters and gradients included."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.models.dense import Dense


@pytest.mark.parametrize(
    ("outputs", "inputs", "use_bias"), [((3, 4), 1, True), ((6,), 2, True), ((6,), 1, False)]
)
def test_it_is_flaxs_layer(outputs, inputs, use_bias):
    options = {"use_bias": use_bias, "bias_init": nn.initializers.normal(1.0)}
    ours = Dense(outputs, inputs, **options)
    theirs = nn.DenseGeneral(outputs, tuple(range(-inputs, 0)), **options)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 3, 4)), jnp.float32)

    def all_of(layer):
        params = layer.init(jax.random.key(1), x)
        y, backward = jax.vjp(layer.apply, params, x)
        return params, y, backward(jnp.cos(y))

    found, expected = jax.jit(lambda: (all_of(ours), all_of(theirs)))()
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("to_nonlinearity", [False, True])
def test_a_biass_gradient_is_summed_in_float32(to_nonlinearity):
    """In bfloat16, 1 added to 256 would be 256."""
    layer = Dense((8,), dtype=jnp.bfloat16, to_nonlinearity=to_nonlinearity)
    x = jnp.ones((1000, 4), jnp.bfloat16)
    params = layer.init(jax.random.key(0), x)
    grads = jax.grad(lambda p: layer.apply(p, x).astype(jnp.float32).sum())(params)
    np.testing.assert_array_equal(grads["params"]["bias"], np.full(8, 1000.0, np.float32))
