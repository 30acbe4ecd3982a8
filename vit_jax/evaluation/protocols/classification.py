"""Accuracy, loss and calibration over a whole dataset; counts every example exactly once."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vit_jax.config import InputError
from vit_jax.data.pipeline import open_data
from vit_jax.data.sources import Source
from vit_jax.evaluation.by_class import class_metrics
from vit_jax.evaluation.calibration import bin_confidences, calibration_error
from vit_jax.evaluation.features import make_batches
from vit_jax.evaluation.registry import EvaluatorConfig
from vit_jax.losses.classification import LossConfig, example_losses, make_targets
from vit_jax.models.variants import Model
from vit_jax.parallel.mesh import replicated


@dataclasses.dataclass(frozen=True)
class Config(EvaluatorConfig):
    """The dataset to evaluate on, and options.

    A prediction is correct if it is one of the image's labels. Images without labels don't count
    (ImageNet-ReaL, Beyer et al., arXiv 2006.07159).

    Attributes:
      only_present: predicts only classes that occur in the split, as for ImageNet-A and ImageNet-R,
        which have 200 of the 1,000 classes.
      temperature: divides the logits; see `calibration.fit_temperature`.
      by_class: adds "balanced_accuracy" and "macro_f1", for images with one label.
    """

    protocol: str = "classification"
    only_present: bool = False
    temperature: float = 1.0
    by_class: bool = False

    def __post_init__(self):
        if not self.temperature > 0:
            raise InputError(f"temperature = {self.temperature}: expected more than 0")


def make(
    config: Config, model: Model, mesh: Mesh, loss: LossConfig
) -> Callable[[dict], dict[str, float]]:
    """Returns params -> {"accuracy": in [0, 1], "loss": mean, "ece": in [0, 1], "examples": count}.

    Adds "top5" for more than five classes, and "excluded", the number of images without labels.
    Opens the dataset at once, so that a missing one is an error before training.
    """
    source = open_data(config.data)
    loss = dataclasses.replace(loss, class_weights=())  # every image counts once
    if source.num_classes != model.num_classes:
        raise InputError(
            f"{config.data.dataset} has {source.num_classes} classes, the model {model.num_classes}"
        )
    if config.by_class and source.labels_per_example is not None:
        raise InputError(
            f"{config.data.dataset} has several labels an image: by_class needs one, leave it out"
        )
    batches = make_batches(source, config.data, model, mesh, config.batch_size)
    classes = present_classes(source) if config.only_present else np.arange(model.num_classes)
    best = min(5, len(classes) - 1)

    def count(params, batch):
        logits = model.apply(params, batch["image"]).logits[:, classes] / config.temperature
        targets = make_targets(batch["label"], model.num_classes)[:, classes]
        labelled = targets.max(axis=1) > 0
        mask = batch["mask"] & labelled
        _, top = jax.lax.top_k(logits, max(best, 1))
        hits = jnp.take_along_axis(targets, top, axis=1) > 0
        correct = jnp.take_along_axis(targets, logits.argmax(-1)[:, None], axis=1)[:, 0] > 0
        probabilities = jax.nn.sigmoid if loss.name == "sigmoid" else jax.nn.softmax
        counts = {}
        if config.by_class:
            predicted = jax.nn.one_hot(logits.argmax(-1), len(classes)) * mask[:, None]
            counts = {
                "labelled": (targets * mask[:, None]).sum(axis=0),
                "predicted": predicted.sum(axis=0),
                "right": (targets * predicted).sum(axis=0),
            }
        return {
            **counts,
            "correct": jnp.sum(correct & mask),
            "top5": jnp.sum(hits.any(axis=1) & mask),
            "loss": jnp.where(mask, example_losses(loss, logits, targets), 0.0).sum(),
            "bins": bin_confidences(probabilities(logits).max(axis=1), correct, mask),
            "examples": mask.sum(),
            "excluded": jnp.sum(batch["mask"] & ~labelled),
        }

    count = jax.jit(count, out_shardings=replicated(mesh))

    def evaluate(params: dict) -> dict[str, float]:
        counts = [jax.device_get(count(params, batch)) for batch in batches()]
        totals = {key: sum(c[key].astype(np.float64) for c in counts) for key in counts[0]}
        if not (examples := int(totals["examples"])):
            raise InputError(f"{config.data.dataset} {config.data.split}: no image has a label")
        result = {
            "accuracy": float(totals["correct"]) / examples,
            "loss": float(totals["loss"]) / examples,
            "ece": calibration_error(totals["bins"]),
            "examples": examples,
        }
        if best == 5:
            result["top5"] = float(totals["top5"]) / examples
        if config.by_class:
            result |= class_metrics(*(totals[k] for k in ("labelled", "predicted", "right")))
        if totals["excluded"]:
            result["excluded"] = int(totals["excluded"])
        return result

    return evaluate


def check_class_names(there: Sequence[str], here: Sequence[str]) -> None:
    """Raises ValueError if two lists of classes share names but number them differently.

    Lists without common names are accepted: they may name the same classes differently, such as
    ImageNet's words and WordNet ids.
    """
    wrong = [(i, a, b) for i, (a, b) in enumerate(zip(there, here, strict=False)) if a != b]
    if wrong and {*there} & {*here}:
        shown = ", ".join(f"{i} is {a!r} there and {b!r} here" for i, a, b in wrong[:5])
        raise InputError(
            f"the model's classes and the dataset's don't agree: {shown}. If classes were renamed, "
            "added or removed, restore their names or transfer again"
        )


def present_classes(source: Source) -> np.ndarray:
    """Returns the classes that occur in the dataset, ascending."""
    return np.flatnonzero(source.class_counts())
