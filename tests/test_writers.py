"""Writers of metrics: TensorBoard where it is installed, Weights & Biases offline; no others."""

import dataclasses
import importlib.util
import types

import pytest

from vit_jax.config import build
from vit_jax.recipes import recipe
from vit_jax.training import writers
from vit_jax.training.metrics import Metrics, read_metrics
from vit_jax.training.recipe import TrainConfig
from vit_jax.training.writers import MetricsConfig


def opened(workdir, monkeypatch, config, installed=()):
    """The names of the writers that are opened where these packages are installed."""
    made = []

    def kind(name):
        def open_one(*_):
            made.append(name)
            return types.SimpleNamespace(note="", write=lambda *_: None, close=lambda: None)

        return open_one

    monkeypatch.setattr(writers, "TensorBoard", kind("tensorboard"))
    monkeypatch.setattr(writers, "WeightsAndBiases", kind("wandb"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name in installed or None)
    with Metrics(workdir, 10, config=config) as metrics:
        metrics.write(1, {"loss": 2.0})
    assert read_metrics(workdir) == [{"step": 1, "loss": 2.0}]
    return made


def test_what_is_written_where(tmp_path, monkeypatch):
    def found(names, *installed):
        return opened(tmp_path, monkeypatch, MetricsConfig(names), installed)

    assert found(None) == [] and found(None, "tensorboardX", "wandb") == ["tensorboard"]
    assert found(("jsonl",), "tensorboardX", "wandb") == []
    assert found(("jsonl", "wandb"), "wandb") == ["wandb"]
    assert found(writers.WRITERS, "tensorboardX", "wandb") == ["tensorboard", "wandb"]


def test_what_cannot_be_written_is_said_before_anything_runs(monkeypatch):
    for names, text in (
        (("jsonl", "wandbb"), "unknown writer of metrics 'wandbb': did you mean 'wandb'"),
        (("wandb",), "add 'jsonl', which resuming reads"),
        ((), "add 'jsonl'"),
    ):
        with pytest.raises(ValueError, match=text):
            MetricsConfig(names)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    MetricsConfig().check_packages()
    with pytest.raises(ValueError, match="pip install wandb, or leave it out"):
        MetricsConfig(("jsonl", "wandb")).check_packages()


def test_a_recipe_says_it_and_earlier_ones_do_not():
    values = recipe("pretrain/formula", metrics={"writers": ("jsonl", "wandb")})
    config = build(TrainConfig, values)
    assert config.metrics.writers == ("jsonl", "wandb")
    values = recipe("pretrain/formula", metrics={"writers": "jsonl,tensorboard"})  # by a flag
    assert build(TrainConfig, values).metrics.writers == ("jsonl", "tensorboard")
    earlier = dataclasses.asdict(config)
    del earlier["metrics"]
    assert build(TrainConfig, earlier).metrics == MetricsConfig()


def test_wandb_offline(tmp_path, monkeypatch):
    """A run in a folder of the workdir; resumed, it has the same name; no network is needed."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = MetricsConfig(("jsonl", "wandb"))
    for resumed in (0, 2):
        with Metrics(tmp_path, 4, resumed, config=config, recipe={"seed": 7}) as metrics:
            metrics.write(resumed + 1, {"loss": 1.5, "validation/accuracy": 0.5})
    runs = sorted(path for path in (tmp_path / "wandb").iterdir() if path.name.startswith("off"))
    (identity,) = {path.name.rpartition("-")[2] for path in runs}
    assert identity == (tmp_path / "wandb/run_id").read_text()
    recorded = (runs[0] / f"run-{identity}.wandb").read_bytes()
    for text in (b"validation/accuracy", b"seed", tmp_path.name.encode()):
        assert text in recorded
    with Metrics(tmp_path, 4, 0, config=config):  # begun anew
        pass
    assert identity != (tmp_path / "wandb/run_id").read_text()
