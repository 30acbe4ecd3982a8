"""The linear layer, computed as one matrix product."""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.models.hardware import add_bias, multiply
from vit_jax.parallel.fsdp import with_gathered


class Dense(nn.Module):
    """A linear layer over one or more trailing axes: [..., *inputs] -> [..., *outputs].

    Parameters are those of `nn.DenseGeneral`: kernel [*inputs, *outputs] and bias [*outputs]. The
    product flattens these axes. With a head's 64 features as the last axis, XLA would pad them to
    128 lanes or transpose around every attention.

    With a `rank`, LoRA (arXiv 2106.09685, section 4.1) adds x A B * alpha / rank. Parameters:
    lora_a [*inputs, rank], and lora_b [rank, *outputs], which is initially zero.
    """

    outputs: tuple[int, ...]
    inputs: int = 1  # number of trailing axes of x to contract
    use_bias: bool = True
    # Before a nonlinearity XLA fuses the bias's gradient, so that plain addition is faster.
    to_nonlinearity: bool = False
    rank: int = 0
    alpha: float = 1.0
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
        """Returns x times the kernel, and the bias, both flat: [..., outputs] and [outputs]."""
        shape = x.shape[x.ndim - self.inputs :]
        flat = math.prod(shape), math.prod(self.outputs)

        def init_kernel(key):
            return self.kernel_init(key, flat).reshape(shape + self.outputs)

        def init_bias(key):
            return self.bias_init(key, flat[1:]).reshape(self.outputs)

        kernel = self.param("kernel", init_kernel).astype(self.dtype)
        bias = self.param("bias", init_bias).reshape(flat[1]) if self.use_bias else None
        x = x.astype(self.dtype).reshape(*x.shape[: x.ndim - self.inputs], flat[0])
        y = with_gathered(multiply, self.path, x, kernel, self.inputs)
        if self.rank:
            init_a = nn.initializers.normal(flat[0] ** -0.5)
            a = self.param("lora_a", init_a, (*shape, self.rank)).reshape(flat[0], self.rank)
            b = self.param("lora_b", nn.initializers.zeros, (self.rank, *self.outputs))
            low = multiply(x, a.astype(self.dtype)) * (self.alpha / self.rank)
            y += multiply(low, b.astype(self.dtype).reshape(self.rank, flat[1]))
        return y, bias
