"""Trials: their product, their folders, the choice among them; finished work isn't repeated."""

import dataclasses
import json

import jax
import pytest

from vit_jax.classifier.sweep import (
    SweepConfig,
    Trial,
    best_trial,
    check_dev,
    devices_of_a_trial,
    run_trials,
    show_trials,
    trial_name,
    with_values,
)
from vit_jax.data.pipeline import DataConfig
from vit_jax.models.variants import ModelConfig
from vit_jax.parallel.lanes import ALONE
from vit_jax.parallel.mesh import MeshConfig
from vit_jax.training.early_stopping import has_waited
from vit_jax.training.optimizer import ScheduleConfig
from vit_jax.training.recipe import TrainConfig

CONFIG = TrainConfig(
    ModelConfig("ViT-mu/8"), DataConfig("digits"), 8, 8, ScheduleConfig(0.1, warmup=0), steps=4
)


def test_product():
    sweep = SweepConfig((0.1, 0.2), (("optimizer.name", ("sgd", "adamw")), ("steps", (1, 2))))
    trials = sweep.trials()
    assert len(trials) == 8 and len({trial_name(t) for t in trials}) == 8
    assert trials[0] == {"schedule.peak": 0.1, "optimizer.name": "sgd", "steps": 1}
    config = with_values(CONFIG, trials[-1])
    assert (config.schedule.peak, config.optimizer.name, config.steps) == (0.2, "adamw", 2)
    assert CONFIG.schedule.peak == 0.1
    assert SweepConfig().trials() == [{}] and trial_name({}) == "recipe"
    with pytest.raises(ValueError, match=r"no field schedule\.paek"):
        with_values(CONFIG, {"schedule.paek": 1})
    with pytest.raises(ValueError, match="no values for steps"):
        SweepConfig((), (("steps", ()),)).trials()


def test_finished_trials_are_not_repeated(tmp_path):
    """A killed trial resumes in its folder."""
    trials, ran = SweepConfig((0.1, 0.2, 0.3)).trials(), []
    accuracy = {0.1: 0.5, 0.2: 0.7, 0.3: 0.7}

    def run(config, folder, lane):
        assert lane is ALONE
        ran.append(config.schedule.peak)
        if ran == [0.1, 0.2]:
            raise KeyboardInterrupt
        (folder / "checkpoints").mkdir(parents=True)
        peak = config.schedule.peak
        record = {"dev/accuracy": accuracy[peak], "dev/loss": 1 + peak, "dev/examples": 40}
        (folder / "metrics.jsonl").write_text(json.dumps({"step": 4, **record}) + "\n")

    with pytest.raises(KeyboardInterrupt):
        run_trials(CONFIG, trials, tmp_path, run)
    results = run_trials(CONFIG, trials, tmp_path, run)
    assert ran == [0.1, 0.2, 0.2, 0.3]
    assert run_trials(CONFIG, trials, tmp_path, run) == results and len(ran) == 4
    assert not list(tmp_path.glob("trials/*/checkpoints"))
    best = best_trial(results)
    assert best.values == {"schedule.peak": 0.2}  # of the less loss
    shown = show_trials(results).splitlines()
    assert "0.2" in shown[1] and "70.00%" in shown[1] and "note" not in shown[-1]
    assert "is the smallest tried: widen" in show_trials(
        [dataclasses.replace(r, accuracy=1 - r.accuracy) for r in results]
    )


def test_the_best_step_where_it_stops_early(tmp_path):
    config = dataclasses.replace(CONFIG, early_stopping=2, eval_every=1, evaluators={"dev": None})

    def run(config, folder, lane):
        folder.mkdir(parents=True)
        lines = [
            {"step": step, "dev/accuracy": a, "dev/loss": 1.0, "dev/examples": 10}
            for step, a in enumerate([0.1, 0.5, 0.5, 0.4], 1)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))

    (result,) = run_trials(config, [{}], tmp_path, run)
    assert (result.step, result.accuracy) == (2, 0.5)
    folder = tmp_path / "trials/recipe"
    assert has_waited(folder, "dev/accuracy", 2) and not has_waited(folder, "dev/accuracy", 3)
    assert not has_waited(folder, "dev/accuracy", None)
    assert not has_waited(folder, "test/accuracy", 1)


def test_a_dev_split_too_small_for_the_grid():
    trials = SweepConfig((0.1, 0.2, 0.3)).trials()
    with pytest.raises(ValueError, match="11 images, too few to choose among 3 trials"):
        check_dev(11, trials)
    check_dev(12, trials)
    check_dev(0, trials[:1])


@pytest.mark.parametrize(
    ("trials", "mesh", "batch_size", "expected"),
    [
        (8, {}, 8, 1),
        (6, {}, 8, 1),  # a quarter is idle
        (4, {}, 8, 2),
        (5, {}, 8, 4),  # in three rounds of two
        (1, {}, 8, 8),
        (8, {"fsdp": 2}, 8, 2),
        (8, {"fsdp": 2, "tensor": 2}, 8, 4),
        (2, {"tensor": 4}, 8, 4),
        (4, {}, 9, 8),  # no two devices share nine images; `make_mesh` refuses them later
        (8, {"data": 8}, 8, 8),
    ],
)
def test_devices_are_kept_busy(trials, mesh, batch_size, expected):
    """Trials use as many of the eight devices as they can."""
    config = dataclasses.replace(CONFIG, mesh=MeshConfig(**mesh), batch_size=batch_size)
    assert devices_of_a_trial(config, SweepConfig(), trials) == expected
    assert devices_of_a_trial(config, SweepConfig(devices=3), trials) == 3


def test_devices_that_cannot_be(monkeypatch):
    with pytest.raises(ValueError, match=r"sweep\.devices = 0: expected at least 1"):
        SweepConfig(devices=0)
    with pytest.raises(ValueError, match=r"sweep\.devices = 9: there are 8"):
        devices_of_a_trial(CONFIG, SweepConfig(devices=9), 2)
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    assert devices_of_a_trial(CONFIG, SweepConfig(), 8) == 8
    with pytest.raises(ValueError, match="several processes run one after another"):
        devices_of_a_trial(CONFIG, SweepConfig(devices=1), 8)


def test_interval_is_in_the_table():
    text = str(Trial({"steps": 1}, accuracy=0.8, loss=0.5, examples=10, step=3))
    assert "[49.02%, 94.33%]" in text
