"""The core of attention, equations 6 and 7 of arXiv 2010.11929, in the way that suits the hardware.

- `xla`: plain. Scores and softmax are arrays, in float32; the only way that has the weights
  themselves, so attention dropout, what `intermediates` shows and the decoder (masks, a cache) need
  it.
- `pallas`: our kernel for TPUs (`models.flash`); elsewhere interpreted, for tests.
- `cudnn`: NVIDIA's flash attention, in bfloat16.
- `auto`: in bfloat16 our kernel on TPUs from v4 on and cuDNN's on GPUs, otherwise plain. It is the
  platform that is compiled for which counts (`parallel.mesh.platform`), not the one that compiles.

Letters in shapes: B images, N tokens, M tokens attended to, H heads, K head's width.
"""

import functools

import jax
import jax.numpy as jnp

from vit_jax.models import flash
from vit_jax.parallel.mesh import device_kind, map_images_and_heads, platform

ATTENTIONS = ("auto", "xla", "pallas", "cudnn")
_FASTEST = {"tpu": "pallas", "gpu": "cudnn"}
_WITHOUT_KERNEL = ("TPU v2", "TPU v3")  # their compiler refuses its products


def choose_attention(
    wanted: str, tokens: int, head_dim: int, dtype: jax.typing.DTypeLike, *, plain: bool
) -> str:
    """What computes it: "xla", "pallas" or "cudnn". `plain`: whether only the plain way will do.

    Raises ValueError if `wanted` can't be compiled for the device.
    """
    if plain or tokens > flash.MAX_TOKENS:
        return "xla"
    without_kernel = device_kind() in _WITHOUT_KERNEL
    if wanted == "pallas" and without_kernel:
        raise ValueError(
            f"attention 'pallas' on {device_kind()}: its compiler refuses the kernel's matrix "
            "products; set model.attention to 'auto' or 'xla'"
        )
    if wanted != "auto":
        return wanted
    fastest = "xla" if without_kernel else _FASTEST.get(platform(), "xla")
    fits = dtype == jnp.bfloat16 and not misfit(fastest, head_dim, dtype)
    return fastest if fits else "xla"


def misfit(attention: str, head_dim: int, dtype: jax.typing.DTypeLike) -> str | None:
    """Why `attention` can't compute heads that are `head_dim` wide; None if it can."""
    if attention == "cudnn" and jnp.dtype(dtype) != jnp.bfloat16:
        return f"cuDNN's needs dtype bfloat16, found {jnp.dtype(dtype).name}"
    if attention == "cudnn" and (head_dim % 8 or head_dim > 128):
        return f"cuDNN's needs heads with a multiple of 8 features up to 128, found {head_dim}"
    if attention == "pallas" and head_dim > 128:
        return f"the kernel needs heads with up to 128 features, found {head_dim}"
    return None


def attention_weights(
    query: jax.Array,
    key: jax.Array,
    *,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The weights softmax(q k / sqrt(K) + bias) of [B, N, H, K], [B, M, H, K], in two parts.

    They are exp(scores - the largest), float32 [B, H, N, M], over their sums, [B, H, N, 1]. What
    they weigh can be divided instead, which has K features and not M tokens.

    `bias` [B, H, N, M]; `mask`, which broadcasts to that, is True where attention is allowed.
    """
    query *= query.shape[-1] ** -0.5
    # Scores and softmax in float32 whatever the dtype of what they are made from.
    scores = jnp.einsum("bnhk,bmhk->bhnm", query, key, preferred_element_type=jnp.float32)
    if bias is not None:
        scores += bias
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
    top = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
    weights = jnp.exp(scores - top)
    return weights, weights.sum(axis=-1, keepdims=True)


def flash_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, implementation: str
) -> jax.Array:
    """[B, N, H, K], [B, M, H, K] twice -> [B, N, H, K] without weights in memory; cuDNN: N = M."""
    if implementation == "pallas":
        heads = query.shape[2]
        flat = (x.reshape(*x.shape[:2], -1) for x in (query, key, value))
        return pallas_attention(*flat, heads=heads).reshape(query.shape)
    return even_attention(query, key, value, implementation)


def pallas_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, *biases: jax.Array, heads: int
) -> jax.Array:
    """Our kernel on every device: [B, N, H K], [B, M, H K] twice -> [B, N, H K].

    `biases`, none or three [H K], are yet to be added to query, key and value.
    """
    batch, _, features = query.shape
    kernel = functools.partial(
        flash.flash_attention, head_dim=features // heads, interpret=platform() != "tpu"
    )
    # One for each image, whose gradients XLA adds up.
    biases = tuple(jnp.broadcast_to(b.astype(jnp.float32), (batch, 1, features)) for b in biases)
    return map_images_and_heads(lambda q, k, v, *b: kernel(q, k, v, b or None), heads)(
        query, key, value, *biases
    )


def even_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, implementation: str
) -> jax.Array:
    """jax's attention, as `flash_attention`, with one more token, masked, where N is odd.

    cuDNN refuses odd numbers of tokens (197, 577) in training.
    """
    tokens = query.shape[1]
    lengths = None
    if tokens % 2:
        lengths = jnp.full(query.shape[0], tokens, jnp.int32)
        query, key, value = (
            jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (query, key, value)
        )
    y = jax.nn.dot_product_attention(
        query,
        key,
        value,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        implementation=implementation,
    )
    return y[:, :tokens]
