"""Baselines of a classifier, and metrics that give classes equal weight."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax
from sklearn.metrics import balanced_accuracy_score, f1_score

from vit_jax.classifier.baselines import compare, measure_baselines, oriented_gradients
from vit_jax.classifier.examine import score_labels
from vit_jax.classifier.sweep import Trial, best_trial, show_trials
from vit_jax.config import build
from vit_jax.data.pipeline import DataConfig
from vit_jax.data.sources import Source, open_source
from vit_jax.evaluation.by_class import measure_predictions
from vit_jax.losses.classification import LossConfig, example_losses
from vit_jax.models.variants import ModelConfig
from vit_jax.training import loop
from vit_jax.training.optimizer import ScheduleConfig
from vit_jax.training.recipe import TrainConfig


def stripes(count, seed):
    """Noisy stripes: label 0 across, a quarter of the images label 1, down."""
    rng, records = np.random.default_rng(seed), []
    for i in range(count):
        pixels = np.sin((np.arange(40) + rng.uniform(0, 9)) * 0.7)[:, None] * np.ones(40)
        noisy = 128 + 60 * (pixels if i % 4 else pixels.T) + rng.normal(0, 20, (40, 40))
        image = np.uint8(noisy.clip(0, 255))[..., None].repeat(3, -1)
        records.append({"image": image, "label": int(i % 4 == 0)})
    return Source(records, 2)


def test_hand_made_features_tell_orientations_apart():
    sources = {"train": stripes(60, 0), "dev": stripes(20, 1), "test": stripes(40, 2)}
    labels = np.array([r["label"] for r in sources["test"].records])
    counts = {"train": [45, 15], "dev": [15, 5]}
    for metric in ("accuracy", "macro_f1"):
        largest, gradients, probe = measure_baselines(sources, counts, labels, 0 * labels, metric)
        assert largest["accuracy"] == 0.75 and largest["balanced_accuracy"] == 0.5
        assert gradients["accuracy"] == 1.0
        assert {**probe, "name": ""} == {**largest, "name": ""}


def test_gradients_are_binned_by_their_orientation():
    image = np.zeros((128, 128, 3), np.uint8)
    image[:, 64:] = 255  # a vertical edge: its gradient is horizontal, orientation 0
    bins = oriented_gradients(image).reshape(49, 9, 4).sum(axis=(0, 2))
    assert bins[0] > 0 and not bins[1:].any()
    bins = oriented_gradients(image.transpose(1, 0, 2)).reshape(49, 9, 4).sum(axis=(0, 2))
    assert bins[4] == pytest.approx(bins[5]) and bins[4] > 0  # 90 degrees: between both
    assert not bins[[0, 1, 2, 3, 6, 7, 8]].any()


def test_metrics_are_scikit_learns():
    rng = np.random.default_rng(0)
    labels, predicted = rng.integers(0, 4, (2, 50))
    found = measure_predictions(labels, predicted)
    assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, predicted))
    assert found["macro_f1"] == pytest.approx(f1_score(labels, predicted, average="macro"))
    labels[labels == 2] = 3  # a class that is predicted but has no example
    found = measure_predictions(labels, predicted)
    recalls = [np.mean(predicted[labels == c] == c) for c in (0, 1, 3)]
    assert found["balanced_accuracy"] == pytest.approx(np.mean(recalls))
    assert found["macro_f1"] == pytest.approx(f1_score(labels, predicted, average="macro"))


def test_a_baseline_that_is_not_beaten_is_named():
    labels = np.arange(100) % 2
    model, same = score_labels(labels, labels ^ (np.arange(100) < 20)), {"name": "same"}
    near = score_labels(labels, labels ^ (np.arange(100) < 25))
    far = score_labels(labels, labels ^ (np.arange(100) < 45))
    rows = [{**same, **model}, {"name": "near", **near}, {"name": "far", **far}]
    worse, unclear = compare(model, rows, "accuracy")
    assert "does not beat this baseline: same (accuracy 80.0% against 80.0%)" in worse
    assert "not clearly better than this baseline: near" in unclear
    assert compare(model, rows[1:], "balanced_accuracy") == []


def test_trials_are_chosen_by_the_metric():
    accurate = Trial({"schedule.peak": 0.1}, 0.9, 0.3, 50, 5, 0.5, 0.47)
    balanced = Trial({"schedule.peak": 0.2}, 0.8, 0.4, 50, 5, 0.8, 0.78)
    assert best_trial([accurate, balanced]) is accurate
    assert best_trial([accurate, balanced], "macro_f1") is balanced
    shown = show_trials([accurate, balanced], "balanced_accuracy").splitlines()
    assert "chosen by balanced_accuracy" in shown[0] and "learning rate 0.2" in shown[1]
    earlier = dataclasses.replace(accurate, macro_f1=None)
    with pytest.raises(ValueError, match=r"schedule.peak=0.1 has no macro_f1"):
        best_trial([earlier, balanced], "macro_f1")


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ("balanced", (8 / 9, 8 / 6, 8 / 9)),
        ("cat=2, dog=0.5", (2.0, 0.5, 1.0)),
        ({"cow": 3}, (1.0, 1.0, 3.0)),
        ((1, 2, 3), (1.0, 2.0, 3.0)),
    ],
)
def test_classes_are_weighed(weights, expected):
    """The loss of an image is its class's weight times the loss without weights."""
    config = build(LossConfig, {"class_weights": weights, "label_smoothing": 0.1})
    weighed = config.weigh(("cat", "dog", "cow"), np.array([3, 2, 3]))
    assert weighed.class_weights == pytest.approx(expected)
    logits, labels = np.random.default_rng(0).normal(size=(4, 3)), np.array([0, 1, 2, 1])
    targets = np.eye(3)[labels]
    plain = -((0.9 * targets + 0.1 / 3) * log_softmax(logits, axis=1)).sum(axis=1)
    found = example_losses(weighed, jnp.array(logits), jnp.array(targets))
    np.testing.assert_allclose(found, plain * np.array(expected)[labels], rtol=1e-5)
    mixed = example_losses(weighed, jnp.array(logits), jnp.array([[0.5, 0.5, 0.0]] * 4))
    unweighed = dataclasses.replace(weighed, class_weights=())
    same = example_losses(unweighed, jnp.array(logits), jnp.array([[0.5, 0.5, 0.0]] * 4))
    np.testing.assert_allclose(mixed / same, np.mean(expected[:2]), rtol=1e-5)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"caw": 1.0}, "unknown class in loss.class_weights 'caw': did you mean '"),
        ("cat:2", 'expected "balanced", or names with numbers'),
        ("cat=two", 'expected "balanced", or names with numbers'),
        ({"cat": 0.0}, "class_weights cat: 0: expected more than 0"),
        ((1.0, 2.0), "class_weights has 2 numbers: expected one for each of the 3 classes"),
        ("balanced", "there is no image of dog"),
        (3, "class_weights = 3: expected names with values"),
    ],
)
def test_weights_that_cannot_be(weights, message):
    with pytest.raises(ValueError, match=message):
        config = build(LossConfig, {"class_weights": weights})
        config.weigh(("cat", "dog", "cow"), np.array([3, 0, 3]))
    if weights == "balanced":
        with pytest.raises(ValueError, match="a run looks up classes and counts in its data"):
            example_losses(LossConfig(class_weights=weights), jnp.zeros((1, 3)), jnp.eye(3)[:1])


def test_a_run_counts_its_images(tmp_path):
    config = TrainConfig(
        ModelConfig("ViT-mu/8"),
        DataConfig("digits", "train[:40]"),
        *(8, 8, ScheduleConfig(0.1, warmup=0)),
        steps=4,
        loss=LossConfig(class_weights="balanced"),
    )
    run = loop.prepare(config, str(tmp_path))
    counts = np.bincount([open_source("digits", "train[:40]")[i]["label"] for i in range(40)])
    assert run.config.loss.class_weights == pytest.approx(40 / (10 * counts))
