"""The core of attention, equations 6 and 7 of arXiv 2010.11929, in the way that suits the hardware.

- `xla`: plain. Scores and softmax are arrays, in float32; the only way that has the weights
  themselves, so attention dropout, what `intermediates` shows and the decoder (masks, a cache) need
  it.
- `cudnn`: NVIDIA's flash attention, in bfloat16.
- `auto`: cuDNN on GPUs in bfloat16, otherwise plain. It is the platform that is compiled for which
  counts (`parallel.mesh.platform`), not the one that compiles.

Letters in shapes: B images, N tokens, M tokens attended to, H heads, K head's width.
"""

import jax
import jax.numpy as jnp

from vit_jax.parallel.mesh import platform

ATTENTIONS = ("auto", "xla", "cudnn")


def choose_attention(wanted: str, query: jax.Array, *, plain: bool) -> str:
    """What computes it, "xla" or "cudnn". `plain`: whether only the plain way will do."""
    if plain:
        return "xla"
    if wanted != "auto":
        return wanted
    fits = query.dtype == jnp.bfloat16 and not misfit("cudnn", query.shape[-1], query.dtype)
    return "cudnn" if platform() == "gpu" and fits else "xla"


def misfit(attention: str, head_dim: int, dtype: jax.typing.DTypeLike) -> str | None:
    """Why `attention` can't compute heads that are `head_dim` wide; None if it can."""
    if attention == "cudnn" and jnp.dtype(dtype) != jnp.bfloat16:
        return f"cuDNN's needs dtype bfloat16, found {jnp.dtype(dtype).name}"
    if attention == "cudnn" and (head_dim % 8 or head_dim > 128):
        return f"cuDNN's needs heads with a multiple of 8 features up to 128, found {head_dim}"
    return None


def attention_weights(
    query: jax.Array,
    key: jax.Array,
    *,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
) -> jax.Array:
    """[B, N, H, K], [B, M, H, K] -> softmax(q k / sqrt(K) + bias), float32 [B, H, N, M].

    `bias` [B, H, N, M]; `mask`, which broadcasts to that, is True where attention is allowed.
    """
    # Scores and softmax in float32 whatever the dtype of what they are made from.
    scores = jnp.einsum("bnhk,bmhk->bhnm", query, key, preferred_element_type=jnp.float32)
    scores *= query.shape[-1] ** -0.5
    if bias is not None:
        scores += bias
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
    return jax.nn.softmax(scores, axis=-1)


def flash_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, implementation: str = "cudnn"
) -> jax.Array:
    """Attention among N tokens, [B, N, H, K] thrice -> [B, N, H, K], without weights in memory.

    cuDNN refuses odd numbers of tokens (197, 577) in training: those get one more, masked.
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
