"""Folders as other libraries save them: shards, wrappers' prefixes, no config, other files."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from vit_jax.weights.adapt import flatten
from vit_jax.weights.folders import INDEX, WEIGHTS, explain
from vit_jax.weights.trained import create_model, load


@pytest.fixture(scope="module")
def model():
    return create_model("ViT-nano/8", 5, 32, depth=2, mlp="gelu")


@pytest.fixture
def exported(model, tmp_path):
    model.save(tmp_path / "timm", format="timm")
    folder = tmp_path / "timm"
    return folder, load_file(folder / WEIGHTS), json.loads((folder / "config.json").read_text())


def assert_same(found, model):
    expected = flatten(model.params)
    for name, array in flatten(found.params).items():
        np.testing.assert_array_equal(array, np.asarray(expected[name]), name)


def test_shards(exported, model):
    folder, arrays, _ = exported
    names = sorted(arrays)
    files = {"model-1.safetensors": names[:7], "model-2.safetensors": names[7:]}
    for file, inside in files.items():
        save_file({name: arrays[name] for name in inside}, folder / file)
    (folder / WEIGHTS).unlink()
    weight_map = {name: file for file, inside in files.items() for name in inside}
    index = {"weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index))
    assert_same(load(folder), model)
    for changed, message in (
        ({"weight_map": {**weight_map, "x": "../secret.safetensors"}}, "no name of a .safetensors"),
        ({"weight_map": {**weight_map, "x": "model-1.safetensors"}}, "disagree on x"),
        ({"weight_map": []}, "expected a weight_map"),
    ):
        (folder / INDEX).write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=message):
            load(folder)
    (folder / "model-2.safetensors").unlink()
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"model-2\.safetensors, which is not there"):
        load(folder)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.module.", "vit.", "ema.backbone."])
def test_prefixes_of_wrappers(exported, model, prefix):
    folder, arrays, _ = exported
    save_file({prefix + name: array for name, array in arrays.items()}, folder / WEIGHTS)
    found = load(folder)
    assert_same(found, model)
    assert found.notes == (f"took {prefix!r} off the names of all tensors",)
    half = {(prefix if "blocks" in name else "") + name: a for name, a in arrays.items()}
    save_file(half, folder / WEIGHTS)
    with pytest.raises(ValueError, match="not expected"):
        load(folder)


def test_what_is_stated_is_compared(exported):
    folder, _, config = exported
    for arguments, message in (
        ({"depth": 3}, "depth = 3 where the tensors have 2"),
        ({"embed_dim": 192}, "embed_dim = 192 where the tensors have 96"),
        ({"reg_tokens": 1}, "reg_tokens = 1 where the tensors have 0"),
        ({"num_classes": 6}, "num_classes = 6 where the tensors have 5"),
        ({"mlp_ratio": 4.0}, "the MLP's width = 384 where the tensors have 192"),
        ({"in_chans": 1}, "unsupported in_chans = 1: expected 3"),
        ({"block_fn": "x"}, "unsupported block_fn"),
    ):
        changed = {**config, "model_args": {**config["model_args"], **arguments}}
        (folder / "config.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=message):
            load(folder)
    neutral = {"in_chans": 3, "num_classes": 5, "drop_rate": 0.1, "block_fn": None}
    changed = {**config, "model_args": {**config["model_args"], **neutral}}
    (folder / "config.json").write_text(json.dumps(changed))
    assert load(folder).num_classes == 5
    assert load(folder, (64, 48)).image_size == (64, 48)
    with pytest.raises(ValueError, match="64x60 is not a multiple of the patch"):
        load(folder, (64, 60))


def test_a_state_dict_alone_needs_its_variant(exported):
    folder, _, _ = exported
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"--variant=ViT-B/16 .* and --image_size"):
        load(folder)
    with pytest.raises(ValueError, match="depth = 4 where the tensors have 2"):
        load(folder, (32, 32), "ViT-nano/8")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pytorch_model.bin", "a pickle of PyTorch"),
        ("last.pth", "a pickle of PyTorch"),
        ("model.keras", "Keras weights"),
        ("adapter_model.safetensors", "a LoRA adapter"),
        ("saved_model.pb", "a TensorFlow SavedModel"),
        ("ckpt-7.index", "a TensorFlow checkpoint"),
        ("model.onnx", "compiled or quantised"),
        ("_METADATA", "an Orbax checkpoint of another program"),
        ("open_clip.safetensors", "give the file's path"),
    ],
)
def test_what_is_there_is_said(tmp_path, name, message):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match=message):
        load(tmp_path)


def test_a_name_on_the_hub():
    assert "give hf:google/vit-base-patch16-224" in explain("google/vit-base-patch16-224")
    assert "give hf:a/b@main" in explain("huggingface.co/a/b@main")
    assert "hf:" not in explain("/no/such/folder")
