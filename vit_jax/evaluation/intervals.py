"""Confidence intervals of accuracies."""

from scipy import stats


def accuracy_interval(correct: int, examples: int, confidence: float = 0.95) -> tuple[float, float]:
    """Returns the bounds of Wilson's score interval for the accuracy, in [0, 1]."""
    test = stats.binomtest(correct, examples)
    interval = test.proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)
