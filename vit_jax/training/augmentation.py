"""Augmentation on the device, inside the jitted step: colour jitter, mixup, cutmix.

All random numbers are drawn first, as a function of (seed, step, row of the global batch). So every
mesh and any accumulation mixes the same images in the same shares. Rows 2k and 2k + 1 are mixed
with each other. Examples come in random order, so the partner is random. A device holds whole
pairs, so no image crosses the network. Rolling the batch by one row, as big_vision does, costs a
collective permutation per step; reversing it, as timm does, sends the whole batch.

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
    """Augmentation inside the step; 0 turns an operation off.

    Attributes:
      mixup: alpha of mixup (Zhang et al., arXiv 1710.09412). Shares are from Beta(alpha, alpha);
        the row itself gets the larger one, as in big_vision.
      cutmix: alpha of CutMix (Yun et al., arXiv 1905.04899). If mixup is set too, a fair coin
        chooses between them, as in DeiT (arXiv 2012.12877).
      per_example: whether each row draws its own share, box and coin. By default the whole batch
        shares them, as published.
      brightness, contrast, saturation: factors are uniform in 1 +- this value.
      hue: turns of the colour circle are uniform in +- this value, at most 0.5.
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
    """Draws a step's random numbers for `augment`: float32 arrays [B, ...]."""
    # Always Threefry: the rows' keys are split over devices. No run reaches step 2**32 - 1.
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
        one_key = jax.random.fold_in(key, batch_size)  # differs from every row's key
        mixing = jax.vmap(lambda key: _draw_mixing(config, jax.random.fold_in(key, 1)))(
            keys if config.per_example else one_key[None]
        )
        draws |= jax.tree.map(lambda x: jnp.broadcast_to(x, (batch_size, *x.shape[1:])), mixing)
    return constrain_batch(draws)


def _draw_mixing(config: AugmentationConfig, key: jax.Array) -> dict:
    """Draws the shares that mixup and cutmix keep of a row, and the box's centre in [0, 1)."""
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
    """Samples Beta(alpha, alpha) from a table of its quantiles.

    The rejection loops of jax.random.beta take longer to compile than a small model.
    """
    from scipy.special import betaincinv  # slow to import, and most recipes don't mix

    quantiles = jnp.array(betaincinv(alpha, alpha, np.linspace(0, 1, 4097)), jnp.float32)
    position = 4096 * jax.random.uniform(key)
    below = position.astype(int)
    return quantiles[below] + (position - below) * (quantiles[below + 1] - quantiles[below])


def augment(images: jax.Array, targets: jax.Array, draws: dict) -> tuple[jax.Array, jax.Array]:
    """Augments uint8 [B, H, W, 3] and targets [B, C] to float32 in [-1, 1] and soft targets.

    B may be the rows of a microbatch that holds whole pairs of the batch.
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
    """Exchanges rows 2k and 2k + 1 of [B, ...]."""
    return x.reshape(-1, 2, *x.shape[1:])[:, ::-1].reshape(x.shape)


def inside_box(kept: jax.Array, centre: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Returns CutMix's boxes, bool [B, H, W, 1]: sqrt(1 - kept) of both sides, clipped.

    arXiv 1905.04899, equation 2, in whole pixels as in the authors' code.
    """

    def along(axis: int) -> jax.Array:  # [B, length of the axis]
        half = jnp.floor(size[axis] * jnp.sqrt(1 - kept)) // 2
        distance = jnp.arange(size[axis]) - jnp.floor(size[axis] * centre[:, axis])[:, None]
        return (-half[:, None] <= distance) & (distance < half[:, None])

    return (along(0)[:, :, None] & along(1)[:, None, :])[..., None]


def color_jitter(images: jax.Array, jitter: jax.Array) -> jax.Array:
    """Jitters the colours of float [B, H, W, 3] in [0, 1] by offsets [B, 4]; 0 changes nothing.

    Uses Pillow's and torchvision's formulas in the order brightness, contrast, saturation, hue
    (torchvision's order is random). Values are clipped after each.
    """

    def grey(x):
        return (x * jnp.array(GREY)).sum(-1, keepdims=True)

    brightness, contrast, saturation, hue = jitter.T[:, :, None, None, None]
    x = jnp.clip(images * (1 + brightness), 0, 1)
    x = jnp.clip(x + contrast * (x - grey(x).mean((1, 2), keepdims=True)), 0, 1)
    x = jnp.clip(x + saturation * (x - grey(x)), 0, 1)
    return _turn_hue(x, hue[..., 0])


def _turn_hue(x: jax.Array, turn: jax.Array) -> jax.Array:
    """Turns the hue in HSV, where it runs from 0 to 6."""
    red, green, blue = x[..., 0], x[..., 1], x[..., 2]
    value = x.max(-1)
    chroma = value - x.min(-1)
    divisor = jnp.where(chroma > 0, chroma, 1.0)
    # Not `value == red`: a compiler that computes red twice may round it differently.
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
