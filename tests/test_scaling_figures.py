"""A study's own figures: the models they compare and the numbers they show."""

import dataclasses
import itertools
import runpy

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.legend import Legend
from matplotlib.text import Annotation, Text

from experiments.scaling import study_figures, study_panels
from experiments.scaling.__main__ import RESULTS
from experiments.scaling.runner import Store
from experiments.scaling.shapes import pooled_models, scaled_models
from experiments.scaling.study import expand, flatten, load_study
from experiments.scaling.study_figures import draw_study, drawings, make_looks
from experiments.scaling.style import label_ends, new_figure
from experiments.scaling.table import losses_by_rate, points

# Invented: the depth 1 model has half of the base's accuracy at a third of its compute.
VALUES = {"ViT-S/4": (3e6, 0.8), "depth 1": (1e6, 0.4), "ViT-S/4 GAP": (3e6, 0.6)}


def records(study, models):
    """Makes records of runs that never ran, with two evaluations each."""
    found = {}
    for run in expand(study):
        if run.labels["model"] not in models or run.kind == "trunk":
            continue
        flops, accuracy = VALUES[run.labels["model"]]
        values = {"validation/accuracy": accuracy, "validation/examples": 100}
        values |= {"digits/10shot": accuracy, "fashion/10shot": accuracy / 2}
        values |= {"test/accuracy": accuracy, "test/examples": 100}
        found[run.name] = {
            "name": run.name,
            "key": run.key,
            "kind": run.kind,
            "labels": dict(run.labels),
            "config": flatten(run.config),
            "status": "done",
            "steps": 100,
            "batch_size": 64,
            "flops_per_image": flops,
            "parameters": 10,
            "img_per_sec": 1e9 / flops,
            "evaluations": [{"step": step, **values} for step in (50, 100)],
        }
    return found


@pytest.fixture
def axes():
    figure, (panel,) = new_figure(1)
    yield panel
    plt.close(figure)


def test_models_that_differ_in_one_thing():
    base, scaled = scaled_models(load_study("shapes"))
    assert base == "ViT-S/4"
    assert scaled["depth 1"] == scaled["depth 6"] == "Depth"
    assert (scaled["patch 8"], scaled["MLP 768"]) == ("Patch size", "Width MLP")
    assert (scaled["width 48"], scaled["all x 1/2"]) == ("Width", "All")
    assert "ViT-S/4 GAP" not in scaled and base not in scaled
    pooled = pooled_models(load_study("shapes"))
    assert pooled == ["ViT-S/4", "ViT-S/4 GAP", "ViT-S/4 GAP, lr 1e-3"]
    # Two sizes that differ in everything, and a model that differs in its objective as well.
    assert scaled_models(load_study("mini")) == ("", {})
    assert pooled_models(load_study("mini")) == []


def test_figures_8_and_9_show_what_was_measured(axes):
    study = load_study("shapes")
    made = records(study, VALUES)
    found = points(study, made)
    some = drawings(study, found, made)
    some["figure_8"].own[1](axes)
    (line,) = axes.lines
    np.testing.assert_allclose(line.get_xydata(), [[1 / 3, 40], [1, 80]])
    axes.clear()
    some["figure_9"].own[0](axes)
    curves = [line.get_xydata().tolist() for line in axes.lines]
    np.testing.assert_allclose(
        curves, [[[50, 60], [100, 60]], [[50, 45], [100, 45]]]
    )  # of both sets


def test_figures_2_and_13_show_what_was_measured(axes):
    study = load_study("mini")
    made = records(study, {"ViT-S/4"})
    found = [p for p in points(study, made) if p.examples == 50_000]
    looks = make_looks(study)
    tuned = [
        dataclasses.replace(p, accuracy=p.accuracy + p.seed)
        for p in found
        if p.task.endswith("fine-tuned")
    ]
    study_panels.by_group(axes, tuned, looks, ("digits", "fashion"), "all")
    (bar,) = axes.patches
    assert bar.get_height() == 81.0 and "seeds: 3" in axes.get_title()
    axes.clear()
    study_panels.against(axes, [p for p in found if p.task == "digits 10-shot"], looks, speed=True)
    np.testing.assert_allclose(axes.lines[0].get_xydata(), [[1e9 / 3e6, 80]])


def test_a_figure_that_a_study_cannot_have_says_why(tmp_path, monkeypatch, capsys):
    study = load_study("mini")
    store = Store(tmp_path)
    monkeypatch.setattr(store, "collect", lambda: records(study, {"ViT-S/4"}))
    monkeypatch.setattr("experiments.scaling.study_figures.save", lambda *a: [a[-1]])
    written = draw_study(study, store, tmp_path)
    assert [name for name in written if isinstance(name, str) and "figure" in name] == [
        f"mini_figure_{n}" for n in (2, 3, 4, 5, 12, 13)
    ]
    plt.close("all")
    said = capsys.readouterr().out
    assert "figure_8: not drawn, no two ViTs of the study differ in depth" in said
    assert "figure_9: not drawn, no two models of the study differ in model.pool" in said


def test_h200_gives_figures_4_and_5(axes, monkeypatch):
    file = runpy.run_path(str(RESULTS.parent / "studies" / "h200.py"))
    monkeypatch.setitem(file["get_study"].__globals__, "tuned", lambda model: 1e-3)
    for number, model in enumerate(file["MODELS"], start=1):
        monkeypatch.setitem(VALUES, model.name, (number * 1e9, 0.1 * number))
    study = file["get_study"]()
    made = records(study, {model.name for model in file["MODELS"]})
    for record in made.values():
        record["steps"] = record["config"]["steps"]
    some, shown = drawings(study, points(study, made), made), {}
    for name in ("figure_4", "figure_5"):
        axes.clear()
        some[name].own[0](axes)
        shown[name] = [line.get_xdata() for line in axes.lines if len(line.get_xdata())]
    assert len(shown["figure_4"]) == len(shown["figure_5"]) == len(file["MODELS"])
    assert all(list(sizes) == [600, 6_000, 60_000, 600_000] for sizes in shown["figure_4"])
    assert all(len(compute) == 3 for compute in shown["figure_5"])


def test_without_pretraining_there_is_a_point_that_cost_nothing():
    study = load_study("mini")
    found = points(study, records(study, {"ViT-S/4"}))
    (point,) = [p for p in found if (p.examples, p.seed, p.task) == (0, 1, "digits fine-tuned")]
    assert (point.exaflops, point.accuracy, point.set) == (0.0, 80.0, "no pretraining")


def test_the_best_learning_rate_of_each_model(axes):
    """The table's rates are those of the lowest mean loss; a diverged seed rules a rate out."""
    study, found = load_study("widths"), {}
    for run in expand(study):
        rule, rate = run.labels["sweep"].split()
        best = 4e-3 * (48 / int(run.labels["model"].split()[1]) if rule == "standard" else 1)
        loss = 2 + np.log2(float(rate) / best) ** 2 + 0.1 * run.labels["seed"]
        if float(rate) > 0.03 and run.labels["seed"] == 1:
            loss = np.nan
        found[run.name] = {
            **{"status": "done", "kind": run.kind, "labels": run.labels},
            **{"config": flatten(run.config), "evaluations": [{"validation/loss": loss}]},
        }
    rows = {(row["sweep"], row["model"]): row for row in study_figures.best_rates(found)}
    assert len(rows) == 10
    for width, rate in ((48, "0.004"), (96, "0.002"), (192, "0.001"), (384, "0.0005")):
        assert rows["standard", f"width {width}"]["best rate"] == rate
        assert rows["mup", f"width {width}"]["best rate of each seed"] == "0.004, 0.004, 0.004"
    models = losses_by_rate(found.values())["mup"]
    looks = study_figures.make_looks(study)
    study_panels.by_rate(axes, models, "mup", "strokes", looks)
    assert all(max(line.get_xdata()) < 0.03 for line in axes.lines)
    ring = axes.collections[1].get_offsets()
    np.testing.assert_allclose(ring, [[4e-3, 2.1]])


def test_labels_stay_apart_and_in_the_panel(axes):
    axes.set(xlim=(0, 1), ylim=(0, 1))
    label_ends(axes, [(f"m{i}", 1.0, 0.99 - 0.01 * i, (0, 0, 0)) for i in range(5)])
    rows = [
        axes.transData.transform(t.xy)[1] * 72 / axes.figure.dpi + t.xyann[1] for t in axes.texts
    ]
    assert np.diff(sorted(rows)).min() > 9.9
    assert max(rows) <= axes.transAxes.transform((0, 1))[1] * 72 / axes.figure.dpi


@pytest.mark.parametrize(
    ("name", "title"),
    [("mini", "pretrained on strokes 50,000"), ("shapes", "pretrained on strokes 50,000")],
)
def test_figures_of_our_results_are_readable(tmp_path, monkeypatch, name, title):
    """No text covers another or a mark, legends don't repeat, titles say what was trained."""
    study, drawn = load_study(name), {}
    store = Store(tmp_path, RESULTS / name / "results.jsonl")
    monkeypatch.setattr(store, "collect", store.records)
    monkeypatch.setattr(
        study_figures, "save", lambda figure, _, at: drawn.update({at: figure}) or []
    )
    draw_study(study, store, tmp_path)
    for at, figure in drawn.items():
        figure.canvas.draw()
        renderer = figure.canvas.get_renderer()
        own = [ax for ax in figure.axes if ax.get_title() != "the paper"]
        assert all("pretrained on strokes" in ax.get_title() for ax in own), at
        entries = [t.get_text() for legend in figure.findobj(Legend) for t in legend.get_texts()]
        assert len(entries) == len(set(entries)), at
        texts = [t for ax in figure.axes for t in (ax.title, ax.xaxis.label, ax.yaxis.label)]
        texts += [t for ax in figure.axes for t in ax.texts]
        texts += [t for legend in figure.findobj(Legend) for t in legend.get_texts()]
        boxes = [(t.get_text(), Text.get_window_extent(t, renderer)) for t in texts if t.get_text()]
        for (a, box), (b, other) in itertools.combinations(boxes, 2):
            assert not box.overlaps(other), (at, a, b)
        for ax in own if at.endswith(("figure_5", "figure_13")) else ():
            marks = np.concatenate([line.get_xydata() for line in ax.lines])
            for label in (t for t in ax.texts if isinstance(t, Annotation)):
                box = Text.get_window_extent(label, renderer)
                covered = [m for m in ax.transData.transform(marks) if box.contains(*m)]
                assert not covered, (at, label.get_text())
        plt.close(figure)
    assert any(title in ax.get_title() for ax in drawn[f"{name}_figure_5"].axes)
