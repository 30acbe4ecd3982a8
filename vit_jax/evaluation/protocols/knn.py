"""k-nearest-neighbour classification by cosine similarity of frozen features.

Votes have the weight exp(similarity / T) (Wu et al., arXiv 1805.01978, section 3.4), with T = 0.07
as there and in DINO (arXiv 2104.14294).
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vit_jax.config import InputError
from vit_jax.evaluation.features import extract_split, open_single_label
from vit_jax.evaluation.registry import EvaluatorConfig, Objective
from vit_jax.models.variants import Model

BLOCK = 256  # test examples per matrix product


@dataclasses.dataclass(frozen=True)
class Config(EvaluatorConfig):
    """Takes neighbours from `split` and measures accuracy on all of `test_split`."""

    protocol: str = "knn"
    test_split: str = "test"
    neighbours: tuple[int, ...] = (1, 10, 20)
    temperature: float = 0.07

    def __post_init__(self):
        if not self.neighbours or min(self.neighbours) < 1:
            raise InputError(f"neighbours = {self.neighbours}: expected numbers of 1 or more")
        if not self.temperature > 0:
            raise InputError(f"temperature = {self.temperature}: expected more than 0")


def nearest_neighbours(
    features: np.ndarray,
    labels: np.ndarray,
    test_features: np.ndarray,
    neighbours: Sequence[int],
    temperature: float = 0.07,
) -> dict[int, np.ndarray]:
    """Predicts the labels of test_features [M, D] from features [N, D] and labels [N].

    Returns k -> labels [M] for each k of `neighbours`. Raises ValueError if k exceeds N.
    """
    if not neighbours or not 1 <= min(neighbours) <= max(neighbours) <= len(labels):
        raise InputError(
            f"neighbours {tuple(neighbours)}: expected numbers from 1 to {len(labels)}, the number "
            "of examples"
        )
    classes, targets = np.unique(labels, return_inverse=True)
    features, test_features = (
        x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
        for x in (features.astype(np.float32), test_features.astype(np.float32))
    )
    vote = partial(_vote, jnp.asarray(features), jnp.asarray(targets), temperature=temperature)
    votes = [
        vote(test_features[start : start + BLOCK], len(classes), tuple(neighbours))
        for start in range(0, len(test_features), BLOCK)
    ]
    return {
        k: classes[np.concatenate([np.asarray(v[i]) for v in votes])]
        for i, k in enumerate(neighbours)
    }


@partial(jax.jit, static_argnums=(3, 4))
def _vote(features, targets, test_features, num_classes, neighbours, *, temperature):
    exact = jax.lax.Precision.HIGHEST  # otherwise TPUs round to bfloat16
    similarity = jnp.matmul(test_features, features.T, precision=exact)
    similarity, index = jax.lax.top_k(similarity, max(neighbours))
    # Relative to the nearest neighbour, so that exp(1 / T) can't overflow for small T.
    weights = jnp.exp((similarity - similarity[:, :1]) / temperature)
    votes = jax.nn.one_hot(targets[index], num_classes) * weights[:, :, None]
    return [votes[:, :k].sum(axis=1).argmax(axis=1) for k in neighbours]


def make(
    config: Config, model: Model, mesh: Mesh, objective: Objective | None = None
) -> Callable[[dict], dict[str, float]]:
    """Returns params -> {"20nn": accuracy in [0, 1], ..., "examples": count}."""
    names = {"train": config.data.split, "test": config.test_split}
    sources = {
        name: open_single_label(dataclasses.replace(config.data, split=split))
        for name, split in names.items()
    }
    extract = extract_split(sources, config.data, model, mesh, config.batch_size)

    def evaluate(params: dict) -> dict[str, float]:
        features, labels = extract(params, "train")
        test_features, test_labels = extract(params, "test")
        predicted = nearest_neighbours(
            features, labels, test_features, config.neighbours, config.temperature
        )
        accuracies = {f"{k}nn": float(np.mean(y == test_labels)) for k, y in predicted.items()}
        return {**accuracies, "examples": len(test_labels)}

    return evaluate
