"""How sure a measured share is."""

from scipy import stats


def accuracy_interval(correct: int, examples: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's interval for a share: where the accuracy lies that `correct` of `examples` shows."""
    test = stats.binomtest(correct, examples)
    interval = test.proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)
