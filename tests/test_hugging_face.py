"""Every model type of transformers that is read: the same features, written and read again.

Needs torch and transformers; tests/test_families.py holds what needs neither.
"""

import json
import math

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from test_pytorch import assert_identical, network, scramble

from vit_jax.weights import formats
from vit_jax.weights.adapt import flatten, unflatten
from vit_jax.weights.hugging_face import from_hugging_face

SIZES = {
    **{"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8},
    **{"intermediate_size": 96, "image_size": 32},
}
DINO = {k: v for k, v in SIZES.items() if k != "intermediate_size"}
TEXT = {
    **{"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50},
    **{"intermediate_size": 48, "bos_token_id": 1, "eos_token_id": 2},
}
CLASSES = {"num_labels": 7}
# Name -> (config class, its arguments, model class, the output that ours equals)
MODELS = {
    "vit": ("ViTConfig", {**SIZES, **CLASSES}, "ViTForImageClassification", "logits"),
    "masked": ("ViTConfig", SIZES, "ViTForMaskedImageModeling", None),
    "deit": ("DeiTConfig", {**SIZES, **CLASSES}, "DeiTForImageClassificationWithTeacher", "logits"),
    "deit_cls": ("DeiTConfig", {**SIZES, **CLASSES}, "DeiTForImageClassification", "logits"),
    "mae": ("ViTMAEConfig", {**SIZES, "mask_ratio": 0.0}, "ViTMAEModel", "cls"),
    "msn": ("ViTMSNConfig", {**SIZES, **CLASSES}, "ViTMSNForImageClassification", "logits"),
    "ijepa": ("IJepaConfig", {**SIZES, **CLASSES}, "IJepaForImageClassification", "logits"),
    "dinov2": ("Dinov2Config", {**DINO, **CLASSES}, "Dinov2ForImageClassification", "logits"),
    "dinov2_giant": ("Dinov2Config", {**DINO, "use_swiglu_ffn": True}, "Dinov2Model", "pooled"),
    "dinov2_reg": ("Dinov2WithRegistersConfig", DINO, "Dinov2WithRegistersModel", "pooled"),
    "dinov3": ("DINOv3ViTConfig", {**SIZES, "num_register_tokens": 4}, "DINOv3ViTModel", "pooled"),
    "dinov3_plus": (
        "DINOv3ViTConfig",
        {**SIZES, "num_register_tokens": 4, "use_gated_mlp": True, "hidden_act": "silu"},
        *("DINOv3ViTModel", "pooled"),
    ),
    "clip": ("CLIPVisionConfig", SIZES, "CLIPVisionModel", "pooled"),
    "clip_projection": (
        *("CLIPVisionConfig", {**SIZES, "projection_dim": 20}),
        *("CLIPVisionModelWithProjection", "image_embeds"),
    ),
    "clip_classes": (
        *("CLIPConfig", {"vision_config": SIZES, "text_config": TEXT, **CLASSES}),
        *("CLIPForImageClassification", "logits"),
    ),
    "siglip": ("SiglipVisionConfig", SIZES, "SiglipVisionModel", "pooled"),
    "siglip2": (
        "Siglip2VisionConfig",
        {**SIZES, "num_patches": 16, "image_size": None},
        *("Siglip2VisionModel", "pooled"),
    ),
    "siglip_towers": (
        *("SiglipConfig", {"vision_config": SIZES, "text_config": TEXT}),
        *("SiglipModel", None),
    ),
    "siglip_classes": (
        *("SiglipConfig", {"vision_config": SIZES, "text_config": TEXT, **CLASSES}),
        *("SiglipForImageClassification", "logits"),
    ),
}
# Positions of class tokens are added to these.
_MOVED = (
    *("cls_token", "distillation_token", "class_embedding", "position_embeddings"),
    *("position_embedding.weight", "register_tokens"),
)
NOT_WRITTEN = ("siglip2", "mae", "ijepa", "deit_cls", "clip_classes", "siglip_classes", "msn")


@pytest.fixture(scope="module")
def transformers():
    pytest.importorskip("torch")
    return pytest.importorskip("transformers")


def theirs(model, images, output, **options):
    import torch

    pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    if model.config.model_type == "siglip2_vision_model":  # takes patches
        shape = [side // 8 for side in images.shape[1:3]]
        pixels = pixels.unflatten(3, (-1, 8)).unflatten(2, (-1, 8)).permute(0, 2, 4, 3, 5, 1)
        pixels = pixels.reshape(len(images), math.prod(shape), -1)
        mask = torch.ones(pixels.shape[:2])
        shapes = torch.tensor([shape] * len(images))
        options = {"pixel_attention_mask": mask, "spatial_shapes": shapes}
    with torch.no_grad():
        found = model(pixels, **options)
    if output == "cls":
        return found.last_hidden_state[:, 0].numpy()
    return (found.pooler_output if output == "pooled" else found[output]).numpy()


def ours(params, description, images):
    with jax.default_matmul_precision("highest"):
        outputs = network(description).apply(unflatten(params), images)
    return np.asarray(outputs.logits if description["num_classes"] else outputs.features)


@pytest.mark.parametrize("kind", MODELS)
def test_features_of_transformers(kind, tmp_path, transformers):
    import torch

    config, arguments, model, output = MODELS[kind]
    built = getattr(transformers, model)(getattr(transformers, config)(**arguments))
    scramble(torch, built).save_pretrained(tmp_path / "theirs")
    params, description = formats.read(tmp_path / "theirs")
    params = flatten(params)
    images = np.random.default_rng(1).uniform(-1, 1, (2, 32, 32, 3)).astype(np.float32)
    found = ours(params, description, images)
    assert np.abs(found).max() > 0.1
    if output is not None:
        np.testing.assert_allclose(found, theirs(built, images, output), rtol=0, atol=2e-5)
        options = {} if "dinov" in kind else {"interpolate_pos_encoding": True}
        other = np.random.default_rng(2).uniform(-1, 1, (2, 48, 24, 3)).astype(np.float32)
        resized, described = formats.read(tmp_path / "theirs", (48, 24))
        np.testing.assert_allclose(
            ours(flatten(resized), described, other),
            theirs(built, other, output, **options),
            rtol=0,
            atol=2e-5,
        )
    state = {name: tensor.numpy() for name, tensor in built.state_dict().items()}
    files = {"config.json": json.loads((tmp_path / "theirs" / "config.json").read_text())}
    assert_identical(from_hugging_face(state, files)[0], params)  # names of this version

    if kind in NOT_WRITTEN:
        return
    formats.write(tmp_path / "ours", unflatten(params), description, "hugging_face")
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    again, report = getattr(transformers, written["architectures"][0]).from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    missing = {n for n in report["missing_keys"] if "mask_token" not in n and "pooler" not in n}
    assert not missing, report
    assert not report["unexpected_keys"] and not report["mismatched_keys"], report
    if output is not None:
        np.testing.assert_allclose(theirs(again.eval(), images, output), found, rtol=0, atol=2e-5)
    back, described = formats.read(tmp_path / "ours")
    assert_identical(flatten(back), params)
    assert network(described).module == network(description).module
    first = load_file(tmp_path / "theirs" / "model.safetensors")
    second = load_file(tmp_path / "ours" / "model.safetensors")
    for name, array in second.items():
        if not name.endswith(_MOVED):
            name = name if name in first else name.partition(".")[2]  # noqa: PLW2901
            name = name if name in first else f"vision_model.{name}"  # noqa: PLW2901
            assert name not in first or first[name].tobytes() == array.tobytes(), name
