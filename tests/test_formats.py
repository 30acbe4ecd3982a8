"""Every format gives back the same bits and the same model, also through the command."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import chex
import jax
import numpy as np
import pytest

from vit_jax.models.stacking import stack_layers
from vit_jax.models.variants import ModelConfig, build_model
from vit_jax.weights import files, formats
from vit_jax.weights.adapt import flatten
from vit_jax.weights.describe import describe
from vit_jax.weights.trained import TrainedModel, load

SMALL = {"width": 32, "depth": 2, "mlp_dim": 64, "num_heads": 2}
STEM = {"stages": (3, 4, 9), "stem_width": 64}
MODELS = {
    "token": {"variant": "ViT-mu/8", **SMALL},
    "pre_logits": {"variant": "ViT-mu/8", **SMALL, "representation_size": 24},
    "gap": {"variant": "ViT-mu/8", **SMALL, "pool": "gap"},
    "map": {"variant": "ViT-mu/8", **SMALL, "pool": "map"},
    "options": {"variant": "ViT-mu/8", **SMALL, "registers": 2, "layer_scale": 0.1},
    "hybrid": {"variant": "R50+ViT-mu/16", **SMALL, **STEM},
    "mixer": {"variant": "Mixer-S/16", "depth": 2},
    "bit": {"variant": "R50x1", "zero_padded_pool": True},
    "resnet_v2": {"variant": "R50x2"},
    "resnet_v1": {"variant": "R26x1", "stages": (1, 1, 1, 1), "preactivation": False},
}
CELLS = [
    *((name, "npz") for name in MODELS),
    *((name, "official") for name in ("token", "pre_logits", "gap", "map", "hybrid", "mixer")),
    ("bit", "bit"),
    ("resnet_v2", "timm"),
    *((name, "timm") for name in ("token", "gap", "map", "options", "hybrid", "bit")),
    ("token", "hugging_face"),
]


def make(name, image_size=(32, 32), num_classes=5):
    config = ModelConfig(**MODELS[name], dtype="float32")
    model = build_model(config, num_classes, image_size)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    params = jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32), shapes)
    described = {"model": MODELS[name], "num_classes": num_classes}
    return params, {**described, "image_size": [*image_size]}


def rebuild(description):
    """Builds the model of a description; the initial value of a layer scale no longer matters."""
    fields = {k: v for k, v in description["model"].items() if k != "layer_scale"}
    if "stages" in fields and fields["stages"] is not None:
        fields["stages"] = tuple(fields["stages"])
    config = ModelConfig(**fields)
    return build_model(config, description["num_classes"], tuple(description["image_size"]))


@pytest.mark.long
@pytest.mark.parametrize(("name", "format"), CELLS)
def test_round_trip(name, format, tmp_path):
    params, description = make(name)
    path = tmp_path / ("folder" if format in ("timm", "hugging_face") else "file.npz")
    formats.write(path, params, description, format)
    again, described = formats.read(path)
    chex.assert_trees_all_equal(again, params)
    chex.assert_tree_all_finite(again)
    theirs, ours = rebuild(described).config, rebuild(description).config
    if format in ("timm", "hugging_face"):  # whose files are resized as these libraries do
        ours = dataclasses.replace(ours, position_resize=theirs.position_resize)
    assert theirs == ours


@pytest.mark.long
@pytest.mark.parametrize(
    "name", [name for name in MODELS if name not in ("options", "map", "resnet_v2")]
)
def test_a_file_of_somebody_elses_is_described_by_its_shapes(name, tmp_path):
    params, description = make(name)
    formats.write(tmp_path / "file.npz", params, description, "npz")
    (tmp_path / "file.json").unlink()
    size = (32, 32) if "R" in MODELS[name]["variant"] else None
    again, described = formats.read(tmp_path / "file.npz", size)
    chex.assert_trees_all_equal(again, params)
    ours, theirs = rebuild(description), rebuild(described)
    shapes = [flatten(jax.eval_shape(m.init, jax.random.key(0))) for m in (ours, theirs)]
    assert shapes[0] == shapes[1]
    assert theirs.image_size == ours.image_size


@pytest.mark.parametrize(
    "variant", ["ViT-B/16", "ViT-So400m/14", "R50+ViT-L/16", "R+Ti/16", "R152x2", "Mixer-L/16"]
)
def test_published_variants_are_known_by_their_shapes(variant):
    config = ModelConfig(variant, zero_padded_pool=variant == "R152x2")  # as BiT's
    model = build_model(config, 1000, (224, 224))
    shapes = flatten(jax.eval_shape(model.init, jax.random.key(0)))
    found = describe(shapes)
    assert found["num_classes"] == 1000
    assert found["image_size"] == [224, 224]
    assert build_model(ModelConfig(**found["model"]), 1000, (224, 224)).module == model.module


def test_scanned_layers_are_written_unrolled(tmp_path):
    params, description = make("token")
    scanned = {**description, "model": {**description["model"], "scan": True}}
    formats.write(tmp_path / "a.npz", stack_layers(params, 2), scanned, "official")
    again, described = formats.read(tmp_path / "a.npz")
    chex.assert_trees_all_equal(again, params)
    assert not described["model"].get("scan")


@pytest.mark.parametrize(
    ("field", "value"),
    [("mlp", "gelu"), ("norm_epsilon", 1e-12), ("position", "rotary"), ("position_at", "shared")],
)
def test_official_files_hold_nothing_that_their_readers_would_not_see(field, value, tmp_path):
    params, description = make("token")
    description = {**description, "model": {**description["model"], field: value}}
    with pytest.raises(ValueError, match=f"official files can't store {field} = {value!r}"):
        formats.write(tmp_path / "a.npz", params, description, "official")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", ["timm", "hugging_face", "npz", "official"])
def test_an_export_that_is_broken_off_leaves_no_model(format, model, params, tmp_path, monkeypatch):
    """Killed before its weights are complete: nothing there is taken for a model."""

    def killed(*_):
        raise KeyboardInterrupt

    path = tmp_path / ("model" if format in ("timm", "hugging_face") else "model.npz")
    description = {**model.description, "class_names": list("0123456789")}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        for name in ("write_safetensors", "write_npz"):
            patch.setattr(files, name, killed)
        formats.write(path, params, description, format)
    assert not path.exists()
    formats.write(path, params, description, format)
    found, _ = formats.read(path)
    np.testing.assert_array_equal(found["head"]["kernel"], params["head"]["kernel"])


def test_headless_weights(tmp_path):
    params, description = make("token", num_classes=0)
    formats.write(tmp_path / "a.npz", params, description, "official")
    (tmp_path / "a.json").unlink()
    assert formats.read(tmp_path / "a.npz")[1]["num_classes"] == 0


def test_errors_name_the_file_and_what_is_wrong(tmp_path):
    params, description = make("token")
    path = tmp_path / "a.npz"
    del params["cls"]
    formats.write(path, params, description, "npz")
    with pytest.raises(ValueError, match=r"a\.npz: .*\n  cls: missing"):
        formats.read(path)
    np.savez(path, a=np.zeros(3))
    (tmp_path / "a.json").unlink()
    with pytest.raises(ValueError, match=r"a\.npz: no ViT, hybrid, ResNet or Mixer: .* \(a"):
        formats.read(path)
    params, description = make("token", (16, 48))
    formats.write(path, params, description, "npz")
    assert formats.read(path)[1]["image_size"] == [16, 48]
    (tmp_path / "a.json").unlink()
    with pytest.raises(ValueError, match="expected one of 12 patches of 8"):
        formats.read(path, (16, 16))
    assert formats.read(path, (16, 48))[1]["image_size"] == [16, 48]


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "vit_jax.convert", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent.parent,
    )


def test_command(tmp_path):
    """Our checkpoint -> Hugging Face -> ours, and what is said about it."""
    params, description = make("token")
    ours, exported, again = (str(tmp_path / name) for name in ("ours", "exported", "again"))
    TrainedModel.from_description(params, description).save(ours)
    done = command(f"--input={ours}", f"--output={exported}", "--format=hugging_face")
    assert done.returncode == 0, done.stderr
    assert "ViT-mu/8, 32x32 pixels, 5 classes" in done.stdout
    assert json.loads((tmp_path / "exported/config.json").read_text())["num_hidden_layers"] == 2
    done = command(f"--input={exported}", f"--output={again}")
    assert done.returncode == 0, done.stderr
    chex.assert_trees_all_equal(load(again).params, params)
    done = command(f"--input={exported}", f"--output={again}")
    assert done.returncode == 1
    assert "again exists: choose another path" in done.stderr
