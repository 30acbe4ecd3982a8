"""Predicts the error of larger runs, with intervals that held-out runs have calibrated.

A form has features and a link. C is compute, N FLOPs per image, D images, E the error.

    compute    a level per family, log C
    data       a level per model, log D
    joint      a level per family, log N, log D
    power      log E is linear in the features
    offset     log(E - c) is, with a fitted limit c
    odds       log(E / (1 - E)) is
    sum        E = c + A N^-a + B D^-b (arXiv 2203.15556, equation 2)
    last       nothing changes; stands in, where scores are compared, for a form that can't tell

Cells are weighted by the noise of their seeds. The form with the smallest error on held-out larger
runs is chosen. Its interval has the spread of a bootstrap over models and seeds, times the factor
that makes 90% of the held-out intervals right.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from scipy.optimize import least_squares

from experiments.scaling.table import Point, grouped
from vit_jax.config import InputError

LEVEL = 0.9  # of the intervals
REACH = 10  # times the compute of the fitted runs: no prediction goes further
FEWEST_CELLS = 4  # to fit
FEWEST_HELD_OUT = 10  # predictions to calibrate an interval with
SAMPLES = 20  # of the bootstrap
LIMITS = 6  # largest scales of fitted runs, per task
FLOOR = 0.03  # of a cell's relative noise: seeds aren't the only error
FEATURES, LINKS = ("compute", "data", "joint"), ("power", "offset", "odds")
BASELINE = "last"
FORMS = (*(f"{f} {link}" for f in FEATURES for link in LINKS), "sum", BASELINE)


@dataclasses.dataclass(frozen=True)
class Cell:
    """All seeds of one model with one budget on one task."""

    task: str
    model: str
    family: str
    size: float  # FLOPs of training per image, relative; nan if unknown
    data: float  # images: seen, or in the pretraining set where that varies
    scale: float  # what limits a prediction's reach: exaFLOPs, or images if those are unknown
    errors: tuple[float, ...]  # in (0, 1), one per seed
    noise: float  # standard deviation of one error that seeds don't show

    @property
    def error(self) -> float:
        return float(np.mean(self.errors))

    @property
    def deviation(self) -> float:
        """Standard deviation of the mean error."""
        return math.hypot(self.noise, np.std(self.errors)) / math.sqrt(len(self.errors))

    def times(self, factor: float) -> "Cell":
        """The same model, trained for longer."""
        return dataclasses.replace(self, data=self.data * factor, scale=self.scale * factor)


def make_cells(found: Iterable[Point]) -> list[Cell]:
    """Groups points by task, model and budget; errors are kept inside (0.001, 0.999)."""
    cells = []
    groups = grouped(found, lambda p: (p.task, p.model, p.budget, p.examples))
    for of in groups.values():
        first = of[0]
        known = np.isfinite(first.exaflops) and first.exaflops > 0
        data = float(first.images_seen if known and first.images_seen else first.examples)
        cells.append(
            Cell(
                first.task,
                first.model,
                first.family,
                size=first.exaflops / data if known else math.nan,
                data=data,
                scale=first.exaflops if known else data,
                errors=tuple(float(np.clip(1 - p.accuracy / 100, 1e-3, 1 - 1e-3)) for p in of),
                noise=float(np.sqrt(np.mean([p.noise**2 for p in of]))) / 100,
            )
        )
    return cells


def predict(form: str, cells: Sequence[Cell], targets: Sequence[Cell]) -> np.ndarray:
    """Fits a form to the cells of one task; returns the targets' errors, nan where it can't tell.

    Raises ValueError if the cells are too few, or lack what the form needs.
    """
    if form == BASELINE:
        return np.array([_last(cells, target) for target in targets])
    error = np.array([cell.error for cell in cells])
    noise = np.array([math.hypot(cell.deviation / cell.error, FLOOR) for cell in cells])
    if form == "sum":
        return _predict_sum(cells, error, noise, targets)
    features, link = form.split()
    x, new = _design(features, cells), _design(features, targets, known=cells)
    if len({tuple(row) for row in x}) <= x.shape[1] or np.linalg.matrix_rank(x) < x.shape[1]:
        raise InputError(f"{len(x)} cells don't determine the {x.shape[1]} numbers of {form!r}")
    limits = error.min() * np.array([0.0, 0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 0.95])
    best = None
    for limit in limits if link == "offset" else limits[:1]:
        response, slope = _link(link, error - limit)
        slope = slope if link == "odds" else error / (error - limit)
        weight = 1 / (noise * slope)
        solution = np.linalg.lstsq(x * weight[:, None], response * weight, rcond=None)[0]
        cost = np.sum(((_unlink(link, x @ solution) + limit - error) / (noise * error)) ** 2)
        if best is None or cost < best[0]:
            best = cost, _unlink(link, new @ solution) + limit
    return np.clip(best[1], 1e-4, 1 - 1e-4)


def _link(link: str, error: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the linear form's response and its derivative by log error."""
    if link == "odds":
        return log_odds(error), 1 / (1 - error)
    return np.log(error), np.ones_like(error)


def _unlink(link: str, response: np.ndarray) -> np.ndarray:
    response = np.clip(response, -30, 30)
    return 1 / (1 + np.exp(-response)) if link == "odds" else np.exp(response)


def _design(
    features: str, cells: Sequence[Cell], known: Sequence[Cell] | None = None
) -> np.ndarray:
    """Rows of indicators and logarithms; nan for a level that no known cell has."""

    def level_of(cell):
        return cell.model if features == "data" else cell.family

    levels = sorted({level_of(cell) for cell in known or cells})
    columns = {
        "compute": lambda c: [c.scale],
        "data": lambda c: [c.data],
        "joint": lambda c: [c.size, c.data],
    }[features]
    rows = [
        [float(level_of(c) == level) for level in levels] + np.log(columns(c)).tolist()
        for c in cells
    ]
    matrix = np.array(rows)
    matrix[matrix[:, : len(levels)].sum(axis=1) == 0] = math.nan
    if known is None and not np.isfinite(matrix).all():
        raise InputError(f"{features!r} needs the compute of every run")
    return matrix


def _predict_sum(cells, error, noise, targets) -> np.ndarray:
    if len(cells) < 6 or not all(np.isfinite(c.size) for c in cells):
        raise InputError(f"{len(cells)} cells don't determine the 5 numbers of 'sum'")
    size, data = (np.array([getattr(c, name) for c in cells]) for name in ("size", "data"))
    middle = np.exp(np.log(size).mean()), np.exp(np.log(data).mean())

    def law(theta, size, data):
        limit, by_size, by_data, a, b = theta
        sizes = np.exp(by_size) * (size / middle[0]) ** -a
        return np.exp(limit) + sizes + np.exp(by_data) * (data / middle[1]) ** -b

    low, high = [-12, -12, -12, 0.01, 0.01], [0, 3, 3, 3, 3]
    scale = np.log(np.median(error))
    found = [
        least_squares(
            lambda theta: (np.log(law(theta, size, data)) - np.log(error)) / noise,
            [np.clip(scale - shift, -11, -0.01), scale - 1, scale - 1, 0.3, 0.3],
            bounds=(low, high),
            max_nfev=50,
        )
        for shift in (1, 4)
    ]
    best = min(found, key=lambda f: f.cost).x
    return np.clip([law(best, t.size, t.data) for t in targets], 1e-4, 1 - 1e-4)


def _last(cells: Sequence[Cell], target: Cell) -> float:
    """The error of the model's largest smaller run, else the best of its family, else of all."""
    own = [cell for cell in cells if cell.model == target.model]
    if own:
        return max(own, key=lambda cell: cell.scale).error
    family = [cell for cell in cells if cell.family == target.family]
    return min(cell.error for cell in family or cells)


def log_odds(error: np.ndarray) -> np.ndarray:
    return np.log(error) - np.log1p(-np.asarray(error))


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """A larger run, predicted by every form from the runs up to `limit`."""

    fitted: tuple[Cell, ...]
    target: Cell
    predictions: dict[str, float]  # a form that failed has the baseline's
    failed: tuple[str, ...]  # forms that couldn't tell


def hold_out(cells: Sequence[Cell], known: bool) -> list[HeldOut]:
    """Predicts, for each task and some limits of scale, the runs 1.5 to `REACH` times beyond it.

    `known`: whether these are runs of models with a run within the limit, or of other models.
    """
    found = []
    for of_task in grouped(cells, lambda c: c.task).values():
        scales = sorted({cell.scale for cell in of_task})
        chosen = np.linspace(0, len(scales) - 1, LIMITS + 1).round().astype(int)
        for limit in sorted({scales[i] for i in chosen}):
            fitted = tuple(c for c in of_task if c.scale <= limit)
            within = {c.model for c in fitted}
            targets = [
                c
                for c in of_task
                if 1.5 * limit <= c.scale <= 1.001 * REACH * limit and (c.model in within) == known
            ]
            if len(fitted) < FEWEST_CELLS or not targets:
                continue
            predicted, failed = {}, {}
            for form in (BASELINE, *FORMS[:-1]):
                try:
                    values = predict(form, fitted, targets)
                except InputError:
                    values = np.full(len(targets), math.nan)
                failed[form] = ~np.isfinite(values)
                predicted[form] = np.where(failed[form], predicted.get(BASELINE, values), values)
            for i, target in enumerate(targets):
                found.append(
                    HeldOut(
                        fitted,
                        target,
                        {form: float(values[i]) for form, values in predicted.items()},
                        tuple(form for form in FORMS if failed[form][i]),
                    )
                )
    return found


def scores(held_out: Sequence[HeldOut]) -> dict[str, float]:
    """Mean absolute error in log odds, best first, of the forms that could tell at least half."""
    able = [f for f in FORMS if 2 * sum(f in h.failed for h in held_out) <= len(held_out)]
    found = {form: float(np.mean([abs(_miss(h, form)) for h in held_out])) for form in able}
    return dict(sorted(found.items(), key=lambda item: item[1]))


def _miss(held_out: HeldOut, form: str) -> float:
    return float(log_odds(held_out.predictions[form]) - log_odds(held_out.target.error))


def spread(form: str, cells: Sequence[Cell], target: Cell, samples: int = SAMPLES) -> float:
    """Standard deviation of a prediction's log odds over resampled models and seeds."""
    found = []
    for some in resampled(cells, samples):
        try:
            value = predict(form, some, [target])[0]
        except InputError:
            continue
        found.append(log_odds(value))
    found = [value for value in found if np.isfinite(value)]
    # The truth has its own noise, and a bootstrap that can't refit says little.
    own = target.noise / (target.error * (1 - target.error))
    return float(np.hypot(np.std(found) if len(found) > samples / 4 else 0.5, max(own, 0.1)))


def resampled(cells: Sequence[Cell], samples: int) -> Iterator[list[Cell]]:
    """Yields samples of the bootstrap: models and seeds drawn with replacement."""
    rng = np.random.default_rng(0)
    models = list(grouped(cells, lambda c: c.model).values())
    for _ in range(samples):
        drawn = [models[i] for i in rng.integers(len(models), size=len(models))]
        yield [_redrawn(cell, rng) for cell in itertools.chain(*drawn)]


def _redrawn(cell: Cell, rng: np.random.Generator) -> Cell:
    errors = rng.choice(cell.errors, len(cell.errors))
    noise = cell.noise * rng.standard_normal() / math.sqrt(len(errors))
    return dataclasses.replace(cell, errors=tuple(np.clip(errors + noise, 1e-3, 1 - 1e-3)))


@dataclasses.dataclass(frozen=True)
class Predictor:
    """The chosen form, and what its held-out predictions say about it."""

    form: str
    factor: float  # of a bootstrap's standard deviation; half the width of the interval
    scores: dict[str, float]
    failures: dict[str, int]  # held-out runs that a form couldn't predict
    held_out: dict[str, int]  # runs by task
    coverage: dict[str, float]  # share of held-out truths in their interval, by distance
    points: float  # mean absolute error of the held-out accuracies, percentage points

    def __call__(self, cells: Sequence[Cell], target: Cell) -> tuple[float, float, float]:
        """Returns the error, and the ends of its interval; cells and target are of one task.

        Raises ValueError if no held-out run is of the task, the target is more than `REACH` times
        the largest run, or the form can't tell.
        """
        if target.task not in self.held_out:
            raise InputError(f"no larger run of {target.task!r} tests it: add budgets")
        largest = max(cell.scale for cell in cells)
        if target.scale > 1.001 * REACH * largest:
            raise InputError(
                f"{target.scale / largest:.3g} times the largest run: the data reach {REACH} times"
            )
        error = predict(self.form, cells, [target])[0]
        if not np.isfinite(error):
            raise InputError(f"no run of a {target.family} like {target.model} to predict from")
        middle, half = log_odds(error), self.factor * spread(self.form, cells, target)
        low, high = (1 / (1 + np.exp(-end)) for end in (middle - half, middle + half))
        return float(error), float(low), float(high)

    def describe(self) -> str:
        scores = ", ".join(f"{form} {score:.2f}" for form, score in self.scores.items())
        coverage = ", ".join(f"{share:.0%} {name}" for name, share in self.coverage.items())
        failed = ", ".join(f"{form} {n}" for form, n in self.failures.items() if n) or "none"
        return (
            f"form {self.form!r}: {sum(self.held_out.values())} held-out larger runs, mean error "
            f"{self.points:.1f} points; the {LEVEL:.0%} interval holds {coverage}\n"
            f"  mean error in log odds: {scores}\n  couldn't tell (runs): {failed}"
        )


def calibrate(cells: Sequence[Cell], known: bool = True) -> Predictor:
    """Chooses a form and the width of its intervals by held-out larger runs, see `hold_out`.

    For the coverage, form and width are chosen without the task (of one task, without the model)
    that they are tested on.

    Raises ValueError for too few held-out runs.
    """
    held_out = hold_out(cells, known)
    if len(held_out) < FEWEST_HELD_OUT:
        raise InputError(
            f"{len(held_out)} larger runs to test a prediction on, expected at least "
            f"{FEWEST_HELD_OUT}: add {'budgets' if known else 'models'} over a decade of compute"
        )
    ratios: dict[tuple[int, str], float] = {}

    def ratio(h: HeldOut, form: str) -> float:
        key = id(h), form
        if key not in ratios:
            ratios[key] = abs(_miss(h, form)) / spread(form, h.fitted, h.target)
        return ratios[key]

    def chosen(some: Sequence[HeldOut]) -> tuple[str, float]:
        form = next(iter(scores(some)))
        found = [ratio(h, form) for h in some]
        return form, float(np.quantile(found, min(1.0, LEVEL * (1 + 1 / len(found)))))

    tasks = {h.target.task for h in held_out}
    group: Callable = (lambda h: h.target.task) if len(tasks) > 1 else (lambda h: h.target.model)
    inside: dict[str, list[bool]] = {"of all": []}
    for name in dict.fromkeys(map(group, held_out)):
        others = [h for h in held_out if group(h) != name]
        for h in held_out if others else ():
            if group(h) == name:
                form, factor = chosen(others)
                near = h.target.scale <= 3.01 * max(cell.scale for cell in h.fitted)
                for part in ("of all", "up to 3 times" if near else f"3 to {REACH} times"):
                    inside.setdefault(part, []).append(ratio(h, form) <= factor)
    form, factor = chosen(held_out)
    misses = [abs(h.predictions[form] - h.target.error) for h in held_out]
    return Predictor(
        form,
        factor,
        scores(held_out),
        {form: sum(form in h.failed for h in held_out) for form in FORMS},
        {task: len(of) for task, of in grouped(held_out, lambda h: h.target.task).items()},
        {part: float(np.mean(hits)) for part, hits in inside.items() if hits},
        100 * float(np.mean(misses)),
    )
