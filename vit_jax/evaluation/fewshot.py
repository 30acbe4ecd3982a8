"""Few-shot accuracy: regularised least squares on frozen features, in closed form.

The paper's linear few-shot evaluation (arXiv 2010.11929, section 4.1), as its authors published it
later in big_vision: targets in {-1, 1}, features standardised by the shots' own mean and standard
deviation, a constant feature of 100 (an almost unregularised bias), ridge l2 = 2^10.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from jax.sharding import Mesh

from vit_jax.data.pipeline import DataConfig
from vit_jax.data.sources import open_source
from vit_jax.evaluation.features import make_batches, make_extractor
from vit_jax.models.variants import Model

BIAS = 100.0


@dataclasses.dataclass(frozen=True)
class FewshotConfig:
    """Shots are drawn from `split`; accuracy is measured on all of `test_split`."""

    data: DataConfig
    test_split: str = "test"
    shots: tuple[int, ...] = (1, 5, 10, 25)
    seeds: int = 3
    l2: float = 1024.0
    batch_size: int = 256


def draw_shots(labels: np.ndarray, shots: int, seed: int) -> np.ndarray:
    """Indices of `shots` examples of each class: labels [N] -> [C * shots].

    Raises ValueError if a class has fewer.
    """
    rng = np.random.default_rng(seed)
    chosen = []
    for label in np.unique(labels):
        indices = np.flatnonzero(labels == label)
        if len(indices) < shots:
            raise ValueError(
                f"class {label} has {len(indices)} examples, fewer than the {shots} shots asked "
                "for: ask for fewer shots or take a larger split"
            )
        chosen.append(rng.permutation(indices)[:shots])
    return np.concatenate(chosen)


def least_squares(
    features: np.ndarray, labels: np.ndarray, test_features: np.ndarray, l2: float
) -> np.ndarray:
    """Fits features [N, D] with labels [N]; returns the labels predicted for [M, D]: [M].

    Solves min_W |XW - Y|^2 + l2 |W|^2 through the smaller of X'X and XX'. In float64.
    """
    mean, std = features.mean(axis=0), features.std(axis=0) + 1e-5

    def standardise(x):
        x = (x.astype(np.float64) - mean) / std
        return np.concatenate([x, np.full((len(x), 1), BIAS)], axis=1)

    x = standardise(features)
    classes, targets = np.unique(labels, return_inverse=True)
    y = 2.0 * np.eye(len(classes))[targets] - 1.0
    if x.shape[0] >= x.shape[1]:
        w = np.linalg.solve(x.T @ x + l2 * np.eye(x.shape[1]), x.T @ y)
    else:
        w = x.T @ np.linalg.solve(x @ x.T + l2 * np.eye(x.shape[0]), y)
    return classes[(standardise(test_features) @ w).argmax(axis=1)]


def make_fewshot(
    config: FewshotConfig, model: Model, mesh: Mesh
) -> Callable[[dict], dict[str, float]]:
    """params -> {"5shot": mean accuracy over seeds, "5shot_std": ..., ...}.

    Opens the datasets at once, so that a missing one is found before anything is trained.
    """
    data, batches = config.data, []
    for split in (data.split, config.test_split):
        source = open_source(data.dataset, split, data.data_dir)
        if source.labels_per_example is not None:
            raise ValueError(f"{data.dataset} has several labels an image: few-shot takes one")
        batches.append(make_batches(source, data, model, mesh, config.batch_size))
    extract = make_extractor(model, mesh)

    def evaluate(params: dict) -> dict[str, float]:
        features, labels = extract(params, batches[0])
        test_features, test_labels = extract(params, batches[1])
        result = {}
        for shots in config.shots:
            accuracies = []
            for seed in range(config.seeds):
                index = draw_shots(labels, shots, seed)
                predicted = least_squares(features[index], labels[index], test_features, config.l2)
                accuracies.append(np.mean(predicted == test_labels))
            result[f"{shots}shot"] = float(np.mean(accuracies))
            result[f"{shots}shot_std"] = float(np.std(accuracies))
        return result

    return evaluate
