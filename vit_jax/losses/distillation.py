"""Distillation: the student also learns from a teacher's logits. B images, C classes."""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from vit_jax.config import InputError
from vit_jax.losses.classification import LossConfig, example_losses


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """A teacher and its share of the loss.

    Soft (Hinton et al., arXiv 1503.02531): the divergence of the student's probabilities from the
    teacher's, both at the temperature, times its square. Hard (DeiT, arXiv 2012.12877): the loss
    with the teacher's decision as label.

    Attributes:
      teacher: what `vit_jax.load` reads; "" for none.
      weight: of the teacher's part, in (0, 1]; the labels have the rest.
      temperature: divides both logits of soft distillation.
      hard: whether the teacher's decision counts, not its probabilities.
    """

    teacher: str = ""
    weight: float = 0.5
    temperature: float = 1.0
    hard: bool = False

    def __post_init__(self):
        if not 0 < self.weight <= 1:
            raise InputError(f"distill.weight = {self.weight}: expected over 0, to 1")
        if self.temperature <= 0:
            raise InputError(f"distill.temperature = {self.temperature}: expected more than 0")
        if self.hard and self.temperature != 1:
            raise InputError(
                f"distill.temperature = {self.temperature}: hard decisions have none, leave it at 1"
            )


def mix_losses(
    config: DistillConfig,
    loss: LossConfig,
    losses: jax.Array,
    logits: jax.Array,
    teacher: jax.Array,
) -> jax.Array:
    """Mixes losses [B] by labels with those by a teacher's logits [B, C]; returns [B]."""
    if config.hard:
        plain = LossConfig(loss.name)
        classes = teacher.shape[-1]
        softmax = loss.name == "softmax"
        decision = jax.nn.one_hot(teacher.argmax(-1), classes) if softmax else teacher > 0
        taught = example_losses(plain, logits, decision.astype(jnp.float32))
    else:
        ours, theirs = logits / config.temperature, teacher / config.temperature
        taught = _divergence(loss.name, ours, theirs) * config.temperature**2
    return (1 - config.weight) * losses + config.weight * taught


def _divergence(loss: str, logits: jax.Array, teacher: jax.Array) -> jax.Array:
    """Kullback-Leibler divergence from the teacher [B]: of the classes, or summed over each one."""
    if loss == "softmax":
        return optax.kl_divergence(jax.nn.log_softmax(logits), jax.nn.softmax(teacher))
    p = jax.nn.sigmoid(teacher)
    cross, own = (optax.sigmoid_binary_cross_entropy(x, p) for x in (logits, teacher))
    return (cross - own).sum(axis=-1)
