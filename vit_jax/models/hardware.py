"""Choices that depend on the platform, each with its reason.

The platform is the compilation target (`parallel.mesh.platform`), which may differ from the host.
No choice changes results beyond rounding.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.config import InputError
from vit_jax.models.flash_plan import MAX_TOKENS
from vit_jax.parallel.mesh import device_kind, platform

ATTENTIONS = ("auto", "xla", "pallas", "cudnn")
# The fastest in bfloat16 by platform. For GPUs this is an assumption, not a measurement.
_FASTEST = {"tpu": "pallas", "gpu": "cudnn"}
# By device kind: (most tokens, the fastest up to them), ascending; beyond them `_FASTEST`. From
# `python -m experiments.benchmarks.gpu --part=choose`. No GPU is measured yet.
_MEASURED: dict[str, tuple[tuple[int, str], ...]] = {}
_WITHOUT_KERNEL = ("TPU v2", "TPU v3")  # their compiler refuses the kernel's matrix products


def choose_attention(
    wanted: str, tokens: int, head_dim: int, dtype: jax.typing.DTypeLike, *, plain: bool
) -> str:
    """Returns the implementation of attention to use: "xla", "pallas" or "cudnn".

    In bfloat16 "auto" takes what was measured to be the fastest on the device for this many tokens,
    elsewhere the platform's fused kernel, which never writes the N x N scores to memory; where that
    doesn't accept the head width, and in other dtypes, "xla".

    Args:
        wanted: one of `ATTENTIONS`.
        tokens: the number of keys, M. Above `MAX_TOKENS` the result is "xla".
        head_dim: features per head.
        dtype: of queries, keys and values.
        plain: whether the caller needs plain attention, for example to read the weights.

    Raises:
        ValueError: `wanted` is "pallas" and the device's compiler doesn't support the kernel.
    """
    if plain or tokens > MAX_TOKENS:
        return "xla"
    without_kernel = device_kind() in _WITHOUT_KERNEL
    if wanted == "pallas" and without_kernel:
        raise InputError(
            f"attention 'pallas' on {device_kind()}: its compiler refuses the kernel's matrix "
            "products; set model.attention to 'auto' or 'xla'"
        )
    if wanted != "auto":
        return wanted
    fastest = "xla" if without_kernel else _fastest(tokens)
    fits = dtype == jnp.bfloat16 and not misfit(fastest, head_dim, dtype)
    return fastest if fits else "xla"


def _fastest(tokens: int) -> str:
    """Returns the fastest attention of the device for a number of tokens."""
    for most, attention in _MEASURED.get(device_kind(), ()):
        if tokens <= most:
            return attention
    return _FASTEST.get(platform(), "xla")


def misfit(attention: str, head_dim: int, dtype: jax.typing.DTypeLike) -> str | None:
    """Returns why `attention` doesn't support this head width and dtype; None if it does."""
    if attention == "cudnn" and jnp.dtype(dtype) != jnp.bfloat16:
        return f"cuDNN's kernel needs dtype bfloat16, found {jnp.dtype(dtype).name}"
    if attention == "cudnn" and (head_dim % 8 or head_dim > 128):
        return (
            f"cuDNN's kernel needs heads with a multiple of 8 features up to 128, found {head_dim}"
        )
    if attention == "pallas" and head_dim > 128:
        return f"the Pallas kernel needs heads with up to 128 features, found {head_dim}"
    return None


def interprets_pallas() -> bool:
    """Whether Pallas kernels run in the interpreter: only TPUs can compile them."""
    return platform() != "tpu"


def recomputed_on_cpu(layer: Callable) -> Callable:
    """Rematerialises an elementwise function or a norm (a flax module class), on CPUs only.

    XLA's CPU compiler keeps each factor of the derivative in memory, which takes more time than
    recomputing the layer.
    """
    if platform() != "cpu":
        return layer
    return nn.remat(layer) if isinstance(layer, type) else jax.checkpoint(layer)


def multiply(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Computes x [..., D] @ kernel [D, F] -> [..., F].

    On CPUs the leading axes are merged first, because XLA's CPU compiler copies and transposes the
    operands of a gradient that sums over several axes.
    """
    if platform() != "cpu":
        return x @ kernel
    y = x.reshape(-1, x.shape[-1]) @ kernel
    return y.reshape(*x.shape[:-1], kernel.shape[1])


def add_bias(y: jax.Array, bias: jax.Array) -> jax.Array:
    """Computes y [..., D] + bias [D].

    On TPUs and GPUs the gradient of the bias is a matrix product with ones, because matrix units
    sum faster than XLA's reductions.
    """
    if platform() == "cpu":
        return y + bias.astype(y.dtype)
    return _add_bias(y, bias)


@jax.custom_vjp
def _add_bias(y: jax.Array, bias: jax.Array) -> jax.Array:
    """Adds a bias; its gradient is a product with ones, summed in float32."""
    return y + bias.astype(y.dtype)


def _add_bias_forward(y, bias):
    return _add_bias(y, bias), bias


def _add_bias_backward(bias, dy):
    axes = tuple(range(dy.ndim - 1))
    ones = jnp.ones((8, *dy.shape[:-1]), dy.dtype)  # XLA turns a single row back into a sum
    sums = jax.lax.dot_general(
        ones,
        dy,
        ((tuple(a + 1 for a in axes), axes), ((), ())),
        preferred_element_type=jnp.float32,
    )
    return dy, sums[0].astype(bias.dtype)


_add_bias.defvjp(_add_bias_forward, _add_bias_backward)
