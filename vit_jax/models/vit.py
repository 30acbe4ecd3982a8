"""The Vision Transformer (arXiv 2010.11929, section 3.1, equations 1 and 4), and the hybrid.

Parameter names are those of big_vision's checkpoints. Letters in shapes: B images, P patch side,
N tokens, D width.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.models.head import Output, classify
from vit_jax.models.positions import ADDED, Positions, position_table
from vit_jax.models.resnet import StemConfig, stem
from vit_jax.models.transformer import (
    Encoder,
    MlpBlock,
    MultiHeadAttention,
    TransformerConfig,
    dropout,
    fold_keys,
    layer_norm,
)
from vit_jax.parallel.mesh import constrain_batch


class MAPHead(nn.Module):
    """Multi-head attention pooling (arXiv 2106.04560, section 3.2): [B, N, D] -> [B, D].

    A learned probe attends to all tokens; an MLP with a residual connection follows. Its layers
    have all biases, and no norms but `LayerNorm_0`.
    """

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: jax.Array, keys: jax.Array | None) -> jax.Array:
        probe = self.param("probe", nn.initializers.xavier_uniform(), (1, 1, x.shape[-1]))
        probe = jnp.broadcast_to(probe.astype(x.dtype), (x.shape[0], 1, x.shape[-1]))
        x = MultiHeadAttention(self.config, name="MultiHeadDotProductAttention_0")(
            probe, x, fold_keys(keys, 0)
        )
        y = layer_norm(self.config, "LayerNorm_0")(x)
        return (x + MlpBlock(self.config, name="MlpBlock_0")(y, fold_keys(keys, 1)))[:, 0]


def keep_patches(x: jax.Array, keys: jax.Array, count: int) -> jax.Array:
    """Keeps a random subset of each image's patches: [B, N, D], keys [B] -> [B, count, D]."""
    words = jax.vmap(lambda key: jax.random.bits(key, x.shape[1:2]))(keys)
    chosen = jnp.argsort(words, axis=1)[:, :count]
    return jnp.take_along_axis(x, chosen[..., None], axis=1)


class ViT(nn.Module):
    """Patch embedding, positions, encoder, pooling, head: images [B, H, W, 3] in [-1, 1].

    With `stem` (the hybrid), patches are taken from the stem's feature map. With `patch_outputs`,
    the model also predicts that many numbers per patch (appendix B.1.2). With `kept`, training
    drops all but so many patches of an image, chosen at random.

    Call arguments:
        keys: PRNG keys [B] for dropout; None turns it off.
        patch_indices: int [B, patches], only with `patch_outputs`. Replaces each patch's embedding
            by that of the given patch, or by the learned mask embedding for -1.
    """

    config: TransformerConfig
    patch: int
    positions: Positions
    pool: str
    pool_config: TransformerConfig
    final_norm: str
    pre_norm: bool
    class_token: bool
    distillation: bool
    registers: int
    representation_size: int | None
    num_classes: int
    head_bias: float
    stem: StemConfig | None
    patch_outputs: int | None
    kept: int | None = None

    @nn.compact
    def __call__(
        self,
        images: jax.Array,
        keys: jax.Array | None = None,
        patch_indices: jax.Array | None = None,
    ) -> Output:
        config, positions = self.config, self.positions
        x = images.astype(config.dtype)
        if self.stem is not None:
            x = stem(self.stem, x)[-1]
        x = nn.Conv(
            config.width,
            (self.patch, self.patch),
            strides=(self.patch, self.patch),
            padding="VALID",
            use_bias=not self.pre_norm,
            dtype=config.dtype,
            name="embedding",
        )(x)
        # Replicates the features on every device, even if the kernel is sharded.
        x = constrain_batch(x.reshape(x.shape[0], -1, config.width))  # [B, N, D]
        if self.patch_outputs is not None:
            mask = self.param("mask_embedding", nn.initializers.normal(0.02), (config.width,))
            if patch_indices is not None:
                indices = patch_indices[..., None]
                taken = jnp.take_along_axis(x, jnp.maximum(indices, 0), axis=1)
                x = jnp.where(indices < 0, mask.astype(x.dtype), taken)

        table = None
        if positions.at != "layers":
            table = position_table(self, positions, config.width, config.num_heads)
        if positions.kind in ADDED and positions.at == "stem":
            x, table = x + table.astype(config.dtype), None
        if self.kept is not None and keys is not None:
            x = keep_patches(x, fold_keys(keys, 3), self.kept)
        # The class token needs no position embedding: a sum of two parameters is one parameter.
        for name, count, init in (
            ("registers", self.registers, nn.initializers.normal(0.02)),
            ("distillation", int(self.distillation), nn.initializers.normal(0.02)),
            ("cls", int(self.class_token), nn.initializers.zeros),
        ):
            if count:
                token = self.param(name, init, (1, count, config.width)).astype(config.dtype)
                token = jnp.broadcast_to(token, (x.shape[0], *token.shape[1:]))
                x = jnp.concatenate([token, x], axis=1)
        x = dropout(x, config.dropout, fold_keys(keys, 0))
        if self.pre_norm:
            x = layer_norm(config, "pre_norm")(x)

        # With pool = "token" the last block computes only the tokens that the head reads.
        reads_all = self.pool != "token" or self.patch_outputs is not None
        read = None if reads_all else 1 + self.distillation
        first = None if self.is_mutable_collection("intermediates") else read
        encoder = Encoder(config, positions, self.final_norm == "tokens", name="Transformer")
        x = encoder(x, fold_keys(keys, 1), table, first)
        patches = None
        if self.patch_outputs is not None:
            patches = x[:, positions.prefix :].astype(jnp.float32)
            zeros = nn.initializers.zeros
            patches = nn.Dense(self.patch_outputs, kernel_init=zeros, name="patch_head")(patches)
        x = self._pooled(x, fold_keys(keys, 2))
        if self.distillation:  # the mean of two heads (arXiv 2012.12877, section 4)
            first, second = (
                classify(x[:, i], self.num_classes, self.head_bias, name)
                for i, name in enumerate(("head", "head_distillation"))
            )
            means = ((a + b) / 2 for a, b in zip(first[:2], second[:2], strict=True))
            return Output(*means, patches)
        if self.representation_size is not None:
            x = jnp.tanh(nn.Dense(self.representation_size, name="pre_logits")(x))
        return classify(x, self.num_classes, self.head_bias)._replace(patches=patches)

    def _pooled(self, x: jax.Array, keys: jax.Array | None) -> jax.Array:
        """Pools tokens, float32: [B, N, D] -> [B, D]; [B, 2, D] for two class tokens."""
        prefix = self.positions.prefix
        if self.pool == "token":
            x = x[:, : 1 + self.distillation] if self.distillation else x[:, 0]
        elif self.pool == "map":  # of all tokens but registers
            tokens = [x[:, :1], x[:, prefix:]] if self.class_token else [x[:, prefix:]]
            x = MAPHead(self.pool_config, name="MAPHead_0")(jnp.concatenate(tokens, axis=1), keys)
        x = x.astype(jnp.float32)
        if self.pool in ("gap", "token+gap"):
            mean = x[:, prefix:].mean(axis=1)
            x = mean if self.pool == "gap" else jnp.concatenate([x[:, 0], mean], axis=-1)
        if self.final_norm == "pooled":
            x = layer_norm(dataclasses.replace(self.config, dtype=jnp.float32), "pooled_norm")(x)
        return x
