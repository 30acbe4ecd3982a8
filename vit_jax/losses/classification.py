"""Classification losses. Letters in shapes: B images, C classes, K labels per image at most."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vit_jax.config import InputError, unknown


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The training objective.

    Attributes:
      name: `softmax`: cross-entropy. `sigmoid`: the sum over classes of binary cross-entropies.
        `masked_patches`: see `losses.masked_patches`; it uses no labels.
      label_smoothing: share of each target that is spread over all classes, in [0, 1).
      class_weights: factors of the losses of each class's images. "balanced" is N / (C n) for a
        class with n of the N training images of C classes. {"cat": 2.0}, or as text
        "cat=2,dog=0.5", names classes; others have 1. A list has a number for each class, in their
        order. An image with several labels, or a mixture of images, has the weights' mean.
      z_loss: adds this times log(Z)^2 to a softmax's loss, where Z is the sum of the exponentials
        of the logits, against logits that drift away (PaLM, arXiv 2204.02311, section 5: 1e-4).
    """

    name: str = "softmax"
    label_smoothing: float = 0.0
    class_weights: str | tuple[float, ...] | dict[str, float] = ()
    z_loss: float = 0.0

    def __post_init__(self):
        if self.name not in (known := ("softmax", "sigmoid", "masked_patches")):
            raise unknown("loss", self.name, known)
        if not 0.0 <= self.label_smoothing < 1.0:
            raise InputError(f"label_smoothing = {self.label_smoothing}: expected [0, 1)")
        if self.label_smoothing and self.masks_patches:
            raise InputError("label_smoothing: masked_patches has no labels to smooth")
        if self.class_weights and self.masks_patches:
            raise InputError("class_weights: masked_patches has no labels to weigh")
        if self.z_loss < 0 or (self.z_loss and self.name != "softmax"):
            raise InputError(
                f"z_loss = {self.z_loss} of the loss {self.name!r}: expected at least 0, and the "
                "loss 'softmax' if more"
            )
        given = self._by_name() if self.class_weights != "balanced" else {}
        if wrong := [f"{k}: {v:g}" for k, v in given.items() if not 0 < v < float("inf")]:
            raise InputError(f"class_weights {', '.join(wrong)}: expected more than 0")

    @property
    def masks_patches(self) -> bool:
        """Whether the objective is masked patch prediction."""
        return self.name == "masked_patches"

    def _by_name(self) -> dict:
        """The weights by class: names, or numbers where they are listed in order."""
        weights = self.class_weights
        if not isinstance(weights, str):
            return dict(weights if isinstance(weights, dict) else enumerate(weights))
        try:
            pairs = [item.rsplit("=", 1) for item in weights.split(",") if item]
            return {name.strip(): float(weight) for name, weight in pairs}
        except ValueError as error:
            raise InputError(
                f'class_weights = {weights!r}: expected "balanced", or names with numbers: '
                '"cat=2,dog=0.5"'
            ) from error

    def weigh(self, names: Sequence[str], counts: np.ndarray) -> "LossConfig":
        """Returns the config with a weight for each class, given their names and training images.

        Raises ValueError for an unknown class, or for "balanced" if a class has no image.
        """
        if not self.class_weights:
            return self
        if self.class_weights == "balanced":
            if not counts.all():
                absent = ", ".join(names[i] for i in np.flatnonzero(counts == 0)[:10])
                raise InputError(f"class_weights = 'balanced': there is no image of {absent}")
            weights = counts.sum() / (len(counts) * counts)
        else:
            given = self._by_name()
            if isinstance(self.class_weights, tuple):
                if len(given) != len(names):
                    raise InputError(
                        f"class_weights has {len(given)} numbers: expected one for each of the "
                        f"{len(names)} classes"
                    )
                given = dict(zip(names, given.values(), strict=True))
            for name in given:
                if name not in names:
                    raise unknown("class in loss.class_weights", name, names)
            weights = [given.get(name, 1.0) for name in names]
        return dataclasses.replace(self, class_weights=tuple(map(float, weights)))


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
    weights = _image_weights(config, targets) if config.class_weights else None
    targets = targets * (1.0 - config.label_smoothing) + config.label_smoothing / num_classes
    if config.name == "softmax":
        losses = optax.softmax_cross_entropy(logits, targets)
        if config.z_loss:
            losses += config.z_loss * jnp.square(jax.nn.logsumexp(logits, axis=-1))
    else:
        losses = optax.sigmoid_binary_cross_entropy(logits, targets).sum(axis=-1)
    return losses if weights is None else weights * losses


def _image_weights(config: LossConfig, targets: jax.Array) -> jax.Array:
    """Each image's weight, [B] for targets [B, C]; without labels it is 1."""
    if not isinstance(config.class_weights, tuple):
        raise InputError(
            f"class_weights = {config.class_weights!r}: a run looks up classes and counts in its "
            "data; here there is none, give a number for each class"
        )
    total = targets.sum(axis=-1)
    weighted = targets @ jnp.array(config.class_weights, targets.dtype)
    return jnp.where(total > 0, weighted / jnp.maximum(total, 1e-12), 1.0)
