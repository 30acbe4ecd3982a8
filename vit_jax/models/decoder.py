"""The Transformer's other half (arXiv 1706.03762, section 3.1): the causal decoder.

Pre-norm, as the encoder, with whose attention and MLP it is made. Given an encoder's output it
writes a sequence: captions, boxes, classes one after another. Letters in shapes: B sequences, T
positions, M tokens of the encoder, D width, V vocabulary.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.models.transformer import (
    MlpBlock,
    MultiHeadAttention,
    TransformerConfig,
    dropout,
    fold_keys,
    layer_norm,
)


class DecoderBlock(nn.Module):
    """Self-attention, attention to the encoder's output, MLP: [B, T, D] -> [B, T, D]."""

    config: TransformerConfig
    cache_length: int | None

    @nn.compact
    def __call__(
        self, x: jax.Array, memory: jax.Array, keys: jax.Array | None, index: jax.Array | int
    ) -> jax.Array:
        config = self.config

        def attention(name, cache_length=None):
            return MultiHeadAttention(config, cache_length, name=name)

        # Position t attends to those up to itself; in a cache, what lies behind is not yet written.
        now = index + jnp.arange(x.shape[1])
        mask = jnp.arange(self.cache_length or x.shape[1]) <= now[:, None]
        y = layer_norm(config, "LayerNorm_0")(x)
        y = attention("MultiHeadDotProductAttention_0", self.cache_length)(
            y, y, fold_keys(keys, 0), mask=mask, index=index
        )
        x = x + dropout(y, config.dropout, fold_keys(keys, 1))
        y = layer_norm(config, "LayerNorm_1")(x)
        y = attention("MultiHeadDotProductAttention_1")(y, memory, fold_keys(keys, 2))
        x = x + dropout(y, config.dropout, fold_keys(keys, 3))
        y = layer_norm(config, "LayerNorm_2")(x)
        return x + MlpBlock(config, name="MlpBlock_0")(y, fold_keys(keys, 4))


class _Decoder(nn.Module):
    config: TransformerConfig
    vocabulary: int
    max_length: int
    caches: bool = False

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        memory: jax.Array,
        keys: jax.Array | None = None,
        index: jax.Array | int = 0,
    ) -> jax.Array:
        config = self.config
        embed = nn.Embed(self.vocabulary, config.width, dtype=config.dtype, name="embedding")
        shape = (1, self.max_length, config.width)
        position = self.param("pos_embedding", nn.initializers.normal(0.02), shape)
        position = jax.lax.dynamic_slice_in_dim(position, index, tokens.shape[1], axis=1)
        x = embed(tokens) + position.astype(config.dtype)
        x = dropout(x, config.dropout, fold_keys(keys, config.depth))
        for i in range(config.depth):
            cache_length = self.max_length if self.caches else None
            block = DecoderBlock(config, cache_length, name=f"decoderblock_{i}")
            x = block(x, memory.astype(config.dtype), fold_keys(keys, i), index)
        x = layer_norm(config, "decoder_norm")(x)
        return embed.attend(x).astype(jnp.float32)  # tied, section 3.4


@dataclasses.dataclass(frozen=True)
class Decoder:
    """Sequences of up to `max_length` tokens out of `vocabulary`, given an encoder's output."""

    config: TransformerConfig
    vocabulary: int
    max_length: int

    def __post_init__(self):
        for field in dataclasses.fields(TransformerConfig):
            value = getattr(self.config, field.name)
            absent = ("stochastic_depth", "layer_scale", "parallel", "scan", "remat", "attention")
            if field.name in absent and value != field.default:
                raise ValueError(f"{field.name} = {value!r}: a decoder has no such thing")

    def init(self, key: jax.Array, memory_width: int) -> dict:
        """Fresh float32 parameters, for an encoder `memory_width` wide."""
        inputs = jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, 1, memory_width))
        return self._module().init(key, *inputs)["params"]

    def apply(
        self, params: dict, tokens: jax.Array, memory: jax.Array, keys: jax.Array | None = None
    ) -> jax.Array:
        """All positions at once: tokens int [B, T], memory [B, M, E] -> logits [B, T, V].

        Those at t are for the token at t + 1 and depend on tokens up to t alone. With `keys` [B]
        dropout is on. ValueError for more than `max_length` tokens.
        """
        if tokens.shape[1] > self.max_length:
            raise ValueError(f"{tokens.shape[1]} tokens: expected at most {self.max_length}")
        return self._module().apply({"params": params}, tokens, memory, keys)

    def start(self, params: dict, memory: jax.Array) -> dict:
        """An empty cache for decoding with `step`."""
        tokens = jnp.zeros((memory.shape[0], 1), jnp.int32)
        step = self._module(caches=True).apply
        _, shapes = jax.eval_shape(
            lambda p: step({"params": p}, tokens, memory, mutable=["cache"]), params
        )
        return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes["cache"])

    def step(
        self, params: dict, cache: dict, tokens: jax.Array, memory: jax.Array, index: jax.Array
    ) -> tuple[jax.Array, dict]:
        """One position: the tokens int [B] at `index` -> (logits [B, V], the cache with them)."""
        logits, state = self._module(caches=True).apply(
            {"params": params, "cache": cache}, tokens[:, None], memory, None, index,
            mutable=["cache"],
        )  # fmt: skip
        return logits[:, 0], state["cache"]

    def _module(self, caches: bool = False) -> _Decoder:
        return _Decoder(self.config, self.vocabulary, self.max_length, caches)
