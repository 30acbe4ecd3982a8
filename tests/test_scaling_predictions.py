"""Predictions of larger runs: known laws are recovered, intervals hold held-out runs."""

import dataclasses

import numpy as np
import pytest

from experiments.scaling.__main__ import RESULTS
from experiments.scaling.extrapolate import Cell, calibrate, predict
from experiments.scaling.findings import paper_points, prediction_cells, show_predictions
from experiments.scaling.isoflops import optima, show_isoflops
from experiments.scaling.runner import Store
from experiments.scaling.study import load_study
from experiments.scaling.table import points


def law(size, data):
    return 0.05 + 0.2 * size**-0.3 * data**-0.4


def runs(noise=0.0, budgets=5, seeds=3):
    """Cells of four models, each with several budgets, whose errors follow `law`."""
    rng, cells = np.random.default_rng(0), []
    for task in ("a", "b"):
        for size in (1.0, 2.0, 4.0, 8.0):
            for data in 2.0 ** np.arange(budgets):
                exact = law(size, data)
                errors = tuple(exact * np.exp(noise * rng.standard_normal(seeds)))
                cells.append(
                    Cell(task, f"{size:g}", "ViT", size, data, size * data, errors, noise * exact)
                )
    return cells


@pytest.mark.parametrize("form", ["joint offset", "data offset", "sum"])
def test_forms_continue_a_law(form):
    def truth(cell):
        if form == "sum":
            return 0.05 + 0.1 * cell.size**-0.5 + 0.2 * cell.data**-0.4
        return law(cell.size, cell.data)

    cells = [c for c in runs() if c.task == "a"]
    cells = [dataclasses.replace(c, errors=(truth(c),)) for c in cells]
    longer = [cells[4].times(3), cells[-1].times(10)]
    found = predict(form, cells, longer)
    np.testing.assert_allclose(found, [truth(cell) for cell in longer], rtol=0.1)


def test_the_interval_holds_the_truth():
    cells = runs(noise=0.03)
    predictor = calibrate(cells)
    assert 0.8 <= predictor.coverage["of all"] <= 1
    assert next(iter(predictor.scores)) == predictor.form and "last" in predictor.scores
    of_task = [cell for cell in cells if cell.task == "a"]
    inside = []
    for target in (cell.times(3) for cell in of_task[9:]):
        error, low, high = predictor(of_task, target)
        assert low < error < high
        inside.append(low < law(target.size, target.data) < high)
    assert np.mean(inside) >= 0.7
    with pytest.raises(ValueError, match="12 times the largest run: the data reach 10 times"):
        predictor(of_task, of_task[-1].times(12))


def test_the_best_size_for_a_compute_is_the_laws():
    """For E = c + A N^-a + B D^-b it is (a A / b B)^(1 / (a + b)) C^(b / (a + b))."""
    a, b, by_size, by_data = 0.5, 0.4, 0.1, 0.2
    cells = [
        dataclasses.replace(c, errors=(0.05 + by_size * c.size**-a + by_data * c.data**-b,) * 2)
        for c in runs(budgets=8)
        if c.task == "a"
    ]
    found = optima(cells, samples=10)
    for optimum in found:
        exact = (a * by_size / (b * by_data)) ** (1 / (a + b)) * optimum.compute ** (b / (a + b))
        inside = min(max(exact, 1.0), 8.0)
        assert optimum.size / 1e9 == pytest.approx(inside, rel=0.15)
        assert optimum.at_end == (exact > 8)
        assert optimum.interval[0] <= optimum.size <= optimum.interval[1]


def test_too_few_sizes_have_no_best(tmp_path, capsys):
    cells = [cell for cell in runs() if cell.task == "a" and cell.size < 4]
    assert show_isoflops(cells, tmp_path) == {} and not list(tmp_path.iterdir())
    assert "no best size of ViT on a: 2 sizes of models, expected at least 3" in (
        capsys.readouterr().out
    )


def test_too_few_runs_predict_nothing():
    with pytest.raises(ValueError, match="1 larger runs to test a prediction on, expected at"):
        calibrate(runs(budgets=2)[:6])
    with pytest.raises(ValueError, match="4 cells don't determine the 5 numbers of 'sum'"):
        predict("sum", runs()[:4], runs()[:1])
    with pytest.raises(ValueError, match="2 cells don't determine the 3 numbers of 'joint odds'"):
        predict("joint odds", runs()[:2], runs()[:1])
    with pytest.raises(ValueError, match="0 larger runs to test"):
        calibrate(runs(budgets=1)[:1])
    one_task = [cell for cell in runs(noise=0.03) if cell.task == "a"]
    other = dataclasses.replace(one_task[0], task="b")
    with pytest.raises(ValueError, match="no larger run of 'b' tests it: add budgets"):
        calibrate([*one_task, other])([other], other.times(3))


def test_own_results(tmp_path):
    """The 90% interval holds 80 to 97% of at least 30 held-out larger runs."""
    study = load_study("mini")
    results = RESULTS / "mini" / "results.jsonl"
    found = [p for p in points(study, Store(tmp_path, results).records()) if p.examples]
    predictor = calibrate(prediction_cells(found)["exaFLOPs"])
    assert sum(predictor.held_out.values()) >= 30 and 0.8 <= predictor.coverage["of all"] <= 0.97


def test_the_papers_largest_model(capsys):
    """Without ViT-H/14, Table 6 predicts it within a point."""
    values = show_predictions(paper_points())["other models, by exaFLOPs"]
    assert 0.8 <= values["coverage"]["of all"] <= 0.97 and sum(values["held_out"].values()) >= 30
    for prediction, measured in zip(values["predictions"], (0.04178, 0.1192), strict=True):
        assert prediction["model"] == "ViT-H/14"
        assert prediction["error"] == pytest.approx(measured, abs=0.01)
    assert "no prediction of models of the study: 2 larger runs" in capsys.readouterr().out
