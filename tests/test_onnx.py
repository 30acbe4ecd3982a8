"""An ONNX file computes what the model does, for any batch size, or isn't written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from vit_jax.models.stacking import stack_layers
from vit_jax.models.variants import ModelConfig, build_model
from vit_jax.weights import formats

SMALL = {"width": 32, "depth": 2, "mlp_dim": 64, "num_heads": 2}
VIT = {"variant": "ViT-mu/8", **SMALL}
RESNET = {"variant": "R26x1", "stages": (1, 1, 1, 1), "stem_width": 32}
SIZE = (32, 64)
MODELS = {
    "token": VIT,
    "gap": {**VIT, "pool": "gap", "position": "rotary"},
    "map": {**VIT, "pool": "map", "position": "sincos_2d", "mlp": "gelu"},
    "bfloat16": {**VIT, "dtype": "bfloat16", "representation_size": 24},
    "options": {**VIT, "registers": 2, "layer_scale": 0.1, "qk_norm": True, "mlp": "swiglu"},
    "clip": {**VIT, "pre_norm": True, "mlp": "quick_gelu", "mean": (0.4,) * 3, "std": (0.2,) * 3},
    "deit": {**VIT, "distillation": True, "layer_scale": 0.1, "pool": "token"},
    "dinov3": {
        **{**VIT, "position": "none", "rotary": "centred", "registers": 2, "qkv_bias": "qv"},
        "pool": "token+gap",
    },
    "eva02": {
        **{**VIT, "rotary": "axial", "rotary_reference": 3, "mlp": "swiglu", "mlp_norm": True},
        **{"attention_norm": True, "pool": "gap", "class_token": True, "final_norm": "pooled"},
    },
    "mixed": {**VIT, "position": "none", "rotary": "mixed", "pool": "map", "pool_heads": 4},
    "mixer": {"variant": "Mixer-S/16", "depth": 2, "width": 32, "mlp_dim": 64, "token_mlp_dim": 16},
    "hybrid": {"variant": "R50+ViT-mu/16", **SMALL, "stages": (1, 1, 1), "stem_width": 32},
    "resnet_v2": RESNET,
    "bit": {**RESNET, "zero_padded_pool": True},
    "resnet_v1": {**RESNET, "preactivation": False},
}


def make(fields, num_classes=5):
    """Returns the float32 model, random parameters, and the description of `fields`."""
    config = ModelConfig(**{**fields, "dtype": "float32"})
    model = build_model(config, num_classes, SIZE)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    params = jax.tree.map(lambda s: rng.normal(0, 0.3, s.shape).astype(np.float32), shapes)
    return model, params, {"model": fields, "num_classes": num_classes, "image_size": list(SIZE)}


def agree(path, model, params, names):
    """Asserts that the file's outputs equal the model's, for batches of 1 and 3."""
    ort = pytest.importorskip("onnxruntime")
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == names
    for batch in (1, 3):
        images = np.random.default_rng(batch).integers(0, 256, (batch, *SIZE, 3), np.uint8)
        expected = model.apply(params, images)
        for name, found in zip(names, session.run(None, {"images": images}), strict=True):
            assert found.dtype == np.float32
            np.testing.assert_allclose(found, getattr(expected, name), rtol=1e-4, atol=1e-4)
    return session


@pytest.mark.parametrize("name", MODELS)
def test_onnxruntime_computes_the_same(name, tmp_path):
    pytest.importorskip("jax2onnx")
    model, params, description = make(MODELS[name])
    description["class_names"] = ["a", "b", "c", "d", "e"]
    formats.write(tmp_path / "a.onnx", params, description, "onnx")
    session = agree(tmp_path / "a.onnx", model, params, ["logits", "features"])
    (images,) = session.get_inputs()
    assert (images.name, images.type, images.shape[1:]) == ("images", "tensor(uint8)", [*SIZE, 3])
    metadata = session.get_modelmeta().custom_metadata_map
    assert metadata["description"] == json.dumps(description)
    assert [file.name for file in tmp_path.iterdir()] == ["a.onnx"]


def test_scanned_layers_and_no_head(tmp_path):
    pytest.importorskip("jax2onnx")
    model, params, description = make(VIT, num_classes=0)
    description["model"] = {**VIT, "scan": True, "remat": "full"}
    formats.write(tmp_path / "a.onnx", stack_layers(params, 2), description, "onnx")
    agree(tmp_path / "a.onnx", model, params, ["features"])


def test_weights_too_large_for_one_file_lie_beside_it(tmp_path, monkeypatch):
    pytest.importorskip("jax2onnx")
    monkeypatch.setattr("vit_jax.weights.onnx.LARGEST", 1000)
    model, params, description = make(VIT)
    (tmp_path / "a.onnx.data").write_bytes(b"an earlier one")
    formats.write(tmp_path / "a.onnx", params, description, "onnx")
    graph, data = sorted(tmp_path.iterdir())
    assert (graph.name, data.name) == ("a.onnx", "a.onnx.data")
    assert data.stat().st_mode == graph.stat().st_mode
    agree(tmp_path / "a.onnx", model, params, ["logits", "features"])


@pytest.mark.parametrize("largest", [1000, 1 << 30])
def test_a_wrong_translation_is_not_kept(largest, tmp_path, monkeypatch):
    jax2onnx = pytest.importorskip("jax2onnx")
    translate = jax2onnx.to_onnx

    def wrongly(run, *args, **kwargs):
        return translate(lambda images: [1.01 * y for y in run(images)], *args, **kwargs)

    monkeypatch.setattr(jax2onnx, "to_onnx", wrongly)
    monkeypatch.setattr("vit_jax.weights.onnx.LARGEST", largest)
    _, params, description = make(VIT)
    earlier = {tmp_path / "a.onnx": b"an earlier one", tmp_path / "a.onnx.data": b"its weights"}
    for file, content in earlier.items():
        file.write_bytes(content)
    with pytest.raises(ValueError, match="logits that onnxruntime computes differ from ours by"):
        formats.write(tmp_path / "a.onnx", params, description, "onnx")
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == earlier


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    _, params, description = make(VIT)
    with pytest.raises(ValueError, match=r"a\.onnx: .*jax2onnx.*: pip install jax2onnx onnx"):
        formats.write(tmp_path / "a.onnx", params, description, "onnx")
    assert not list(tmp_path.iterdir())


EXPORT = """
import sys; sys.path.insert(0, "tests")
from test_onnx import MODELS, make
from vit_jax.weights.onnx import write_onnx
_, params, description = make(MODELS["mixer"])
write_onnx(sys.argv[1], params, description)
"""


def test_nothing_is_written_elsewhere(tmp_path):
    """onnxruntime would otherwise write a device identifier into the home folder."""
    pytest.importorskip("jax2onnx")
    home = tmp_path / "home"
    home.mkdir()
    environment = {k: v for k, v in os.environ.items() if k not in ("CI", "XDG_CACHE_HOME")}
    subprocess.run(
        [sys.executable, "-c", EXPORT, tmp_path / "model.onnx"],
        cwd=Path(__file__).parent.parent,
        env={**environment, "HOME": str(home)},
        check=True,
    )
    assert (tmp_path / "model.onnx").exists()
    assert not [path for path in home.rglob("*") if path.is_file()]
