"""BiT ResNets (arXiv 1912.11370) and the hybrid's stem, with GroupNorm and weight standardisation.

Two published versions: `v1`, post-activation, in the hybrids of arXiv 2010.11929; `v2`,
pre-activation, in BiT. Letters in shapes: B images, H height, W width, C channels.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.models.head import Output, classify, measured
from vit_jax.models.transformer import rematted


class StdConv(nn.Module):
    """A convolution without bias that standardises its kernel (arXiv 1903.10520).

    Each output channel's kernel gets mean 0 and variance 1. v1 divides by (standard deviation +
    1e-5) and pads as XLA's "SAME". v2 divides by sqrt(variance + 1e-10) and pads all sides equally.
    """

    features: int
    size: int
    stride: int
    version: str
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        kernel = kernel - kernel.mean(axis=(0, 1, 2))
        variance = jnp.square(kernel).mean(axis=(0, 1, 2))
        if self.version == "v1":
            kernel, padding = kernel / (jnp.sqrt(variance) + 1e-5), "SAME"
        else:
            kernel, padding = kernel / jnp.sqrt(variance + 1e-10), [(self.size // 2,) * 2] * 2
        return jax.lax.conv_general_dilated(
            x,
            kernel.astype(self.dtype),
            (self.stride, self.stride),
            padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )


class ResidualUnit(nn.Module):
    """A bottleneck: 1x1, 3x3 with `stride`, 1x1: [B, H, W, C] -> [B, H / s, W / s, 4 channels]."""

    channels: int
    stride: int
    version: str
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def conv(name, features, size=1, stride=1):
            return StdConv(features, size, stride, self.version, self.dtype, name=name)

        outputs, shortcut = 4 * self.channels, x
        projects = x.shape[-1] != outputs or self.stride != 1
        steps = [
            (self.channels, 1, 1),
            (self.channels, 3, self.stride),
            (outputs, 1, 1),
        ]
        if self.version == "v2":
            for i, step in enumerate(steps, start=1):
                x = nn.relu(group_norm(f"gn{i}", self.version, self.dtype)(x))
                if i == 1 and projects:
                    shortcut = conv("conv_proj", outputs, stride=self.stride)(x)
                x = conv(f"conv{i}", *step)(x)
            return measured(self, x + shortcut)
        if projects:
            shortcut = conv("conv_proj", outputs, stride=self.stride)(x)
            shortcut = group_norm("gn_proj", self.version, self.dtype)(shortcut)
        for i, step in enumerate(steps, start=1):
            x = conv(f"conv{i}", *step)(x)
            # The last scale starts at zero, so that the unit starts as the identity.
            scale = nn.initializers.zeros if i == 3 else nn.initializers.ones
            x = group_norm(f"gn{i}", self.version, self.dtype, scale)(x)
            x = nn.relu(x if i < 3 else x + shortcut)
        return measured(self, x)


class Stage(nn.Module):
    """A sequence of residual units; the first has the stride."""

    units: int
    channels: int
    stride: int
    version: str
    dtype: Any
    remat: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        unit = rematted(ResidualUnit, self.remat)
        for i in range(self.units):
            arguments = (self.channels, 1 if i else self.stride, self.version, self.dtype)
            x = unit(*arguments, name=f"unit{i + 1}")(x)
        return x


@dataclasses.dataclass(frozen=True)
class StemConfig:
    """A ResNet's root and stages, without the pooling and head that follow."""

    stages: tuple[int, ...]  # units per stage
    width: int  # channels of the root; 64 for "x1"
    version: str  # v1 | v2
    zero_padded_pool: bool  # v2: whether max pooling pads with 0 instead of -inf
    dtype: Any
    remat: str  # policy per unit, a key of `transformer.REMAT_POLICIES`


def stem(config: StemConfig, x: jax.Array) -> list[jax.Array]:
    """Applies root and stages to images [B, H, W, 3]; returns the outputs of all, root first.

    Each is [B, H / r, W / r, C]: r is 4 after the root and the first stage, and twice as large
    after each further stage. Call it inside a module, which then owns the parameters.
    """
    version, dtype = config.version, config.dtype
    x = StdConv(config.width, 7, 2, version, dtype, name="conv_root")(x)
    if version == "v1":
        x = nn.relu(group_norm("gn_root", version, dtype)(x))
        x = nn.max_pool(x, window_shape=(3, 3), strides=(2, 2), padding="SAME")
    else:
        outside = 0.0 if config.zero_padded_pool else -jnp.inf
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=outside)
        # jax2onnx supports keyword arguments only, and ignores padding given as numbers.
        x = nn.max_pool(x, window_shape=(3, 3), strides=(2, 2))
    outputs = [x]
    for i, units in enumerate(config.stages):
        arguments = (units, config.width * 2**i, 2 if i else 1, version, dtype, config.remat)
        outputs.append(Stage(*arguments, name=f"block{i + 1}")(outputs[-1]))
    return outputs


class ResNet(nn.Module):
    """A ResNet classifier: images [B, H, W, 3] in [-1, 1].

    Features are the last stage's channels, averaged over the image [B, C]; with `stage_features`
    mean and deviation of each stage's channels [B, 2 (C_1 + C_2 + ...)].
    """

    stem: StemConfig
    stage_features: bool
    num_classes: int
    head_bias: float

    @nn.compact
    def __call__(self, images: jax.Array, keys: jax.Array | None = None) -> Output:
        outputs = stem(self.stem, images.astype(self.stem.dtype))
        x = outputs[-1]
        if self.stem.version == "v2":
            x = nn.relu(group_norm("gn_head", "v2", self.stem.dtype)(x))
        if self.stage_features:
            stages = (*map(nn.relu, outputs[1:-1]), x)
            features = jnp.concatenate([s for stage in stages for s in statistics(stage)], axis=1)
        else:
            features = x.astype(jnp.float32).mean(axis=(1, 2))
        return classify(features, self.num_classes, self.head_bias)


def statistics(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns mean and deviation of [B, H, W, C] over the image, float32 [B, C]."""
    x = x.astype(jnp.float32)
    # The constant bounds the gradient where all pixels are equal.
    return x.mean((1, 2)), jnp.sqrt(x.var((1, 2)) + 1e-6)


def group_norm(
    name: str, version: str, dtype: Any, scale_init: Callable = nn.initializers.ones
) -> nn.GroupNorm:
    """Returns GroupNorm with 32 groups, the version's epsilon and float32 statistics."""
    epsilon = 1e-6 if version == "v1" else 1e-5
    return nn.GroupNorm(32, epsilon=epsilon, dtype=dtype, scale_init=scale_init, name=name)
