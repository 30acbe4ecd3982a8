"""Accuracy and loss over a whole dataset, every example counted exactly once."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from vit_jax.data.pipeline import DataConfig
from vit_jax.data.sources import open_source
from vit_jax.evaluation.features import make_batches
from vit_jax.models.variants import Model
from vit_jax.parallel.mesh import replicated
from vit_jax.training.step import LossConfig, example_losses, make_targets


@dataclasses.dataclass(frozen=True)
class ClassificationConfig:
    """What to evaluate on. A top-1 prediction is right if it is one of the image's labels."""

    data: DataConfig
    batch_size: int = 256


def make_classification(
    config: ClassificationConfig, model: Model, mesh: Mesh, loss: LossConfig
) -> Callable[[dict], dict[str, float]]:
    """params -> {"accuracy": share in [0, 1], "loss": mean, "examples": count}.

    Opens the dataset at once, so that a missing one is found before anything is trained.
    """
    source = open_source(config.data.dataset, config.data.split, config.data.data_dir)
    if source.num_classes != model.num_classes:
        raise ValueError(
            f"{config.data.dataset} has {source.num_classes} classes, the model {model.num_classes}"
        )
    batches = make_batches(source, config.data, model, mesh, config.batch_size)

    def count(params, batch):
        logits = model.apply(params, batch["image"]).logits
        targets = make_targets(batch["label"], model.num_classes)
        correct = jnp.take_along_axis(targets, logits.argmax(-1)[:, None], axis=1)[:, 0] > 0
        losses = jnp.where(batch["mask"], example_losses(loss, logits, targets), 0.0)
        return {
            "correct": jnp.sum(correct & batch["mask"]),
            "loss": losses.sum(),
            "examples": batch["mask"].sum(),
        }

    count = jax.jit(count, out_shardings=replicated(mesh))

    def evaluate(params: dict) -> dict[str, float]:
        totals = [jax.device_get(count(params, batch)) for batch in batches()]
        examples = sum(int(t["examples"]) for t in totals)
        return {
            "accuracy": sum(int(t["correct"]) for t in totals) / examples,
            "loss": float(sum(t["loss"].astype(float) for t in totals)) / examples,
            "examples": examples,
        }

    return evaluate
