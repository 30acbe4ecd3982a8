"""A plain Flax ViT's training step, as in the reference code, for comparison.

bfloat16 activations, class token, learned positions, `nn.MultiHeadDotProductAttention`, unrolled,
without dropout; softmax cross-entropy, gradients clipped to norm 1, Adam with bfloat16 momentum,
weight decay. Sizes are those of arXiv 2010.11929.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from vit_jax.data.pipeline import DataConfig
from vit_jax.models.variants import VIT_SIZES, ModelConfig
from vit_jax.training.optimizer import OptimizerConfig, ScheduleConfig
from vit_jax.training.recipe import TrainConfig


def recipe(
    model: ModelConfig,
    batch_size: int,
    image_size: int = 224,
    momentum_dtype: str = "bfloat16",
    **fields: Any,
) -> TrainConfig:
    """Returns our recipe with the settings of the yardsticks; `fields` are of `TrainConfig`."""
    return TrainConfig(
        model=model,
        data=DataConfig("imagenet2012", "train"),
        image_size=image_size,
        batch_size=batch_size,
        steps=1000,
        schedule=ScheduleConfig(1e-3, warmup=10),
        optimizer=OptimizerConfig(weight_decay=0.1, momentum_dtype=momentum_dtype),
        **fields,
    )


class Block(nn.Module):
    mlp_dim: int
    heads: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.LayerNorm(dtype=self.dtype)(x)
        init = nn.initializers.xavier_uniform()
        x += nn.MultiHeadDotProductAttention(self.heads, dtype=self.dtype, kernel_init=init)(y, y)
        y = nn.LayerNorm(dtype=self.dtype)(x)
        y = nn.gelu(nn.Dense(self.mlp_dim, dtype=self.dtype, kernel_init=init)(y))
        return x + nn.Dense(x.shape[-1], dtype=self.dtype, kernel_init=init)(y)


class PlainViT(nn.Module):
    """[B, H, W, 3] in [-1, 1] -> logits [B, classes]."""

    variant: str  # S/16
    depth: int | None = None  # the variant's
    num_classes: int = 1000
    dtype: jnp.dtype = jnp.bfloat16

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        size, _, patch = self.variant.partition("/")
        width, depth, mlp_dim, heads = VIT_SIZES[size]
        patches = (int(patch), int(patch))
        x = nn.Conv(width, patches, patches, padding="VALID", dtype=self.dtype)(images)
        x = x.reshape(len(x), -1, width)
        positions = nn.initializers.normal(1 / width**0.5)
        x += self.param("positions", positions, (1, x.shape[1], width)).astype(x.dtype)
        token = self.param("token", nn.initializers.zeros, (1, 1, width)).astype(x.dtype)
        x = jnp.concatenate([jnp.tile(token, (len(x), 1, 1)), x], axis=1)
        for _ in range(self.depth or depth):
            x = Block(mlp_dim, heads, self.dtype)(x)
        x = nn.LayerNorm(dtype=self.dtype)(x)[:, 0]
        return nn.Dense(self.num_classes, kernel_init=nn.initializers.zeros)(x)


def make_step(
    model: PlainViT, momentum_dtype: jnp.dtype = jnp.bfloat16
) -> tuple[optax.GradientTransformation, Callable]:
    """Returns the optimizer and a step (params, state, images, labels) -> (params, state, loss)."""
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(mu_dtype=momentum_dtype),
        optax.add_decayed_weights(1e-1),
        optax.scale_by_learning_rate(1e-3),
    )

    def step(params, state, images, labels):
        def loss(params):
            logits = model.apply(params, images.astype(jnp.float32) / 127.5 - 1.0)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    return optimizer, step


def plain(variant: str, depth: int | None, images: jax.ShapeDtypeStruct) -> tuple[Callable, tuple]:
    """Returns a step (state, images, labels) -> (state, loss) and its state's shapes.

    Args:
      variant: such as ViT-B/16.
      depth: replaces the variant's, unless None.
      images: the global batch.
    """
    model = PlainViT(variant.removeprefix("ViT-"), depth)
    optimizer, step = make_step(model)

    def joined(state, images, labels):
        params, state, loss = step(*state, images, labels)
        return (params, state), loss

    params = jax.eval_shape(model.init, jax.random.key(0), images)
    return joined, (params, jax.eval_shape(optimizer.init, params))
