"""Fits recover known laws, and say when the data don't determine them."""

import numpy as np
import pytest

from experiments.scaling.findings import paper_points
from experiments.scaling.fits import (
    compute_ratio,
    crossing,
    fit_law,
    fit_simplest,
    frontier,
)
from experiments.scaling.table import grouped


def synthetic(noise, seed, points=20, decades=4, law=(0.3, 0.35, 0.09, 1.0)):
    a, b, c, d = law
    x = np.geomspace(1, 10**decades, points)
    exact = a * (x + d) ** -b + c
    return x, exact * np.exp(noise * np.random.default_rng(seed).standard_normal(points))


def test_without_noise_the_law_is_exact():
    law = fit_law(*synthetic(0.0, 0), samples=10)
    np.testing.assert_allclose([law.a, law.b, law.c, law.d], [0.3, 0.35, 0.09, 1.0], rtol=1e-3)
    assert np.abs(law.residuals).max() < 1e-5 and not law.undetermined
    np.testing.assert_allclose(law(3.0), 0.3 * 4**-0.35 + 0.09, rtol=1e-4)


def test_known_parameters_lie_in_the_interval_as_often_as_it_claims():
    inside = []
    for seed in range(40):
        law = fit_law(*synthetic(0.02, seed, points=12), samples=40)
        for name, true in (("b", 0.35), ("c", 0.09)):
            low, high = law.intervals[name]
            inside.append(low <= true <= high)
    assert np.mean(inside) >= 0.8  # it claims 0.95


@pytest.mark.parametrize(
    ("decades", "noise", "message"),
    [(0.7, 0.02, "spans less than a decade"), (1.5, 0.1, "the exponent b lies anywhere")],
)
def test_data_that_leave_the_law_open_are_said_to(decades, noise, message):
    law = fit_law(*synthetic(noise, 1, points=8, decades=decades), samples=40)
    assert message in " ".join(law.undetermined) and "NOT DETERMINED" in law.describe()


def test_too_few_points_and_no_error_rates():
    with pytest.raises(
        ValueError, match=r"3 distinct value\(s\) of x: a law of 4 parameters needs"
    ):
        fit_law([1, 1, 2, 3, 3], [0.5, 0.5, 0.4, 0.3, 0.3])
    few = fit_simplest(*synthetic(0.0, 0, points=4, law=(0.3, 0.3, 0.1, 0.0)), samples=5)
    np.testing.assert_allclose(
        [few.a, few.b, few.c, few.d], [0.3, 0.3, 0.1, 0], rtol=1e-2, atol=1e-3
    )
    with pytest.raises(ValueError, match=r"errors in \(0, 1\)"):
        fit_law(range(1, 8), [50, 40, 30, 20, 10, 5, 2])


def test_frontier_is_what_nothing_beats():
    compute = [1, 1, 2, 3, 4, 8]
    error = [0.5, 0.6, 0.5, 0.3, 0.35, 0.2]
    assert frontier(compute, error).tolist() == [0, 3, 5]


def test_crossing_of_known_curves():
    x = [1e3, 1e4, 1e5, 1e6]
    rng = np.random.default_rng(0)

    def curve(means, seeds=3):
        return [m + 0.5 * rng.standard_normal(seeds) for m in means]

    # 60 + 4 (log10 x - 5) against 60: they cross at 1e5.
    found = crossing(x, curve([52, 56, 60.4, 64]), curve([60, 60, 60, 60]))
    low, high = found.interval
    assert low < found.at < high and 3e4 < low < 1e5 < high * 1.5
    assert found.share > 0.99 and "at " in found.describe()
    never = crossing(x, curve([50, 51, 52, 53]), curve([60, 60, 60, 60]))
    assert never.at is None and never.ahead == 0
    assert "no crossing in 100%" in never.describe(" images")
    with pytest.raises(ValueError, match="a single seed and no noise"):
        crossing(x, [[1.0]] * 4, [[2.0]] * 4)
    with pytest.raises(ValueError, match="needs at least 2"):
        crossing([1.0], [[1.0, 2.0]], [[2.0, 1.0]])


def test_compute_ratio_of_shifted_curves():
    x = np.geomspace(1, 1e4, 9)
    error = 0.5 * x**-0.2
    low, middle, high = compute_ratio((x, error), (3 * x, error))
    np.testing.assert_allclose([low, middle, high], 3, rtol=1e-6)
    with pytest.raises(ValueError, match="nothing to compare"):
        compute_ratio((x, error), (x, error / 100))


def test_the_papers_vits_take_two_to_four_times_less_compute():
    """Section 4.4: "ViT uses approximately 2 - 4x less compute to attain the same performance"."""
    found = [p for p in paper_points() if p.task == "average of 5"]
    curves = [
        ([p.exaflops for p in of], [1 - p.accuracy / 100 for p in of])
        for family, of in grouped(found, lambda p: p.family).items()
        if family in ("ViT", "ResNet")
    ]
    assert 2 < compute_ratio(*curves)[1] < 4


@pytest.mark.parametrize(
    ("vit", "resnet", "between"),
    [
        ("ViT-B/32", "ResNet50x1 (BiT)", (9e6, 30e6)),
        ("ViT-L/16", "ResNet152x2 (BiT)", (30e6, 90e6)),
    ],
)
def test_the_papers_crossings(vit, resnet, between):
    """Section 4.3: B/32 passes R50x1 between 9M and 30M images, L/16 R152x2 between 30M and 90M."""
    models = grouped([p for p in paper_points() if p.task == "ImageNet 5-shot"], lambda p: p.model)
    sizes = sorted({p.examples for p in models[vit]})
    curves = [
        [[p.accuracy for p in models[m] if p.examples == n] for n in sizes] for m in (vit, resnet)
    ]
    found = crossing(sizes, *curves, noise=0.2)
    assert between[0] < found.interval[0] < found.interval[1] < between[1]
    assert found.share == 1.0
