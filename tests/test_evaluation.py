"""Every example counts exactly once, whatever the batch size and the mesh."""

import jax
import numpy as np
import pytest

from vit_jax.data.pipeline import DataConfig
from vit_jax.data.sources import open_source
from vit_jax.evaluation.by_class import measure_predictions
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
from vit_jax.losses.classification import LossConfig
from vit_jax.parallel.mesh import MeshConfig, make_mesh, put_tree, replicated, use_mesh

SPLIT = "test[:100]"


@pytest.fixture(scope="module")
def by_hand(model, params):
    """Computes logits, features and labels of all examples in one batch."""
    source = open_source("digits", SPLIT)
    images = np.stack([np.repeat(source[i]["image"][..., None], 3, -1) for i in range(100)])
    output = jax.jit(model.apply)(params, images)
    return output, np.array([source[i]["label"] for i in range(100)])


@pytest.mark.parametrize("batch_size", [8, 24, 64, 256])
def test_classification_is_exact(model, params, by_hand, batch_size):
    output, labels = by_hand
    mesh = make_mesh(MeshConfig(fsdp=2))
    config = ClassificationConfig(DataConfig("digits", SPLIT), batch_size, by_class=True)
    with use_mesh(mesh):
        evaluate = make_classification(config, model, mesh, LossConfig())
        result = evaluate(put_tree(params, jax.tree.map(lambda _: replicated(mesh), params)))
    assert result["examples"] == 100
    for name, value in measure_predictions(labels, np.array(output.logits.argmax(-1))).items():
        assert result[name] == pytest.approx(value)
    losses = -jax.nn.log_softmax(output.logits)[np.arange(100), labels]
    assert result["loss"] == pytest.approx(float(losses.mean()), rel=1e-5)


def test_fewshot_uses_the_features(model, params, by_hand):
    output, test_labels = by_hand
    mesh = make_mesh(MeshConfig())
    config = FewshotConfig(
        DataConfig("digits", SPLIT), test_split=SPLIT, shots=(1, 3), seeds=2, batch_size=16
    )
    result = make_fewshot(config, model, mesh)(params)
    features = np.asarray(output.features)
    for shots in (1, 3):
        accuracies = []
        for seed in range(2):
            index = draw_shots(test_labels, shots, seed)
            predicted = least_squares(features[index], test_labels[index], features, 1024.0)
            accuracies.append(np.mean(predicted == test_labels))
        assert result[f"{shots}shot"] == pytest.approx(np.mean(accuracies), abs=1e-9)
    assert result.keys() == {"1shot", "1shot_std", "3shot", "3shot_std"}


@pytest.mark.parametrize(
    ("data", "batch_size", "message"),
    [
        (DataConfig("digits", "tset"), 8, "did you mean 'test'"),
        (DataConfig("digits", "test", "resise"), 8, "did you mean 'resize'"),
        (DataConfig("digits", "test", "flip"), 12, "12 does not divide over 8 devices"),
        (DataConfig("strokes/20", "validation"), 8, "has 20 classes, the model 10"),
    ],
)
def test_errors_come_before_training(model, data, batch_size, message):
    mesh = make_mesh(MeshConfig())
    with pytest.raises(ValueError, match=message):
        make_classification(ClassificationConfig(data, batch_size), model, mesh, LossConfig())
