"""Fits scaling laws, the compute-optimal frontier and crossing points, with intervals.

The law is that of "Scaling Vision Transformers" (arXiv 2106.04560, section 2): E = a (C + d)^-b + c
for compute C. c is the irreducible error; d shifts the curve at low compute.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy.optimize import least_squares
from scipy.stats import norm as normal
from scipy.stats import t as student

from vit_jax.config import InputError

LEVEL = 0.95  # confidence level of all intervals
NAMES = ("a", "b", "c", "d")
B_MIN, B_MAX = 0.01, 5.0  # bounds of the exponent; a fit at a bound isn't meaningful
C_MIN = 1e-6
Interval = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Law:
    """The law E = a (x + d)^-b + c for errors E in (0, 1), fitted in log E."""

    a: float
    b: float
    c: float
    d: float
    intervals: dict[str, Interval]
    residuals: np.ndarray  # of log E, in the order of the data
    undetermined: tuple[str, ...]  # parameters that the data don't determine, in words

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return self.a * (np.asarray(x) + self.d) ** -self.b + self.c

    def describe(self) -> str:
        terms = ", ".join(
            f"{name} = {getattr(self, name):.3g} [{low:.3g}, {high:.3g}]"
            for name, (low, high) in self.intervals.items()
        )
        spread = float(np.sqrt(np.mean(self.residuals**2)))
        text = f"E = a (x + d)^-b + c: {terms}; residuals of log E {spread:.3f} (rms)"
        if self.undetermined:
            text += "\n  NOT DETERMINED by these data: " + "; ".join(self.undetermined)
        return text


def fit_law(
    x: Sequence[float],
    error: Sequence[float],
    *,
    shift: bool = True,
    samples: int = 200,
    seed: int = 0,
) -> Law:
    """Fits a law, with intervals from a bootstrap of the residuals.

    Args:
      x: compute or number of images, > 0.
      error: error rates in (0, 1).
      shift: whether to fit d; otherwise d = 0.
      samples: bootstrap samples.
      seed: seed of the bootstrap.

    Returns:
      The law. `undetermined` names parameters with uninformative intervals.

    Raises:
      ValueError: fewer distinct x than parameters + 1, or values out of range.
    """
    x, error = np.asarray(x, float), np.asarray(error, float)
    parameters = 4 if shift else 3
    distinct = len(np.unique(x))
    if distinct <= parameters:
        raise InputError(
            f"{distinct} distinct value(s) of x: a law of {parameters} parameters needs at least "
            f"{parameters + 1}. Add budgets or sizes to the study"
        )
    if not (np.all(x > 0) and np.all((error > 0) & (error < 1))):
        raise InputError("expected x > 0 and errors in (0, 1)")
    scale = np.exp(np.log(x).mean())
    scaled = x / scale
    best = _solve(scaled, error, shift, starts=_starts(error))
    fitted = _predict(best, scaled)
    residuals = np.log(error) - np.log(fitted)
    rng = np.random.default_rng(seed)
    # Corrects for the shrinkage of residuals by a fit of p parameters to n points.
    spread = residuals * np.sqrt(len(x) / max(len(x) - parameters, 1))
    fits = []
    for _ in range(samples):
        noisy = fitted * np.exp(rng.choice(spread, len(x)))
        fits.append(_unscaled(_solve(scaled, np.minimum(noisy, 0.9999), shift, [best]), scale))
    values = _unscaled(best, scale)
    tail = (1 - LEVEL) / 2
    # Percentiles, widened from normal to Student's t, because the noise level is estimated.
    wider = student.ppf(1 - tail, len(x) - parameters) / normal.ppf(1 - tail)
    middle = np.log(values)
    low, high = np.exp(
        middle + wider * (np.log(np.quantile(fits, [tail, 1 - tail], axis=0)) - middle)
    )
    names = NAMES if shift else NAMES[:3]
    intervals = {n: (float(low[i]), float(high[i])) for i, n in enumerate(names)}
    for name, least, most in (("b", B_MIN, B_MAX), ("c", C_MIN, max(error.min(), values[2]))):
        intervals[name] = tuple(float(np.clip(end, least, most)) for end in intervals[name])
    return Law(*values, intervals, residuals, _undetermined(intervals, float(error.min()), x))


def _undetermined(intervals: dict[str, Interval], best: float, x: np.ndarray) -> tuple[str, ...]:
    notes = []
    if len(x) < len(intervals) + 2:
        notes.append(f"{len(x)} points leave next to no residuals to judge a law by")
    low, high = intervals["b"]
    if high > 3 * low:
        notes.append(f"the exponent b lies anywhere in [{low:.2g}, {high:.2g}]")
    low, high = intervals["c"]
    if high - low > 0.5 * best:
        notes.append(
            f"the limit c lies anywhere in [{low:.2g}, {high:.2g}], and the best error so far is "
            f"{best:.2g}: don't extrapolate"
        )
    if x.max() < 10 * x.min():
        notes.append("x spans less than a decade")
    return tuple(notes)


def _starts(error: np.ndarray) -> list[np.ndarray]:
    limits = [share * error.min() for share in (0.05, 0.5, 0.9)]
    return [
        np.array([np.log(max(np.median(error) - c, 1e-4)), np.log(b), np.log(c), np.log(d)])
        for c in limits
        for b in (0.2, 0.6)
        for d in (1e-3, 0.3)
    ]


def _solve(x: np.ndarray, error: np.ndarray, shift: bool, starts: list) -> np.ndarray:
    """Returns the best-fitting logarithms of a, b, c, d (a for scaled x)."""
    lower = np.array([-12.0, np.log(B_MIN), np.log(C_MIN), np.log(1e-6)])
    upper = np.array([12.0, np.log(B_MAX), 0.0, np.log(1e3)])
    free = slice(0, 4 if shift else 3)

    def whole(theta):
        return theta if shift else np.append(theta, lower[3])

    def residuals(theta):
        return np.log(_predict(whole(theta), x)) - np.log(error)

    def jacobian(theta):
        a, b, c, d = np.exp(whole(theta))
        power = a * (x + d) ** -b
        columns = (power, -b * np.log(x + d) * power, np.full_like(x, c), -b * d / (x + d) * power)
        return (np.stack(columns, axis=1) / (power + c)[:, None])[:, free]

    found = [
        least_squares(
            residuals,
            np.clip(start[free], lower[free] + 1e-6, upper[free] - 1e-6),
            jacobian,
            bounds=(lower[free], upper[free]),
            max_nfev=60,
        )
        for start in starts
    ]
    return whole(min(found, key=lambda f: f.cost).x)


def _predict(theta: np.ndarray, x: np.ndarray) -> np.ndarray:
    a, b, c, d = np.exp(theta)
    return a * (x + d) ** -b + c


def _unscaled(theta: np.ndarray, scale: float) -> tuple[float, float, float, float]:
    a, b, c, d = np.exp(theta)
    return float(a * scale**b), float(b), float(c), float(d * scale)


def fit_simplest(x: Sequence[float], error: Sequence[float], **kwargs) -> Law:
    """Fits the full law; with d = 0 if the points are too few or don't determine it."""
    if len(np.unique(x)) > 5:
        law = fit_law(x, error, **kwargs)
        if not law.undetermined:
            return law
    return fit_law(x, error, shift=False, **kwargs)


def frontier(x: Sequence[float], error: Sequence[float]) -> np.ndarray:
    """Returns the indices of Pareto-optimal points, by increasing x."""
    x, error = np.asarray(x, float), np.asarray(error, float)
    order = np.lexsort((error, x))
    best, kept = np.inf, []
    for i in order:
        if error[i] < best:
            best = error[i]
            kept.append(i)
    return np.array(kept, int)


def compute_ratio(
    first: tuple[Sequence[float], Sequence[float]], second: tuple[Sequence[float], Sequence[float]]
) -> tuple[float, float, float]:
    """Computes the compute of `second` relative to `first` at equal error.

    Args:
      first: compute and error of each point.
      second: the same.

    Returns:
      The lowest, median and highest ratio of the frontiers, interpolated in log compute, over the
      errors that both reach.

    Raises:
      ValueError: no common errors.
    """
    curves = []
    for compute, error in (first, second):
        kept = frontier(compute, error)
        curves.append((np.asarray(error)[kept][::-1], np.log(np.asarray(compute)[kept])[::-1]))
    low = max(error[0] for error, _ in curves)
    high = min(error[-1] for error, _ in curves)
    if low >= high:
        raise InputError("no error that both reached, so there is nothing to compare")
    at = np.linspace(low, high, 50)
    ratio = np.exp(np.interp(at, *curves[1]) - np.interp(at, *curves[0]))
    return float(ratio.min()), float(np.median(ratio)), float(ratio.max())


@dataclasses.dataclass(frozen=True)
class Crossing:
    """The x from which one curve is above another."""

    at: float | None  # the median over samples; None: most samples don't cross
    interval: Interval | None
    share: float  # of samples with a crossing inside the measured range
    ahead: float  # share of samples with the first curve above at the largest x
    span: Interval

    def describe(self, unit: str = "") -> str:
        low, high = self.span
        if self.at is None:
            side = "the first is above" if self.ahead > 0.5 else "the second is above"
            return (
                f"no crossing in {1 - self.share:.0%} of the samples between {low:,.4g} and "
                f"{high:,.4g}{unit}; at the end {side} in {max(self.ahead, 1 - self.ahead):.0%}"
            )
        a, b = self.interval
        sure = "" if self.share > LEVEL else f", and no crossing in {1 - self.share:.0%} of samples"
        return f"at {self.at:,.4g} [{a:,.4g}, {b:,.4g}]{unit}{sure}"


def crossing(
    x: Sequence[float],
    first: Sequence[Sequence[float]],
    second: Sequence[Sequence[float]],
    *,
    noise: float = 0.0,
    samples: int = 1000,
    seed: int = 0,
) -> Crossing:
    """Finds the x at which `first` overtakes `second`, with a bootstrap interval.

    Interpolates accuracy linearly in log x; the last crossing counts. A sample resamples the seeds
    at each x and adds normal noise to each mean.

    Args:
      x: where both were measured.
      first: first[i] are the accuracies of all seeds at x[i].
      second: the same.
      noise: standard deviation, for example of reading a figure or of a finite test set.
      samples: bootstrap samples.
      seed: seed of the bootstrap.

    Raises:
      ValueError: fewer than two x, or no uncertainty from seeds or noise.
    """
    x = np.asarray(x, float)
    if len(x) < 2:
        raise InputError(f"{len(x)} value(s) of x: a crossing needs at least 2")
    if noise == 0 and any(len(v) < 2 for v in (*first, *second)):
        raise InputError("a single seed and no noise: state the measurement's error as `noise`")
    rng = np.random.default_rng(seed)

    def draw(curve):
        means = [np.mean(rng.choice(np.asarray(v, float), len(v))) for v in curve]
        return np.array(means) + noise * rng.standard_normal(len(x))

    log_x, crossings, ahead = np.log(x), [], 0
    for _ in range(samples):
        gap = draw(first) - draw(second)
        ahead += gap[-1] > 0
        rises = np.flatnonzero((gap[:-1] <= 0) & (gap[1:] > 0))
        if gap[-1] > 0 and len(rises):
            i = rises[-1]
            part = -gap[i] / (gap[i + 1] - gap[i])
            crossings.append(np.exp(log_x[i] + part * (log_x[i + 1] - log_x[i])))
    share, span = len(crossings) / samples, (float(x.min()), float(x.max()))
    if share <= 0.5:
        return Crossing(None, None, share, ahead / samples, span)
    tail = (1 - LEVEL) / 2
    low, middle, high = np.quantile(crossings, [tail, 0.5, 1 - tail])
    interval = (float(low), float(high))
    return Crossing(float(middle), interval, share, ahead / samples, span)
