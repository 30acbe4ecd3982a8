"""Masked patch prediction: pretraining without labels (arXiv 2010.11929, appendix B.1.2).

Corrupts half of an image's patches. The model predicts the original content of each of them; by
default the mean colour, with 3 bits per channel.

Letters in shapes: B images, N patches, K predictions per patch, P patch side in pixels.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import optax

from vit_jax.config import InputError, unknown
from vit_jax.models.transformer import fold_keys
from vit_jax.models.variants import Model, ModelConfig, normalize

COLORS = 512  # 3 bits of each of red, green and blue
MASK = -1  # patch index of the learned mask embedding


@dataclasses.dataclass(frozen=True)
class MaskedPatchConfig:
    """Corruption and targets; the defaults are the paper's.

    Attributes:
        target: "mean_color", one of 512 colours per patch; "colors_4x4", one for each cell of the
            patch resized to 4 x 4; "pixels", all pixels of the patch, with squared error.
        corrupted: share of the patches to corrupt and predict.
        masked: share of the corrupted patches replaced by the mask embedding.
        swapped: share of the corrupted patches replaced by another patch of the image. The rest
            stay unchanged.
    """

    target: str = "mean_color"
    corrupted: float = 0.5
    masked: float = 0.8
    swapped: float = 0.1

    def __post_init__(self):
        if self.target not in TARGETS:
            raise unknown("target of masked patches", self.target, TARGETS)
        if not 0.0 < self.corrupted <= 1.0:
            raise InputError(f"corrupted = {self.corrupted}: expected a share in (0, 1]")
        if min(self.masked, self.swapped) < 0.0 or self.masked + self.swapped > 1.0:
            raise InputError(
                f"masked = {self.masked}, swapped = {self.swapped}: expected shares that sum to 1 "
                "at most"
            )


def corrupt(config: MaskedPatchConfig, key: jax.Array, patches: int) -> tuple[jax.Array, jax.Array]:
    """Draws the corruption of one image.

    The number of corrupted patches of each kind is the same for all images, so that images and
    microbatches have equal weight.

    Returns:
        patch indices int32 [N]: the patch whose embedding to use (itself if unchanged), or `MASK`;
        and bool [N], True for the corrupted patches, which the model predicts.
    """
    for_rank, for_swap = jax.random.split(key)
    count = max(1, round(config.corrupted * patches))
    masked = round(config.masked * count)
    swapped = min(round(config.swapped * count), count - masked)
    rank = jax.random.permutation(for_rank, patches)
    itself = jnp.arange(patches)
    another = (itself + jax.random.randint(for_swap, (patches,), 1, max(patches, 2))) % patches
    patch_indices = jnp.where(rank < masked + swapped, another, itself)
    return jnp.where(rank < masked, MASK, patch_indices), rank < count


def split_patches(images: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """Splits images [B, H, W, 3] into patches [B, N, H / rows, W / columns, 3]."""
    batch, height, width, channels = images.shape
    rows, columns = grid
    cells = images.reshape(batch, rows, height // rows, columns, width // columns, channels)
    return cells.swapaxes(2, 3).reshape(batch, rows * columns, *cells.shape[2:5:2], channels)


def quantize(colors: jax.Array) -> jax.Array:
    """Quantises colours [..., 3] in [-1, 1] to int32 [...] in [0, 512): 3 bits per channel."""
    levels = jnp.clip((colors + 1.0) * 4.0, 0.0, 7.0).astype(jnp.int32)
    return (levels * jnp.array([64, 8, 1])).sum(axis=-1)


def mean_color(patches: jax.Array) -> jax.Array:
    """Computes the target "mean_color": patches [B, N, P, P, 3] -> int32 [B, N, 1]."""
    return quantize(patches.mean(axis=(2, 3)))[..., None]


def colors_4x4(patches: jax.Array) -> jax.Array:
    """Computes the target "colors_4x4": patches [B, N, P, P, 3] -> int32 [B, N, 16]."""
    batch, number = patches.shape[:2]
    cells = split_patches(patches.reshape(-1, *patches.shape[2:]), (4, 4))
    return quantize(cells.mean(axis=(2, 3))).reshape(batch, number, 16)


def pixels(patches: jax.Array) -> jax.Array:
    """Computes the target "pixels": patches [B, N, P, P, 3] -> [B, N, P * P * 3]."""
    return patches.reshape(*patches.shape[:2], -1)


TARGETS = {"mean_color": mean_color, "colors_4x4": colors_4x4, "pixels": pixels}


def patch_outputs(config: MaskedPatchConfig, patch: tuple[int, int]) -> int:
    """Returns the number of outputs per patch of (height, width) pixels.

    Raises ValueError for "colors_4x4" if 4 doesn't divide the patch.
    """
    if config.target == "colors_4x4" and (patch[0] % 4 or patch[1] % 4):
        raise InputError(f"colors_4x4 of patches of {patch[0]} x {patch[1]}: 4 must divide both")
    outputs = {"mean_color": COLORS, "colors_4x4": 16 * COLORS, "pixels": 3 * math.prod(patch)}
    return outputs[config.target]


def predicting(config: MaskedPatchConfig, model: Model) -> ModelConfig:
    """Returns the config of `model` with patch outputs.

    Raises ValueError for a model without patches, and if `patch_outputs` does.
    """
    if model.grid is None:
        raise InputError(f"masked_patches: {model.config.variant} has no patches; use a ViT")
    patch = tuple(side // n for side, n in zip(model.image_size, model.grid, strict=True))
    return dataclasses.replace(model.config, patch_outputs=patch_outputs(config, patch))


def masked_patch_losses(
    config: MaskedPatchConfig,
    model: Model,
    params: dict,
    images: jax.Array,
    keys: jax.Array,
    *,
    train: bool,
) -> tuple[jax.Array, jax.Array, dict | None]:
    """Computes losses and accuracies over the corrupted patches of each image.

    The loss is cross-entropy, or mean squared error for "pixels".

    Args:
        config: corruption and targets.
        model: a model with patch outputs (see `predicting`).
        params: its parameters.
        images: [B, H, W, 3], uint8 or float in [-1, 1].
        keys: PRNG keys [B] for the corruption and, with `train`, for dropout.
        train: whether dropout is on.

    Returns:
        The mean loss [B], the share of correct predictions [B], and the model's mean squares if it
        measures them. A predicted pixel is correct within 1/8, half a step of 3 bits.
    """
    images = normalize(images)
    target = TARGETS[config.target](split_patches(images, model.grid))  # [B, N, K]
    corrupt_image = jax.vmap(corrupt, (None, 0, None))
    # The model folds 0, 1 and 2 into each image's key.
    patch_indices, corrupted = corrupt_image(config, fold_keys(keys, 3), target.shape[1])
    output = model.apply(params, images, keys if train else None, patch_indices)
    predicted = output.patches
    if config.target == "pixels":
        losses = jnp.square(predicted - target)
        right = jnp.abs(predicted - target) < 1 / 8
    else:
        logits = predicted.reshape(*target.shape, COLORS)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, target)
        right = logits.argmax(axis=-1) == target
    share = corrupted / corrupted.sum(axis=1, keepdims=True)
    losses, hits = ((x.mean(axis=-1) * share).sum(axis=1) for x in (losses, right))
    return losses, hits, output.squares
