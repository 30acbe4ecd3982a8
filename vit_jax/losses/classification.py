"""Classification losses. Letters in shapes: B images, C classes, K labels per image at most."""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from vit_jax.config import unknown


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The training objective.

    Attributes:
      name: `softmax`: cross-entropy. `sigmoid`: the sum over classes of binary cross-entropies.
        `masked_patches`: see `losses.masked_patches`; it uses no labels.
      label_smoothing: share of each target that is spread over all classes, in [0, 1).
    """

    name: str = "softmax"
    label_smoothing: float = 0.0

    def __post_init__(self):
        if self.name not in (known := ("softmax", "sigmoid", "masked_patches")):
            raise unknown("loss", self.name, known)
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ValueError(f"label_smoothing = {self.label_smoothing}: expected [0, 1)")
        if self.label_smoothing and self.masks_patches:
            raise ValueError("label_smoothing: masked_patches has no labels to smooth")

    @property
    def masks_patches(self) -> bool:
        """Whether the objective is masked patch prediction."""
        return self.name == "masked_patches"


def make_targets(labels: jax.Array, num_classes: int) -> jax.Array:
    """Converts labels [B], or [B, K] padded with -1, to 0/1 targets [B, C]."""
    one_hot = jax.nn.one_hot(labels, num_classes)
    return one_hot if labels.ndim == 1 else one_hot.max(axis=1)


def share_targets(config: LossConfig, targets: jax.Array) -> jax.Array:
    """For softmax, divides each row of targets [B, C] by its number of labels."""
    if config.name == "softmax":
        targets = targets / jnp.maximum(targets.sum(-1, keepdims=True), 1.0)
    return targets


def example_losses(config: LossConfig, logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Computes each example's loss: logits [B, C], targets [B, C] -> [B].

    Label smoothing e replaces targets t by t * (1 - e) + e / C.
    """
    num_classes = logits.shape[-1]
    targets = share_targets(config, targets)
    targets = targets * (1.0 - config.label_smoothing) + config.label_smoothing / num_classes
    if config.name == "softmax":
        return optax.softmax_cross_entropy(logits, targets)
    return optax.sigmoid_binary_cross_entropy(logits, targets).sum(axis=-1)
