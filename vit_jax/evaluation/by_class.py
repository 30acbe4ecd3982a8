"""Metrics that weigh all classes alike, from counts of each class: [C] arrays, C classes."""

import numpy as np

METRICS = ("accuracy", "balanced_accuracy", "macro_f1")


def class_metrics(labelled: np.ndarray, predicted: np.ndarray, right: np.ndarray) -> dict:
    """Returns balanced accuracy and macro F1, in [0, 1].

    Balanced accuracy is the mean recall of the classes that have labels. Macro F1 is the mean F1 of
    the classes that are labels or predictions. Both are scikit-learn's.

    Args:
      labelled: images of each class, [C].
      predicted: predictions of each class, [C].
      right: correct ones among both, [C].
    """
    labelled, predicted, right = (np.asarray(x, np.float64) for x in (labelled, predicted, right))
    there, either = labelled > 0, labelled + predicted > 0
    return {
        "balanced_accuracy": float((right[there] / labelled[there]).mean()),
        "macro_f1": float((2 * right[either] / (labelled + predicted)[either]).mean()),
    }


def measure_predictions(labels: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """Returns all of `METRICS` of predictions: int [N], int [N] -> {name: in [0, 1]}."""
    right, classes = labels == predicted, 1 + int(max(labels.max(), predicted.max()))
    counts = (np.bincount(x, minlength=classes) for x in (labels, predicted, labels[right]))
    return {"accuracy": float(right.mean()), **class_metrics(*counts)}
