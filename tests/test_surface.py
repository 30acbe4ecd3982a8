"""The public functions: `import vit_jax`, and what its names do."""

import dataclasses
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import matplotlib
import numpy as np
import pytest
from PIL import Image

import vit_jax
from vit_jax.config import build
from vit_jax.evaluation.registry import list_protocols
from vit_jax.training.recipe import TrainConfig
from vit_jax.weights.trained import FORMATS, TrainedModel

ROOT = Path(__file__).parent.parent
NOTEBOOKS = ROOT / "experiments/notebooks"


@pytest.fixture(scope="module")
def trained(model, params):
    """Returns a model with class names, preprocessing and a temperature."""
    return TrainedModel(model, params, tuple("0123456789"), "resize", 2.0)


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)


def test_the_import_is_light_and_commands_hide_no_function():
    code = (
        "import sys, vit_jax;"
        "heavy = {'jax', 'flax', 'numpy', 'absl'} & set(sys.modules); assert not heavy, heavy;"
        "from vit_jax import config, recipes; import vit_jax.pretrain;"
        "assert vit_jax.pretrain.__module__ == 'vit_jax.training.loop';"
        "assert set(vit_jax.__all__) <= set(dir(vit_jax));"
        "[getattr(vit_jax, name) for name in vit_jax.__all__];"
        "late = {'sklearn', 'tensorflow'} & set(sys.modules); assert not late, late"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        _ = vit_jax.lod


def test_outputs_are_the_networks_on_any_mesh(trained, model, params, pixels):
    from vit_jax.parallel.mesh import MeshConfig, make_mesh

    expected = jax.jit(model.apply)(params, pixels)
    one = make_mesh(MeshConfig(), jax.devices()[:1])
    for mesh in (None, one):
        np.testing.assert_allclose(trained.logits(pixels, mesh), expected.logits, atol=1e-5)
        np.testing.assert_allclose(trained.features(pixels, mesh), expected.features, atol=1e-5)
    np.testing.assert_allclose(
        trained.probabilities(pixels), jax.nn.softmax(expected.logits / 2.0), atol=1e-5
    )
    assert trained.logits(pixels[:0]).shape == (0, 10)


def test_other_images_are_refused_with_what_is_expected(trained, pixels):
    for images in (pixels[0], pixels[:, :4], pixels.astype(np.float32)):
        with pytest.raises(ValueError, match=r"expected uint8 \[B, 8, 8, 3\]"):
            trained.logits(images)
    headless = vit_jax.create_model("ViT-mu/8", 0, 8)
    with pytest.raises(ValueError, match="has no head"):
        headless.logits(pixels)
    assert headless.features(pixels).shape == (5, 32)


def test_predictions_of_files_bytes_and_pixels(trained, pixels, tmp_path):
    file = tmp_path / "a.png"
    Image.fromarray(pixels[0]).save(file)
    for image in (file, str(file), file.read_bytes(), pixels[0]):
        np.testing.assert_array_equal(trained.preprocess(image), pixels[0])
    good, bad = trained.predict([file, tmp_path / "missing.png"])
    assert good.label == "0123456789"[trained.logits(pixels[:1]).argmax()]
    assert [p for _, p in good.top(10)] == sorted(good.probabilities.tolist(), reverse=True)
    assert bad.probabilities is None and bad.label is None and "missing.png" in repr(bad)


def test_batches_have_one_shape(trained, pixels, tmp_path):
    """A smaller last batch or an unreadable image doesn't compile the network again."""
    files = [tmp_path / f"{i}.png" for i in range(5)]
    for file, image in zip(files, pixels, strict=True):
        Image.fromarray(image).save(file)
    model = dataclasses.replace(trained)  # without what was compiled for `trained`
    found = model.predict([*files, tmp_path / "missing.png"], batch_size=2)
    assert [bool(p.error) for p in found] == [False] * 5 + [True]
    assert model._forward._cache_size() == 1


@pytest.mark.parametrize("format", ["orbax", "npz", "timm"])
def test_what_is_saved_loads_equal(trained, pixels, tmp_path, format):
    path = tmp_path / ("model.npz" if format == "npz" else "model")
    model = dataclasses.replace(trained, temperature=1.0)
    model.save(path, format)
    again = vit_jax.load(path)
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
    if format != "timm":  # which doesn't tell the dtype that is computed in
        np.testing.assert_array_equal(again.logits(pixels), model.logits(pixels))
    assert again.class_names == model.class_names and again.image_size == (8, 8)
    with pytest.raises(ValueError, match="exists"):
        model.save(path, format)


def test_temperature_and_preprocessing_stay_with_the_model(trained, tmp_path):
    model = dataclasses.replace(trained, preprocessing="resize(12)|central_crop(0.7)")
    model.save(tmp_path / "model")
    again = vit_jax.load(tmp_path / "model")
    assert (again.temperature, again.preprocessing) == (2.0, model.preprocessing)


def test_what_does_not_exist_is_named_with_what_does(trained, tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a run's workdir"):
        vit_jax.load(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"Known: .*timm"):
        trained.save(tmp_path / "model", "keras")
    assert "onnx" in FORMATS
    with pytest.raises(ValueError, match=r"did you mean 'pretrain/paper'"):
        vit_jax.recipe("pretrain/papr")
    with pytest.raises(ValueError, match="did you mean 'ViT-B/16'"):
        vit_jax.create_model("ViT-Bx/16", 10)
    with pytest.raises(ValueError, match="unknown field of model 'depht': did you mean 'depth'"):
        vit_jax.create_model("ViT-mu/8", 10, 8, depht=1)
    with pytest.raises(ValueError, match="unknown protocol 'few-shot': did you mean 'fewshot'"):
        vit_jax.evaluate(trained, "digits", "few-shot")
    with pytest.raises(ValueError, match="unknown option of knn 'shots'"):
        vit_jax.evaluate(trained, "digits", "knn", shots=(1,))


def test_names_can_be_listed():
    assert "ViT-B/16" in vit_jax.list_models("*B/16*")
    assert vit_jax.list_recipes("transfer/p*") == ["transfer/paper"]
    assert "augreg:S/16" in vit_jax.list_checkpoints("*S/16")
    assert {"classification", "fewshot", "knn", "linear", "masked_patches"} == {*list_protocols()}


def executed(notebook, tmp_path, monkeypatch):
    """The names that a notebook's cells, run from top to bottom, leave."""
    cells = json.loads((NOTEBOOKS / notebook).read_text())["cells"]
    monkeypatch.setattr(tempfile, "mkdtemp", lambda: tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    names = {}
    with matplotlib.rc_context():
        for cell in cells:
            if cell["cell_type"] == "code":
                exec("".join(cell["source"]), names)
    return names


@pytest.mark.parametrize("notebook", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_are_clean_and_can_be_opened(notebook):
    """A badge for Colab, no output of somebody's machine."""
    cells = json.loads(notebook.read_text())["cells"]
    assert "colab.research.google.com" in "".join(cells[0]["source"])
    assert "".join(cells[0]["source"]).startswith("# ")
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)


@pytest.mark.long
def test_the_notebook(tmp_path, monkeypatch):
    """Recipes, training, transfer, predictions, measures, files."""
    names = executed("first_steps.ipynb", tmp_path, monkeypatch)
    run, found = names["pretrained"], names["head"]
    assert run.metrics["step"] == 12 and "<td>loss</td>" in run._repr_html_()
    assert names["transferred"].metrics["step"] == 10
    low, high = found["accuracy_interval"]
    assert found["examples"] == 100 and low <= found["accuracy"] <= high
    config = vit_jax.recipe("pretrain/formula:classes=10", batchsize=32)
    with pytest.raises(ValueError, match="did you mean 'batch_size'"):
        vit_jax.pretrain(config, tmp_path / "other")


@pytest.mark.long
def test_the_notebook_that_looks_inside(tmp_path, monkeypatch):
    names = executed("look_inside.ipynb", tmp_path, monkeypatch)
    assert names["pretrained"].metrics["step"] == names["steps"]
    assert {*names["pictures"]} == {"filters", "positions", "rollout", "attention_distance"}
    assert names["numbers"]["images"] == 8 and 0.1 < names["same_class"] <= 1


def test_the_notebook_of_the_papers_figures(tmp_path, monkeypatch):
    names = executed("paper_figures.ipynb", tmp_path, monkeypatch)
    assert len(names["figure_5"].axes) == 2 and names["figure_3"].axes and names["figure_4"].axes
    assert 1 < names["low"] < names["median"] < names["high"] < 10
    assert names["law"](4000) < names["law"](50)


def test_a_result_shows_its_report(tmp_path):
    (tmp_path / "report.html").write_text('<p>"a"</p>')
    shown = vit_jax.Trained(tmp_path, {})._repr_html_()
    assert 'srcdoc="&lt;p&gt;&quot;a&quot;&lt;/p&gt;"' in shown


def test_earlier_names_of_the_evaluators_still_work():
    data = {"dataset": "digits", "split": "test"}
    values = vit_jax.recipe("pretrain/formula").to_dict()
    values |= {"evaluators": {"a": {"data": data}}}
    new = build(TrainConfig, {**values, "evaluators": {
        "a": {"data": data}, "b": {"data": data, "protocol": "fewshot", "shots": (1,)},
    }})  # fmt: skip
    del values["evaluators"]
    old = {"classification": {"a": {"data": data}}, "fewshot": {"b": {"data": data, "shots": (1,)}}}
    assert build(TrainConfig, {**values, **old}) == new
    assert build(TrainConfig, dataclasses.asdict(new)) == new  # as config.json keeps it
    old["classification"] |= {"c": {"data": data}}
    stops = build(TrainConfig, {**values, **old, "early_stopping": 2, "eval_every": 1})
    assert stops.watched == "a/accuracy"  # as before, the first
    named = {"a": {"data": data}, "b": {"data": data}}
    several = {**values, "evaluators": named, "early_stopping": 2, "eval_every": 1}
    with pytest.raises(ValueError, match="set watch to one of a, b"):
        _ = build(TrainConfig, several).watched
    assert build(TrainConfig, {**several, "watch": "b"}).watched == "b/accuracy"
    with pytest.raises(ValueError, match="unknown evaluator to watch 'd'"):
        _ = build(TrainConfig, {**several, "watch": "d"}).watched
