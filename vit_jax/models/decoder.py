"""The causal Transformer decoder (arXiv 1706.03762, section 3.1), pre-norm like the encoder.

Predicts a sequence from an encoder's output, for example a caption. No recipe trains it yet.

Letters in shapes: B sequences, T positions, M encoder tokens, E encoder width, D width, V
vocabulary.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.config import InputError
from vit_jax.models.transformer import (
    MlpBlock,
    MultiHeadAttention,
    TransformerConfig,
    dropout,
    fold_keys,
    layer_norm,
)


class DecoderBlock(nn.Module):
    """Causal self-attention, cross-attention, MLP: x [B, T, D], memory [B, M, E] -> [B, T, D].

    `index` is the position of x's first token. With `cache_length`, self-attention reads and
    writes a cache of that many positions.
    """

    config: TransformerConfig
    cache_length: int | None

    @nn.compact
    def __call__(
        self, x: jax.Array, memory: jax.Array, keys: jax.Array | None, index: jax.Array | int
    ) -> jax.Array:
        config = self.config

        def attention(name, cache_length=None):
            return MultiHeadAttention(config, cache_length, name=name)

        # Position t attends to positions up to t. Later cache entries aren't written yet.
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
    """A decoder of up to `max_length` tokens from `vocabulary`.

    Raises ValueError for encoder options in `config` that a decoder doesn't support.
    """

    config: TransformerConfig
    vocabulary: int
    max_length: int

    def __post_init__(self):
        for field in dataclasses.fields(TransformerConfig):
            value = getattr(self.config, field.name)
            absent = ("stochastic_depth", "layer_scale", "parallel", "scan", "remat", "attention")
            if field.name in absent and value != field.default:
                raise InputError(
                    f"{field.name} = {value!r}: a decoder doesn't support it; leave it at "
                    f"{field.default!r}"
                )

    def init(self, key: jax.Array, memory_width: int) -> dict:
        """Returns initial float32 parameters for encoder outputs of width `memory_width`."""
        inputs = jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, 1, memory_width))
        return self._module().init(key, *inputs)["params"]

    def apply(
        self, params: dict, tokens: jax.Array, memory: jax.Array, keys: jax.Array | None = None
    ) -> jax.Array:
        """Computes all positions at once: tokens int [B, T], memory [B, M, E] -> [B, T, V].

        The logits at t predict token t + 1 from tokens up to t. With PRNG `keys` [B], dropout is
        on. Raises ValueError for more than `max_length` tokens.
        """
        if tokens.shape[1] > self.max_length:
            raise InputError(f"{tokens.shape[1]} tokens: expected at most {self.max_length}")
        return self._module().apply({"params": params}, tokens, memory, keys)

    def start(self, params: dict, memory: jax.Array) -> dict:
        """Returns an empty cache for `step`: keys and values of `max_length` positions."""
        tokens = jnp.zeros((memory.shape[0], 1), jnp.int32)
        step = self._module(caches=True).apply
        _, shapes = jax.eval_shape(
            lambda p: step({"params": p}, tokens, memory, mutable=["cache"]), params
        )
        return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes["cache"])

    def step(
        self, params: dict, cache: dict, tokens: jax.Array, memory: jax.Array, index: jax.Array
    ) -> tuple[jax.Array, dict]:
        """Decodes one position: tokens int [B] at `index` -> logits [B, V] and the new cache."""
        logits, state = self._module(caches=True).apply(
            {"params": params, "cache": cache}, tokens[:, None], memory, None, index,
            mutable=["cache"],
        )  # fmt: skip
        return logits[:, 0], state["cache"]

    def _module(self, caches: bool = False) -> _Decoder:
        return _Decoder(self.config, self.vocabulary, self.max_length, caches)
