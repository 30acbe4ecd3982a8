"""The linear layer, in the form that compilers make the most of: one product of two matrices."""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.parallel.mesh import gather_kernel, platform


class Dense(nn.Module):
    """[..., *inputs] -> [..., *outputs], of which there may be several axes each, as heads.

    Parameters are those of `nn.DenseGeneral`, kernel [*inputs, *outputs] and bias [*outputs]; but
    the product's axes are flat, since with a head's 64 features last XLA pads them to 128 lanes or
    transposes, before and behind every attention.
    """

    outputs: tuple[int, ...]
    inputs: int = 1  # how many axes of x
    use_bias: bool = True
    # XLA sums the bias's gradient while it computes the nonlinearity's, where it sees a sum.
    to_nonlinearity: bool = False
    dtype: Any = jnp.float32
    kernel_init: Callable = nn.initializers.lecun_normal()
    bias_init: Callable = nn.initializers.zeros

    def __call__(self, x: jax.Array) -> jax.Array:
        y, bias = self.product(x)
        if bias is not None and self.to_nonlinearity:
            y = (y.astype(jnp.float32) + bias).astype(y.dtype)
        elif bias is not None:
            y = add_bias(y, bias)
        return y.reshape(*y.shape[:-1], *self.outputs)

    @nn.compact
    def product(self, x: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """The layer without its bias, and the bias, both flat: [..., outputs], [outputs]."""
        shape = x.shape[x.ndim - self.inputs :]
        flat = math.prod(shape), math.prod(self.outputs)

        def init_kernel(key):
            return self.kernel_init(key, flat).reshape(shape + self.outputs)

        def init_bias(key):
            return self.bias_init(key, flat[1:]).reshape(self.outputs)

        kernel = self.param("kernel", init_kernel).astype(self.dtype)
        kernel = gather_kernel(self.path, kernel).reshape(flat)
        bias = self.param("bias", init_bias).reshape(flat[1]) if self.use_bias else None
        x = x.astype(self.dtype).reshape(*x.shape[: x.ndim - self.inputs], flat[0])
        return multiply(x, kernel), bias


def multiply(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [..., D] times kernel [D, F] -> [..., F]."""
    if platform() != "cpu":
        return x @ kernel
    # XLA's CPU compiler copies and transposes what a gradient sums over more than one axis.
    y = x.reshape(-1, x.shape[-1]) @ kernel
    return y.reshape(*x.shape[:-1], kernel.shape[1])


def add_bias(y: jax.Array, bias: jax.Array) -> jax.Array:
    """y [..., D] + bias [D]."""
    if platform() == "cpu":
        return y + bias.astype(y.dtype)
    return _add_bias(y, bias)


@jax.custom_vjp
def _add_bias(y: jax.Array, bias: jax.Array) -> jax.Array:
    """The bias's gradient is a product with ones, summed in float32."""
    return y + bias.astype(y.dtype)


def _add_bias_forward(y, bias):
    return _add_bias(y, bias), bias


def _add_bias_backward(bias, dy):
    axes = tuple(range(dy.ndim - 1))
    ones = jnp.ones((8, *dy.shape[:-1]), dy.dtype)  # of one row XLA would make a sum again
    sums = jax.lax.dot_general(
        ones,
        dy,
        ((tuple(a + 1 for a in axes), axes), ((), ())),
        preferred_element_type=jnp.float32,
    )
    return dy, sums[0].astype(bias.dtype)


_add_bias.defvjp(_add_bias_forward, _add_bias_backward)
