"""The checkpoint in the package, and where it is the default."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from experiments.embedded import without_head, write
from vit_jax.classifier import workflow
from vit_jax.classifier.recipe import TransferConfig, choose_init, complete
from vit_jax.config import build
from vit_jax.models.variants import ModelConfig
from vit_jax.recipes import recipe
from vit_jax.weights.adapt import flatten
from vit_jax.weights.published import EMBEDDED, PUBLISHED, list_checkpoints
from vit_jax.weights.trained import create_model, load

FILE = Path(PUBLISHED[EMBEDDED])


def test_it_is_what_its_description_says():
    """Its bytes, its size, and the recipe that makes it again."""
    description = json.loads(FILE.with_suffix(".json").read_text())
    made = description["made"]
    assert hashlib.sha256(FILE.read_bytes()).hexdigest() == made["sha256"]
    assert FILE.stat().st_size <= 12e6
    assert {"recipe", "seed", "steps", "date", "jax"} <= made.keys()
    values = recipe(made["recipe"])
    assert (values.seed, values.steps) == (made["seed"], made["steps"])
    config = load(EMBEDDED).config
    assert build(ModelConfig, values.model.to_dict()).stages == config.stages
    assert values.model.stem_width == config.stem_width and "embedded" in list_checkpoints()


def test_it_gives_features():
    """Of images that differ, different ones."""
    model = load(EMBEDDED)
    images = np.random.default_rng(0).integers(0, 256, (2, *model.image_size, 3), np.uint8)
    features = model.features(images)
    assert features.shape == (2, 2 * (256 + 512 + 1024)) and np.isfinite(features).all()
    assert np.abs(features[0] - features[1]).max() > 1e-3
    with pytest.raises(ValueError, match="embedded has no head: transfer it to your classes"):
        model.predict([])


def test_what_is_written_is_read_back(tmp_path):
    """Without the head, rounded to bfloat16."""
    model = create_model("R26x1", 7, 16, stages=(1,), stem_width=32, dtype="float32")
    write(without_head(model), tmp_path / "small.npz", {"seed": 3})
    back = load(tmp_path / "small.npz")
    assert back.num_classes == 0 and "head" not in back.params
    for name, array in flatten(back.params).items():
        np.testing.assert_allclose(array, flatten(model.params)[name], rtol=2**-8)


def test_where_it_is_the_default(tmp_path, capsys):
    """On a CPU, if neither a checkpoint nor a model is named; "" still means random weights."""
    values = recipe("transfer/folder", **{"data.dataset": "digits"}).to_dict()
    assert choose_init(values) == EMBEDDED
    assert choose_init({**values, "init": "runs/mine"}) == "runs/mine"
    assert choose_init({**values, "model": {"variant": "ViT-mu/8"}}) == ""
    assert choose_init({"init": "", "data": {}}) == ""  # not a recipe with defaults
    config = build(TransferConfig, complete({**values, "init": EMBEDDED}, "cpu"))
    embedded = load(EMBEDDED)
    assert config.model.stages == embedded.config.stages
    assert (config.image_size,) * 2 == embedded.image_size
    assert complete(values, "cpu")["model"]["stem_width"] == 32  # random weights
    assert workflow._first_init("", values) == EMBEDDED
    assert "it starts from embedded" in capsys.readouterr().out
    # A run that an earlier version began goes on as it began.
    (tmp_path / workflow.SWEEP).write_text(json.dumps({"init": ""}))
    assert workflow._first_init(tmp_path, values) == ""
