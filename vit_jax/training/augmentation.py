"""Augmentation on the device, inside the jitted step: colour jitter, mixup, cutmix.

All random numbers are drawn beforehand, as a function of (seed, step, row of the global batch), so
every mesh and any accumulation mixes the same images in the same shares. A row is mixed with the
other one of its pair: 2k with 2k + 1. Examples come in random order, so that is a random partner;
and since a device holds whole pairs, no image crosses the network: rolling the batch by one row, as
big_vision does, costs a collective permutation a step, reversing it, as timm does, sends all of it.

Letters in shapes: B batch, H W image size, C classes.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.config import InputError
from vit_jax.models.variants import normalize
from vit_jax.parallel.mesh import constrain_batch

GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601 luma, as Pillow's


@dataclasses.dataclass(frozen=True)
class AugmentationConfig:
    """What the step does to the images; 0 leaves a thing out.

    Attributes:
      mixup: alpha of mixup (Zhang et al., arXiv 1710.09412): shares of Beta(alpha, alpha), the
        larger one for the row itself, as in big_vision.
      cutmix: alpha of CutMix (Yun et al., arXiv 1905.04899), likewise. With mixup too, a fair coin
        decides between them, as in DeiT (arXiv 2012.12877).
      per_example: each row draws its own share, box and coin; else the whole batch shares them, as
        published.
      brightness, contrast, saturation: factors are uniform in 1 +- this.
      hue: a turn of the colour circle, uniform in +- this, at most 0.5.
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    per_example: bool = False
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0

    def __post_init__(self):
        for name, most in {"brightness": 1, "contrast": 1, "saturation": 1, "hue": 0.5}.items():
            if not 0 <= getattr(self, name) <= most:
                raise InputError(f"{name} = {getattr(self, name)}: expected 0 to {most}")
        if min(self.mixup, self.cutmix) < 0:
            raise InputError(f"mixup = {self.mixup}, cutmix = {self.cutmix}: expected 0 or more")
        if self.per_example and not self.mixes:
            raise InputError("per_example: set mixup or cutmix too, or leave it")

    @property
    def mixes(self) -> bool:
        """Whether rows come in pairs."""
        return bool(self.mixup or self.cutmix)

    @property
    def jitter(self) -> tuple[float, ...]:
        """Strengths of brightness, contrast, saturation and hue."""
        return self.brightness, self.contrast, self.saturation, self.hue


def draw(config: AugmentationConfig, seed: int, step: jax.Array, batch_size: int) -> dict:
    """The random numbers of a step: float32 arrays [B, ...], for `augment`."""
    # Threefry whatever the default is: rows' keys are split over devices. No run has this step.
    key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), 2**32 - 1)
    key = jax.random.fold_in(key, step)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch_size))
    draws = {}
    if any(config.jitter):
        strengths = jnp.array(config.jitter)
        draws["jitter"] = jax.vmap(
            lambda key: strengths * jax.random.uniform(jax.random.fold_in(key, 0), (4,), minval=-1)
        )(keys)
    if config.mixes:
        one_key = jax.random.fold_in(key, batch_size)  # not a row's
        mixing = jax.vmap(lambda key: _draw_mixing(config, jax.random.fold_in(key, 1)))(
            keys if config.per_example else one_key[None]
        )
        draws |= jax.tree.map(lambda x: jnp.broadcast_to(x, (batch_size, *x.shape[1:])), mixing)
    return constrain_batch(draws)


def _draw_mixing(config: AugmentationConfig, key: jax.Array) -> dict:
    """What is left of a row by mixup and by cutmix, and where the box's centre is, from 0 to 1."""
    choice, *keys = jax.random.split(key, 4)
    draws = {}
    if config.mixup:
        share = _beta(keys[0], config.mixup)
        draws["mixup"] = jnp.maximum(share, 1 - share)
    if config.cutmix:
        draws["cutmix"] = _beta(keys[1], config.cutmix)
        draws["centre"] = jax.random.uniform(keys[2], (2,))
    if config.mixup and config.cutmix:
        cuts = jax.random.bernoulli(choice)
        draws["mixup"] = jnp.where(cuts, 1.0, draws["mixup"])
        draws["cutmix"] = jnp.where(cuts, draws["cutmix"], 1.0)
    return draws


def _beta(key: jax.Array, alpha: float) -> jax.Array:
    """Of Beta(alpha, alpha), by a table of its quantiles.

    The rejection loops of jax.random.beta take longer to compile than a small model.
    """
    from scipy.special import betaincinv  # slow to import, and most recipes don't mix

    quantiles = jnp.array(betaincinv(alpha, alpha, np.linspace(0, 1, 4097)), jnp.float32)
    position = 4096 * jax.random.uniform(key)
    below = position.astype(int)
    return quantiles[below] + (position - below) * (quantiles[below + 1] - quantiles[below])


def augment(images: jax.Array, targets: jax.Array, draws: dict) -> tuple[jax.Array, jax.Array]:
    """uint8 [B, H, W, 3] and targets [B, C] -> float32 in [-1, 1], and soft targets.

    B may be the rows of a microbatch, if its pairs are pairs of the batch.
    """
    if "jitter" in draws:
        images = 2 * color_jitter(images / 255.0, draws["jitter"]) - 1
    images = normalize(images)
    if "mixup" not in draws and "cutmix" not in draws:
        return images, targets
    share = jnp.ones((len(images), 1, 1, 1))
    if "mixup" in draws:
        share *= draws["mixup"][:, None, None, None]
    if "cutmix" in draws:
        share *= 1.0 - inside_box(draws["cutmix"], draws["centre"], images.shape[1:3])
    images = share * images + (1 - share) * partners(images)
    share = share.mean((1, 2, 3))[:, None]
    return images, share * targets + (1 - share) * partners(targets)


def partners(x: jax.Array) -> jax.Array:
    """[B, ...] with rows 2k and 2k + 1 exchanged."""
    return x.reshape(-1, 2, *x.shape[1:])[:, ::-1].reshape(x.shape)


def inside_box(kept: jax.Array, centre: jax.Array, size: tuple[int, int]) -> jax.Array:
    """CutMix's boxes: sqrt(1 - kept) of both sides, clipped at the border; bool [B, H, W, 1].

    arXiv 1905.04899, equation 2; in whole pixels as the authors' code has it.
    """

    def along(axis: int) -> jax.Array:  # [B, length of the axis]
        half = jnp.floor(size[axis] * jnp.sqrt(1 - kept)) // 2
        distance = jnp.arange(size[axis]) - jnp.floor(size[axis] * centre[:, axis])[:, None]
        return (-half[:, None] <= distance) & (distance < half[:, None])

    return (along(0)[:, :, None] & along(1)[:, None, :])[..., None]


def color_jitter(images: jax.Array, jitter: jax.Array) -> jax.Array:
    """Float [B, H, W, 3] from 0 to 1, and offsets [B, 4], none at 0.

    Pillow's and torchvision's formulas, in the order brightness, contrast, saturation, hue
    (torchvision's is random); values are clipped after each.
    """

    def grey(x):
        return (x * jnp.array(GREY)).sum(-1, keepdims=True)

    brightness, contrast, saturation, hue = jitter.T[:, :, None, None, None]
    x = jnp.clip(images * (1 + brightness), 0, 1)
    x = jnp.clip(x + contrast * (x - grey(x).mean((1, 2), keepdims=True)), 0, 1)
    x = jnp.clip(x + saturation * (x - grey(x)), 0, 1)
    return _turn_hue(x, hue[..., 0])


def _turn_hue(x: jax.Array, turn: jax.Array) -> jax.Array:
    """Through HSV, whose hue counts from 0 to 6."""
    red, green, blue = x[..., 0], x[..., 1], x[..., 2]
    value = x.max(-1)
    chroma = value - x.min(-1)
    divisor = jnp.where(chroma > 0, chroma, 1.0)
    # Not by value == red: a compiler that computes red twice may round it in two ways.
    largest = x.argmax(-1)
    hue = jnp.select(
        [largest == 0, largest == 1],
        [(green - blue) / divisor, 2 + (blue - red) / divisor],
        4 + (red - green) / divisor,
    )
    position = (jnp.stack([hue + 5, hue + 3, hue + 1], -1) + 6 * turn[..., None]) % 6
    return value[..., None] - chroma[..., None] * jnp.clip(
        jnp.minimum(position, 4 - position), 0, 1
    )
