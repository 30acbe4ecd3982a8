"""What a classifier must beat to be worth using: the largest class, hand-made features, the probe.

The hand-made features are histograms of oriented gradients (Dalal and Triggs, CVPR 2005), reduced
by principal components, with a support vector machine. N images, C classes.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import cv2
import numpy as np

from vit_jax.classifier.examine import score_labels
from vit_jax.data.augment import resize
from vit_jax.data.decode import decode_image
from vit_jax.data.sources import Source
from vit_jax.evaluation.by_class import measure_predictions

SIDE, CELL = 128, 16  # pixels of the grey image and of a cell
BINS = 9  # orientations over 180 degrees
COMPONENTS = 100
PROBE = "linear probe"
# C and gamma of the support vector machine, chosen on dev; gamma in units of 1 / (D variance).
GRID = tuple(itertools.product((3.0, 10.0, 30.0), (1.0, 3.0)))
MOST = 5000  # images that it is fitted to; of more, evenly spaced


def oriented_gradients(pixels: np.ndarray) -> np.ndarray:
    """Histograms of oriented gradients: uint8 [H, W, 3] -> float32 [1764].

    Each cell shares a pixel's gradient between the two nearest orientations. Blocks of 2 x 2 cells
    are normalised, clipped at 0.2 and normalised again.
    """
    image = resize(pixels, None, (SIDE, SIDE), "area")
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)
    down, along = np.gradient(grey)
    position = np.arctan2(down, along) % np.pi * (BINS / np.pi)
    lower, length = np.floor(position), np.hypot(down, along)
    share = position - lower
    row, column = np.indices(grey.shape) // CELL
    along_row = SIDE // CELL
    cells = sum(
        np.bincount(
            ((row * along_row + column) * BINS + orientation.astype(int) % BINS).ravel(),
            (weight * length).ravel(),
            along_row**2 * BINS,
        )
        for orientation, weight in ((lower, 1 - share), (lower + 1, share))
    )
    cells = cells.astype(np.float32).reshape(along_row, along_row, BINS)
    windows = np.lib.stride_tricks.sliding_window_view(cells, (2, 2), axis=(0, 1))
    blocks = windows.reshape(-1, 4 * BINS)
    return _unit(np.minimum(_unit(blocks), 0.2)).ravel()


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / (np.linalg.norm(rows, axis=1, keepdims=True) + 1e-3)


def describe_images(source: Source, most: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(`oriented_gradients` [N, 1764], labels [N]) of a split, or of `most` of its images."""
    count = min(len(source), most or len(source))
    indices = np.unique(np.linspace(0, len(source) - 1, count).astype(int))

    def describe(index: int) -> tuple[np.ndarray, int]:
        record = source[int(index)]
        return oriented_gradients(decode_image(record["image"])), int(record["label"])

    with ThreadPoolExecutor(4) as pool:
        features, labels = zip(*pool.map(describe, indices), strict=True)
    return np.stack(features), np.array(labels)


def predict_by_gradients(sources: Mapping[str, Source], metric: str) -> np.ndarray:
    """Labels [N] of "test", by gradients of "train" and "dev"; chosen on dev by the metric."""
    train, dev = (describe_images(sources[name], MOST) for name in ("train", "dev"))
    test, _ = describe_images(sources["test"])
    reduced = _reduce(*train)

    def merit(options: tuple[float, float]) -> float:
        return measure_predictions(dev[1], _fit(*reduced, *options)(dev[0]))[metric]

    best = max(GRID, key=merit)
    both = map(np.concatenate, zip(train, dev, strict=True))
    return _fit(*_reduce(*both), *best)(test)


def _reduce(features: np.ndarray, labels: np.ndarray) -> tuple[Callable, np.ndarray, np.ndarray]:
    """(a function that reduces features, these reduced, labels)."""
    from sklearn.decomposition import PCA  # a second, which only the report needs
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    pca = PCA(min(COMPONENTS, *features.shape), random_state=0)
    chain = make_pipeline(StandardScaler(), pca)
    return chain.transform, chain.fit_transform(features), labels


def _fit(
    reduce: Callable, features: np.ndarray, labels: np.ndarray, penalty: float, gamma: float
) -> Callable[[np.ndarray], np.ndarray]:
    """Returns features -> predicted labels."""
    from sklearn.svm import SVC

    scaled = gamma / max(features.shape[1] * features.var(), 1e-12)
    machine = SVC(C=penalty, gamma=scaled).fit(features, labels)
    return lambda x: machine.predict(reduce(x))


def measure_baselines(
    sources: Mapping[str, Source],
    counts: Mapping[str, Sequence[int]],
    labels: np.ndarray,
    probed: np.ndarray | None,
    metric: str,
) -> list[dict[str, Any]]:
    """Scores on test, as `score_labels`, with a "name", of each baseline.

    Args:
      sources: "train", "dev" and "test".
      counts: images of each class, of "train" and "dev".
      labels: of the test images, [N].
      probed: their labels by the linear probe, [N]; None without one.
      metric: of `evaluation.by_class.METRICS`.
    """
    largest = np.add(counts["train"], counts["dev"]).argmax()
    predictions = {
        "always the largest class": np.full_like(labels, largest),
        "histograms of oriented gradients": predict_by_gradients(sources, metric),
    }
    if probed is not None:
        predictions[PROBE] = probed
    return [{"name": name, **score_labels(labels, p)} for name, p in predictions.items()]


def compare(
    scores: Mapping[str, Any], baselines: Sequence[Mapping[str, Any]], metric: str
) -> list[str]:
    """Sentences on baselines that the model does not beat, or not for sure."""
    said = []
    for other in baselines:
        name, mine, theirs = other["name"], scores[metric], other[metric]
        of = f"{metric.replace('_', ' ')} {mine:.1%} against {theirs:.1%}"
        if mine <= theirs:
            said.append(f"The model does not beat this baseline: {name} ({of}). Do not rely on it.")
        elif metric == "accuracy" and scores["accuracy_interval"][0] <= theirs:
            said.append(f"The model is not clearly better than this baseline: {name} ({of}).")
    return said
