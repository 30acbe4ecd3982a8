"""The Vision Transformer (arXiv 2010.11929, section 3.1, equations 1 and 4).

Parameter names are those of big_vision's current files. Letters in shapes: B images, P patch side,
N tokens, D width.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.models.transformer import Encoder, dropout, fold_keys


class Output(NamedTuple):
    """What a classifier computes, in float32."""

    logits: jax.Array  # [B, classes]
    features: jax.Array  # [B, D]: the head's input, after the tanh layer where there is one


class ViT(nn.Module):
    """Patches, position embeddings, encoder, pooling, head: images [B, H, W, 3] in [-1, 1]."""

    patch: int
    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    num_classes: int
    pool: str
    representation_size: int | None
    dropout: float
    head_bias: float
    dtype: Any
    scan: bool
    remat: str

    @nn.compact
    def __call__(self, images: jax.Array, keys: jax.Array | None = None) -> Output:
        x = nn.Conv(
            self.width,
            (self.patch, self.patch),
            strides=(self.patch, self.patch),
            padding="VALID",
            dtype=self.dtype,
            name="embedding",
        )(images.astype(self.dtype))
        x = x.reshape(x.shape[0], -1, self.width)  # [B, N, D]

        position = self.param(
            "pos_embedding", nn.initializers.normal(0.02), (1, x.shape[1], self.width)
        )
        x = x + position.astype(self.dtype)
        if self.pool == "token":
            # The class token's own position embedding would only be added to it: it is part of it.
            token = self.param("cls", nn.initializers.zeros, (1, 1, self.width))
            token = jnp.broadcast_to(token.astype(self.dtype), (x.shape[0], 1, self.width))
            x = jnp.concatenate([token, x], axis=1)
        x = dropout(x, self.dropout, fold_keys(keys, 0))

        x = Encoder(
            self.depth,
            self.num_heads,
            self.mlp_dim,
            self.dropout,
            self.dtype,
            self.scan,
            self.remat,
            name="Transformer",
        )(x, fold_keys(keys, 1))
        x = x.astype(jnp.float32)
        x = x[:, 0] if self.pool == "token" else x.mean(axis=1)

        if self.representation_size is not None:
            x = jnp.tanh(nn.Dense(self.representation_size, name="pre_logits")(x))
        head = nn.Dense(
            self.num_classes,
            kernel_init=nn.initializers.zeros,
            bias_init=nn.initializers.constant(self.head_bias),
            name="head",
        )
        return Output(logits=head(x), features=x)
