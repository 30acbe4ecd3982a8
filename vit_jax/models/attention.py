"""Scaled dot-product attention, equations 6 and 7 of arXiv 2010.11929, in three implementations.

`hardware.choose_attention` chooses one:

- `xla`: plain attention, with float32 scores and softmax in memory. Attention dropout,
  `intermediates`, relative positions, masks and the decoder's cache require it.
- `pallas`: the TPU kernel of `models.flash`. Other platforms interpret it, for tests.
- `cudnn`: NVIDIA's flash attention, in bfloat16.
- `auto`: in bfloat16 `pallas` on TPUs from v4 on; on GPUs what was measured on this model of GPU,
  else `cudnn`; otherwise `xla`.

Letters in shapes: B images, N tokens, M tokens attended to, H heads, K head's width.
"""

import functools

import jax
import jax.numpy as jnp

from vit_jax.models import flash
from vit_jax.models.hardware import interprets_pallas
from vit_jax.parallel.mesh import map_images_and_heads


def attention_weights(
    query: jax.Array,
    key: jax.Array,
    *,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Computes softmax(q k / sqrt(K) + bias) as a numerator and a denominator.

    A caller can divide the weighted values, which have K features, instead of the weights, which
    have M tokens.

    Args:
        query: [B, N, H, K].
        key: [B, M, H, K].
        bias: [B, H, N, M], added to the scores.
        mask: broadcasts to [B, H, N, M]; True where attention is allowed.

    Returns:
        exp(scores - maximum), float32 [B, H, N, M], and its sum over tokens, [B, H, N, 1].
    """
    query *= query.shape[-1] ** -0.5
    # Scores and softmax are float32 for inputs of any dtype.
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
    """Computes attention without storing the weights.

    Args:
        query: [B, N, H, K].
        key: [B, M, H, K]; M = N for cuDNN.
        value: [B, M, H, K].
        implementation: "pallas" or "cudnn".

    Returns:
        [B, N, H, K].
    """
    if implementation == "pallas":
        heads = query.shape[2]
        flat = (x.reshape(*x.shape[:2], -1) for x in (query, key, value))
        return pallas_attention(*flat, heads=heads).reshape(query.shape)
    return even_attention(query, key, value, implementation)


def pallas_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, *biases: jax.Array, heads: int
) -> jax.Array:
    """Runs `flash.flash_attention` on each device's images and heads.

    Args:
        query: [B, N, H K].
        key: [B, M, H K].
        value: [B, M, H K].
        biases: none or three, each [H K], added to query, key and value.
        heads: H.

    Returns:
        [B, N, H K].
    """
    batch, _, features = query.shape
    kernel = functools.partial(
        flash.flash_attention, head_dim=features // heads, interpret=interprets_pallas()
    )
    # The kernel takes one bias per image; XLA sums the gradients over images.
    biases = tuple(jnp.broadcast_to(b.astype(jnp.float32), (batch, 1, features)) for b in biases)
    return map_images_and_heads(lambda q, k, v, *b: kernel(q, k, v, b or None), heads)(
        query, key, value, *biases
    )


def even_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, implementation: str
) -> jax.Array:
    """Computes `flash_attention` with `jax.nn`; pads an odd N with one masked token.

    cuDNN supports only even numbers of tokens in training; ViTs have 197 or 577.
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
