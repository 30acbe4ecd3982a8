"""ReaL, subsets, calibration, kNN, the linear probe: against their definitions and scikit-learn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, softmax
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from vit_jax.data.pipeline import DataConfig
from vit_jax.data.sources import Source
from vit_jax.data.stratified import stratified_split
from vit_jax.evaluation import calibration, features
from vit_jax.evaluation.intervals import accuracy_interval
from vit_jax.evaluation.protocols import classification
from vit_jax.evaluation.protocols.classification import Config as ClassificationConfig
from vit_jax.evaluation.protocols.classification import make as make_classification
from vit_jax.evaluation.protocols.fewshot import (
    Config as FewshotConfig,
)
from vit_jax.evaluation.protocols.fewshot import (
    draw_shots,
    least_squares,
)
from vit_jax.evaluation.protocols.fewshot import (
    make as make_fewshot,
)
from vit_jax.evaluation.protocols.knn import nearest_neighbours
from vit_jax.evaluation.protocols.linear import fit_logistic, linear_probe
from vit_jax.losses.classification import LossConfig
from vit_jax.parallel.mesh import MeshConfig, make_mesh, put_tree, replicated, use_mesh

CLASSES = 10


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (50, 8, 8, 3), np.uint8)


@pytest.fixture(scope="module")
def logits(model, params, images):
    return np.asarray(jax.jit(model.apply)(params, images).logits)


def evaluate(monkeypatch, model, params, images, labels, most=None, **options):
    """Evaluates these images with `make_classification` on a mesh of eight devices."""
    records = [{"image": i, "label": y} for i, y in zip(images, labels, strict=True)]
    source = Source(records, CLASSES, labels_per_example=most)
    monkeypatch.setattr(classification, "open_data", lambda *_: source)
    mesh = make_mesh(MeshConfig())
    config = ClassificationConfig(DataConfig("mine"), batch_size=16, **options)
    with use_mesh(mesh):
        evaluator = make_classification(config, model, mesh, LossConfig())
        return evaluator(put_tree(params, jax.tree.map(lambda _: replicated(mesh), params)))


def test_several_labels_or_none(monkeypatch, model, params, images, logits):
    """ImageNet-ReaL: right if among the labels; images without a label aren't counted."""
    rng = np.random.default_rng(1)
    labels = [list(rng.choice(CLASSES, size=i % 4, replace=False)) for i in range(50)]
    labels[1] = [int(logits[1].argmax())]
    result = evaluate(monkeypatch, model, params, images, labels, most=3)
    counted = [i for i in range(50) if labels[i]]
    assert result["examples"] == len(counted) and result["excluded"] == 50 - len(counted)
    right = [logits[i].argmax() in labels[i] for i in counted]
    assert 0 < np.mean(right) < 1 and result["accuracy"] == np.mean(right)
    top5 = [bool({*np.argsort(-logits[i])[:5]} & {*labels[i]}) for i in counted]
    assert result["top5"] == np.mean(top5) > np.mean(right)
    with pytest.raises(ValueError, match="no image has a label"):
        evaluate(monkeypatch, model, params, images[:16], [[]] * 16, most=3)


def test_only_the_classes_that_are_present(monkeypatch, model, params, images, logits):
    """ImageNet-A's and -R's rule."""
    labels = np.random.default_rng(2).choice([2, 3, 7, 9], 50)
    result = evaluate(monkeypatch, model, params, images, labels, only_present=True)
    inside = logits[:, [2, 3, 7, 9]]
    assert result["accuracy"] == np.mean(np.array([2, 3, 7, 9])[inside.argmax(1)] == labels)
    losses = -log_softmax(inside, axis=1)[np.arange(50), np.searchsorted([2, 3, 7, 9], labels)]
    assert result["loss"] == pytest.approx(losses.mean(), rel=1e-5)
    assert result["accuracy"] != np.mean(logits.argmax(1) == labels)
    assert "top5" not in result


def test_calibration(monkeypatch, model, params, images, logits):
    """Compares with confidences by hand; the fitted temperature minimises the loss."""
    sharp = logits * 5
    rng = np.random.default_rng(3)
    labels = np.array([rng.choice(CLASSES, p=p) for p in softmax(logits, axis=1)])
    by_hand = 0.0
    confidence, right = softmax(logits, axis=1).max(1), logits.argmax(1) == labels
    for low in np.arange(15) / 15:
        inside = (confidence > low) & (confidence <= low + 1 / 15)
        if inside.any():
            gap = abs(confidence[inside].mean() - right[inside].mean())
            by_hand += inside.mean() * gap
    result = evaluate(monkeypatch, model, params, images, labels)
    assert result["ece"] == pytest.approx(by_hand, abs=1e-6) and by_hand > 0.01

    temperature = calibration.fit_temperature(sharp, labels)
    assert temperature == pytest.approx(5 * calibration.fit_temperature(logits, labels), rel=1e-4)

    def loss(t):
        return -log_softmax(sharp / t, axis=1)[np.arange(50), labels].mean()

    assert loss(temperature) < min(loss(temperature * 1.01), loss(temperature / 1.01))
    halved = evaluate(monkeypatch, model, params, images, labels, temperature=2.0)
    assert halved["accuracy"] == result["accuracy"] and halved["loss"] != result["loss"]


def test_interval():
    """Equals Wilson's formula; never empty and always within 0 and 1."""
    low, high = accuracy_interval(8, 10)
    z, p, n = 1.959964, 0.8, 10
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert (low, high) == pytest.approx((centre - half, centre + half), abs=1e-6)
    assert accuracy_interval(10, 10)[1] == 1 > accuracy_interval(10, 10)[0]


@pytest.fixture(scope="module")
def blobs():
    """Makes three overlapping classes, 1, 4 and 6: (train, dev, test) of features and labels."""
    rng = np.random.default_rng(0)
    centres = 0.8 * rng.normal(size=(3, 10))

    def draw(n):
        y = np.arange(n) % 3
        return (centres[y] + rng.normal(size=(n, 10))).astype(np.float32), np.array([1, 4, 6])[y]

    return draw(90), draw(60), draw(60)


def test_nearest_neighbours(blobs):
    (x, y), _, (test, _) = blobs
    predicted = nearest_neighbours(x, y, test, (1, 7), temperature=0.1)

    def weights(distances):
        return np.exp((1 - distances) / 0.1)

    for k in (1, 7):
        reference = KNeighborsClassifier(k, weights=weights, metric="cosine").fit(x, y)
        np.testing.assert_array_equal(predicted[k], reference.predict(test))
    assert (predicted[1] != predicted[7]).any()
    tiny = nearest_neighbours(x, y, test, (7,), temperature=1e-3)[7]
    np.testing.assert_array_equal(tiny, predicted[1])
    with pytest.raises(ValueError, match="numbers from 1 to 90"):
        nearest_neighbours(x, y, test, (91,))


def test_logistic_regression_is_scikit_learns(blobs):
    (x, y), _, (test, _) = blobs
    targets = np.searchsorted([1, 4, 6], y)
    for l2 in (1e-3, 1.0):
        w = fit_logistic(x, targets, l2, np.zeros((11, 3)))
        reference = LogisticRegression(C=1 / (l2 * len(x)), tol=1e-8, max_iter=5000)
        expected = reference.fit(x, targets).predict_proba(test)
        found = softmax(test @ w[:-1] + w[-1], axis=1)
        np.testing.assert_allclose(found, expected, atol=2e-3)


def test_linear_probe_chooses_on_dev(blobs):
    train, dev, (test, test_y) = blobs
    predicted, l2, accuracy = linear_probe(train, dev, test, (1e-4, 1e-1, 1e4))
    assert l2 == 1e-1 and accuracy > 0.5 and np.mean(predicted == test_y) > 0.5
    assert {*predicted} <= {1, 4, 6}
    with pytest.raises(ValueError, match="greater than 0"):
        linear_probe(train, dev, test, (0.0,))
    nothing = tuple(part[:0] for part in dev)
    for pair in ((train, nothing), (nothing, dev)):
        with pytest.raises(ValueError, match="to choose its l2 on: expected some of both"):
            linear_probe(*pair, test, (0.1,))


def test_fewshot_chooses_l2_on_dev(model, params, monkeypatch, blobs):
    """Chooses once per number of shots, by the mean over seeds on the rest of train."""
    (x, y), _, (test, test_y) = blobs
    sets = {"train": (x, y), "test": (test, test_y)}
    monkeypatch.setattr(
        "vit_jax.evaluation.protocols.fewshot.extract_split", lambda *_: lambda _, name: sets[name]
    )
    monkeypatch.setattr("vit_jax.evaluation.protocols.fewshot.open_single_label", lambda data: None)
    config = FewshotConfig(DataConfig("mine"), shots=(5,), seeds=2, l2=(1.0, 100.0, 1e6))
    result = make_fewshot(config, model, make_mesh(MeshConfig()))(params)
    on_dev, on_test = np.zeros((2, 3)), np.zeros((2, 3))
    for seed in range(2):
        index = draw_shots(y, 5, seed)
        rest = np.setdiff1d(np.arange(90), index)
        for i, l2 in enumerate(config.l2):
            on_dev[seed, i] = np.mean(least_squares(x[index], y[index], x[rest], l2) == y[rest])
            on_test[seed, i] = np.mean(least_squares(x[index], y[index], test, l2) == test_y)
    best = on_dev.mean(0).argmax()
    assert result["5shot_l2"] == config.l2[best]
    assert result["5shot"] == pytest.approx(on_test[:, best].mean())
    assert result["5shot_dev"] == pytest.approx(on_dev[:, best].mean())
    config = FewshotConfig(DataConfig("mine"), shots=(30,), seeds=1, l2=(1.0, 2.0))
    with pytest.raises(ValueError, match="leave none to choose l2"):
        make_fewshot(config, model, make_mesh(MeshConfig()))(params)


def test_several_labels_are_refused(monkeypatch):
    source = Source([{"image": None, "label": [0]}], 2, labels_per_example=3)
    monkeypatch.setattr(features, "open_data", lambda *_: source)
    with pytest.raises(ValueError, match="this protocol needs one"):
        features.open_single_label(DataConfig("mine"))


def test_stratified_split():
    labels = np.repeat([0, 1, 5], [100, 11, 2])
    fractions = {"train": 0.8, "dev": 0.1, "test": 0.1}
    parts = stratified_split(labels, fractions, seed=0)
    np.testing.assert_array_equal(np.sort(np.concatenate([*parts.values()])), np.arange(113))
    counts = {name: np.bincount(labels[index], minlength=6) for name, index in parts.items()}
    assert [counts[name][0] for name in fractions] == [80, 10, 10]
    assert [counts[name][1] for name in fractions] == [9, 1, 1]
    assert counts["train"][5] == 1 and counts["dev"][5] + counts["test"][5] == 1
    again = stratified_split(labels, fractions, seed=0)
    other = stratified_split(labels, fractions, seed=1)
    assert all((parts[n] == again[n]).all() for n in fractions)
    assert any((parts[n] != other[n]).any() for n in fractions)
    # Removing a class changes no other class.
    fewer = stratified_split(labels[:111], fractions, seed=0)
    assert all({*fewer[n]} == {i for i in parts[n] if i < 111} for n in fractions)
    with pytest.raises(ValueError, match="sum to 1"):
        stratified_split(labels, {"train": 0.8, "dev": 0.1}, seed=0)


def test_bins_reach_from_0_to_1():
    confidence = jnp.array([0.0, 1 / 15, 1.0])
    bins = calibration.bin_confidences(confidence, jnp.ones(3, bool), jnp.array([True] * 3))
    assert bins[0, 0] == 2 and bins[0, -1] == 1 and bins.shape == (3, 15)


def test_classes_that_were_renamed():
    classification.check_class_names(["ant", "bee"], ["ant", "bee"])
    classification.check_class_names(["tench", "goldfish"], ["n01440764", "n01443537"])
    classification.check_class_names([], ["ant", "bee"])
    with pytest.raises(ValueError, match="0 is 'ant' there and 'bee' here, 1 is 'bee' there"):
        classification.check_class_names(["ant", "bee"], ["bee", "ant"])
    with pytest.raises(ValueError, match="1 is 'bee' there and 'wasp' here"):
        classification.check_class_names(["ant", "bee"], ["ant", "wasp"])
