"""MLP-Mixer (arXiv 2105.01601): MLPs across tokens and across channels in turn.

Parameter names are those of the published checkpoints.

Letters in shapes: B images, N tokens, D width.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.models.head import Output, classify, measured
from vit_jax.models.transformer import (
    MlpBlock,
    TransformerConfig,
    drop_branch,
    fold_keys,
    layer_norm,
    rematted,
)


class MixerBlock(nn.Module):
    """Token mixing, then channel mixing: [B, N, D] -> [B, N, D].

    Call arguments: PRNG `keys` [B], or None without dropout; `drop` [], the stochastic depth rate.
    """

    config: TransformerConfig
    token_mlp_dim: int

    @nn.compact
    def __call__(self, x: jax.Array, keys: jax.Array | None, drop: jax.Array) -> jax.Array:
        across_tokens = dataclasses.replace(self.config, mlp_dim=self.token_mlp_dim)
        init = nn.initializers.lecun_normal()
        y = layer_norm(self.config, "LayerNorm_0")(x).swapaxes(1, 2)
        y = MlpBlock(across_tokens, init, name="token_mixing")(y, fold_keys(keys, 0))
        x = x + drop_branch(y.swapaxes(1, 2), drop, fold_keys(keys, 1))
        y = layer_norm(self.config, "LayerNorm_1")(x)
        y = MlpBlock(self.config, init, name="channel_mixing")(y, fold_keys(keys, 2))
        return measured(self, x + drop_branch(y, drop, fold_keys(keys, 3)))


class Mixer(nn.Module):
    """Patch embedding, blocks, LayerNorm, mean, head: images [B, H, W, 3] in [-1, 1]."""

    config: TransformerConfig
    patch: int
    token_mlp_dim: int
    num_classes: int
    head_bias: float

    @nn.compact
    def __call__(self, images: jax.Array, keys: jax.Array | None = None) -> Output:
        config, sides = self.config, (self.patch, self.patch)
        x = nn.Conv(config.width, sides, sides, "VALID", dtype=config.dtype, name="stem")(images)
        x = x.reshape(x.shape[0], -1, config.width)
        drops = jnp.linspace(0.0, config.stochastic_depth, config.depth)
        block = rematted(MixerBlock, config.remat)
        for i in range(config.depth):
            named = block(config, self.token_mlp_dim, name=f"MixerBlock_{i}")
            x = named(x, fold_keys(keys, i), drops[i])
        x = layer_norm(config, "pre_head_layer_norm")(x).astype(jnp.float32).mean(axis=1)
        return classify(x, self.num_classes, self.head_bias)
