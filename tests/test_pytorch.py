"""Weights for and from PyTorch's ecosystems: names, shapes, round trips, and the same logits.

The tests of logits need packages that vit_jax doesn't, and are skipped without them:

    pip install torch transformers        # and, for timm's: pip install timm
    python -m pytest tests/test_pytorch.py
"""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from vit_jax.config import build
from vit_jax.models.stacking import stack_layers
from vit_jax.models.variants import ModelConfig, build_model, normalize
from vit_jax.weights.adapt import flatten, unflatten
from vit_jax.weights.hugging_face import from_hugging_face, to_hugging_face
from vit_jax.weights.pytorch import checked
from vit_jax.weights.timm import from_timm, to_timm
from vit_jax.weights.timm_architectures import architecture

VIT = {"variant": "ViT-nano/8", "depth": 2}
MODELS = {
    "token": VIT,
    "gelu": {**VIT, "mlp": "gelu", "mlp_dim": 100},
    "named": {"variant": "ViT-Ti/16"},
    "gap": {**VIT, "pool": "gap"},
    "map": {**VIT, "pool": "map", "registers": 2},
    "options": {**VIT, "registers": 3, "layer_scale": 1e-5, "qk_norm": True},
    "clip": {**VIT, "pre_norm": True, "mlp": "quick_gelu", "norm_epsilon": 1e-5},
    "distilled": {**VIT, "distillation": True},
    "mae": {**VIT, "pool": "gap", "class_token": True, "final_norm": "pooled"},
    "no_norm": {**VIT, "final_norm": "none", "qkv_bias": ""},
    "gated": {**VIT, "mlp": "swiglu", "layer_scale": 0.1, "registers": 1},
    "dinov3": {
        **{**VIT, "position": "none", "rotary": "centred", "registers": 4, "norm_epsilon": 1e-5},
        **{"mlp": "swiglu", "qkv_bias": "qv", "layer_scale": 0.1},
    },
    "eva02": {
        **{**VIT, "rotary": "axial", "rotary_base": 1e4, "rotary_reference": 16, "mlp": "swiglu"},
        **{"mlp_norm": True, "attention_norm": True, "qkv_bias": "qv"},
    },
    "perception": {
        **{**VIT, "rotary": "axial", "rotary_offset": 1.0, "pre_norm": True, "norm_epsilon": 1e-5},
        **{"pool": "map", "class_token": True, "pool_heads": 2, "pool_mlp_dim": 96, "mlp": "gelu"},
    },
    "mixed": {**VIT, "position": "none", "rotary": "mixed", "mlp": "gelu"},
    "parallel": {
        **{**VIT, "parallel": True, "qk_norm": True, "qkv_bias": "", "pre_norm": True},
        "mlp": "gelu",
    },
    "root": {"variant": "R+ViT-nano/16", "depth": 2},
    "hybrid": {"variant": "R26+ViT-nano/32", "depth": 1},
    "bit": {"variant": "R50x1", "stem_width": 32, "zero_padded_pool": True},
    "mixer": {"variant": "Mixer-S/16", "token_mlp_dim": 40, "mlp": "gelu"},
}
HUGGING_FACE = ("token", "gelu", "named")
# Standard deviations that make differences show. Standardised kernels have no scale: at much
# smaller ones timm's other epsilon would show (see `to_timm`).
SCALES = {
    "kernel": 0.1,
    "rotary_frequencies": 1.0,
    "cls": 0.5,
    "pos_embedding": 0.5,
    "registers": 0.5,
    "probe": 0.5,
}
STANDARDISED = 0.3


def describe(model, size=(32, 64), num_classes=5):
    return {"model": model, "num_classes": num_classes, "image_size": list(size)}


def network(description):
    config = build(ModelConfig, {**description["model"], "dtype": "float32"})
    return build_model(config, description["num_classes"], tuple(description["image_size"]))


def weights(description, seed=0):
    shapes = flatten(jax.eval_shape(lambda: network(description).init(jax.random.key(0))))
    rng = np.random.default_rng(seed)
    params = {}
    for name, shape in sorted(shapes.items()):
        last = name.split("/")[-1]
        mean = float(last == "scale")
        spread = STANDARDISED if "conv" in name else SCALES.get(last, 0.2)
        params[name] = (mean + spread * rng.normal(size=shape.shape)).astype(np.float32)
    return params


def case(kind):
    size = (64, 64) if kind == "hybrid" else (32, 64)
    description = describe(MODELS[kind], size)
    return weights(description), description


def pixels(description, count=3):
    shape = (count, *description["image_size"], 3)
    return np.random.default_rng(1).uniform(-1, 1, shape).astype(np.float32)


def ours(params, description, images):
    """Returns logits and features of our model."""
    with jax.default_matmul_precision("highest"):
        return jax.device_get(network(description).apply(unflatten(params), images))


def assert_identical(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype == np.float32
        assert a[name].tobytes() == b[name].tobytes(), name
        assert a[name].shape == b[name].shape


@pytest.mark.long
@pytest.mark.parametrize("kind", MODELS)
def test_timm_and_back_loses_nothing(kind):
    params, description = case(kind)
    arrays, files = to_timm(params, description)
    back, described = from_timm(arrays, json.loads(json.dumps(files)))
    assert_identical(back, params)
    assert network(described).module == network(description).module
    assert described["num_classes"] == 5 and described["image_size"] == description["image_size"]


@pytest.mark.parametrize("kind", HUGGING_FACE)
def test_hugging_face_and_back_loses_nothing(kind):
    params, description = case(kind)
    arrays, files = to_hugging_face(params, {**description, "class_names": list("abcde")})
    back, described = from_hugging_face(arrays, json.loads(json.dumps(files)))
    assert_identical(back, params)
    assert network(described).module == network(description).module
    expected = {**description, "class_names": list("abcde")}
    expected["preprocess"] = "resize('bilinear_antialias')"
    assert described == {**expected, "model": described["model"]}


def test_hugging_face_names_and_layouts():
    """Names as in google/vit-base-patch16-224's file, however transformers calls its modules."""
    params, description = case("token")
    arrays, files = to_hugging_face(params, description)
    shapes = {name: array.shape for name, array in arrays.items()}
    layer = "vit.encoder.layer.1."
    assert shapes["vit.embeddings.cls_token"] == (1, 1, 96)
    assert shapes["vit.embeddings.position_embeddings"] == (1, 1 + 32, 96)
    assert shapes["vit.embeddings.patch_embeddings.projection.weight"] == (96, 3, 8, 8)
    assert shapes[f"{layer}intermediate.dense.weight"] == (192, 96)
    assert shapes[f"{layer}output.dense.weight"] == (96, 192)
    assert shapes["classifier.weight"] == (5, 96)
    assert len(shapes) == 4 + 2 * 16 + 4
    for part in ("attention.attention.query", "attention.output.dense", "layernorm_before"):
        assert shapes[f"{layer}{part}.bias"] == (96,)
    kernel = params["Transformer/encoderblock_1/MultiHeadDotProductAttention_0/key/kernel"]
    theirs = arrays[f"{layer}attention.attention.key.weight"]
    np.testing.assert_array_equal(theirs[32:64], kernel[:, 1].T)  # rows of the second head
    assert all(array.flags.c_contiguous for array in arrays.values())

    config = files["config.json"]
    assert config["hidden_act"] == "gelu_pytorch_tanh" and config["layer_norm_eps"] == 1e-6
    assert config["image_size"] == [32, 64] and config["num_attention_heads"] == 3
    assert config["id2label"]["4"] == "LABEL_4"
    assert files["preprocessor_config.json"]["size"] == {"height": 32, "width": 64}


def test_hugging_face_names_of_transformers_5():
    params, description = case("token")
    arrays, files = to_hugging_face(params, description)
    renames = {
        "vit.encoder.layer.": "vit.layers.",
        "attention.attention.query": "attention.q_proj",
        "attention.attention.key": "attention.k_proj",
        "attention.attention.value": "attention.v_proj",
        "attention.output.dense": "attention.o_proj",
        "intermediate.dense": "mlp.fc1",
        "output.dense": "mlp.fc2",
    }
    renamed = arrays
    for published, new in renames.items():
        renamed = {name.replace(published, new): array for name, array in renamed.items()}
    assert "vit.layers.1.attention.o_proj.weight" in renamed
    assert_identical(from_hugging_face(renamed, files)[0], params)


def test_a_bare_hugging_face_vit_has_pre_logits_and_no_head():
    params, description = case("token")
    arrays, files = to_hugging_face(params, description)
    rng = np.random.default_rng(0)
    bare = {n.removeprefix("vit."): a for n, a in arrays.items() if not n.startswith("classifier")}
    pooler = {"pooler.dense.weight": rng.normal(size=(70, 96)), "pooler.dense.bias": np.ones(70)}
    back, described = from_hugging_face(bare, files)
    assert described["num_classes"] == 0
    assert back.keys() == params.keys() - {"head/kernel", "head/bias"}
    back, described = from_hugging_face(bare | pooler, files)
    assert described["model"]["representation_size"] == 70
    assert back["pre_logits/kernel"].shape == (96, 70)
    with pytest.raises(ValueError, match=r"vit\.pooler\.dense\.bias: not expected"):
        from_hugging_face(arrays | pooler, files)


def test_timm_names_and_layouts():
    params, description = case("options")
    arrays, files = to_timm(params, description)
    shapes = {name: array.shape for name, array in arrays.items()}
    assert shapes["pos_embed"] == (1, 1 + 3 + 32, 96) and shapes["reg_token"] == (1, 3, 96)
    assert shapes["blocks.1.attn.qkv.weight"] == (3 * 96, 96)
    assert shapes["blocks.1.attn.q_norm.weight"] == shapes["blocks.1.attn.q_norm.bias"] == (32,)
    assert shapes["blocks.1.ls2.gamma"] == shapes["norm.bias"] == (96,)
    assert not arrays["pos_embed"][:, :4].any()
    kernel = params["Transformer/encoderblock_1/MultiHeadDotProductAttention_0/value/kernel"]
    np.testing.assert_array_equal(
        arrays["blocks.1.attn.qkv.weight"][2 * 96 :], kernel.reshape(96, 96).T
    )
    assert files["config.json"]["model_args"] == {
        **{"img_size": [32, 64], "patch_size": 8, "embed_dim": 96, "depth": 2, "num_heads": 3},
        **{"mlp_ratio": 2.0, "act_layer": "gelu_tanh", "reg_tokens": 3, "init_values": 1e-5},
        "qk_norm": True,
    }
    arrays["blocks.1.attn.q_norm.bias"][3] = 1
    with pytest.raises(ValueError, match=r"q_norm\.bias is not zero"):
        from_timm(arrays, files)


@pytest.mark.parametrize(
    ("variant", "architecture"),
    [
        ("ViT-Ti/16", "vit_tiny_patch16_224"),
        ("ViT-S/32", "vit_small_patch32_224"),
        ("ViT-Ti/14", "vit_base_patch16_224"),  # which model_args make another
        ("R+Ti/16", "vit_tiny_r_s16_p8_224"),
        ("Mixer-S/32", "mixer_s32_224"),
        ("R50x1", "resnetv2_50x1_bit"),
    ],
)
def test_timm_architectures(variant, architecture):
    options = {"mlp": "gelu"} if variant.startswith("Mixer") else {}
    description = describe({"variant": variant, **options}, (224, 224), 2)
    shapes = flatten(jax.eval_shape(lambda: network(description).init(jax.random.key(0))))
    params = {name: np.broadcast_to(np.float32(0), s.shape) for name, s in shapes.items()}
    arrays, files = to_timm(params, description)
    assert files["config.json"]["architecture"] == architecture
    assert from_timm(arrays, files)[1]["model"]["variant"] == variant.replace("+T", "+ViT-T")


def test_heads_and_activation_of_published_timm_models():
    """timm's config.json tells the architecture alone."""
    for name, heads, activation, pool in (
        ("vit_small_patch16_224.augreg_in21k", 6, "gelu", "token"),
        ("vit_base_patch32_siglip_256", 12, "gelu_tanh", "map"),
        ("vit_large_patch16_siglip_256", 16, "gelu", "map"),
    ):
        description = describe({**VIT, "pool": pool})
        params = weights(description)
        arrays, _ = to_timm(params, description)
        pretrained = {"input_size": [3, 32, 64], "mean": [0.5] * 3, "std": [0.5] * 3}
        config = {"architecture": name, "pretrained_cfg": pretrained}
        with pytest.raises(ValueError, match=r"depth = .* where the tensors have 2"):
            from_timm(arrays, {"config.json": config})
        sizes = {"embed_dim": 96, "depth": 2, "mlp_ratio": 2, "patch_size": 8}
        config["model_args"] = {**sizes, "num_heads": heads}
        _, described = from_timm(arrays, {"config.json": config})
        assert network(described).config.num_heads == heads
        assert described["model"]["mlp"] == activation
    for name in ("vit_base_patch16_rpn_224", "vit_base_patch16_18x2_224", "resnet50"):
        with pytest.raises(ValueError, match=f"unknown timm architecture '{name}'"):
            from_timm(arrays, {"config.json": {**config, "architecture": name}})
    with pytest.raises(ValueError, match=r"no config\.json"):
        from_timm(arrays, {})


@pytest.mark.parametrize("export", [to_timm, to_hugging_face])
def test_scanned_layers_are_taken_apart(export):
    params, description = case("token")
    scanned = flatten(jax.device_get(stack_layers(unflatten(params), 2)))
    arrays, files = export(scanned, describe({**VIT, "scan": True}))
    expected, files_of_loop = export(params, description)
    assert_identical(arrays, expected)
    assert files == files_of_loop


def test_what_a_class_slot_holds_is_added_to_the_token():
    params, description = case("options")
    arrays, files = to_timm(params, description)
    slots = np.random.default_rng(0).normal(size=(1, 4, 96)).astype(np.float32)
    arrays["pos_embed"][:, :4] = slots
    back, _ = from_timm(arrays, files)
    expected = {
        "cls": params["cls"] + slots[:, :1],
        "registers": params["registers"] + slots[:, 1:],
    }
    assert_identical(back, params | expected)
    arrays["pos_embed"] = arrays["pos_embed"][:, 4:]  # as timm's `no_embed_class`
    assert_identical(from_timm(arrays, files)[0], params)
    arrays["pos_embed"] = arrays["pos_embed"][:, 1:]
    with pytest.raises(ValueError, match=r"\(1, 31, 96\) don't fit 32 patches and 4 other"):
        from_timm(arrays, files)


@pytest.mark.parametrize("position", ["none", "sincos_2d"])
def test_positions_without_parameters_are_written_out(position):
    fixed = describe({**VIT, "position": position})
    params = weights(fixed)
    back, learned = from_timm(*to_timm(params, fixed))
    images = pixels(fixed)
    np.testing.assert_array_equal(
        ours(back, learned, images).logits, ours(params, fixed, images).logits
    )


def test_other_standardisation_of_pixels_is_kept():
    description = describe(VIT)
    params, images = weights(description), pixels(description)
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    theirs = ((images + 1) / 2 - np.float32(mean)) / np.float32(std)
    standardised = describe({**VIT, "mean": mean, "std": std})
    np.testing.assert_allclose(
        ours(params, standardised, images).logits,
        ours(params, description, theirs).logits,
        atol=2e-5,
    )
    for export, read in ((to_hugging_face, from_hugging_face), (to_timm, from_timm)):
        back, described = read(*export(params, standardised))
        assert_identical(back, params)
        theirs = network(described).config
        kept = dataclasses.replace(
            network(standardised).config, position_resize=theirs.position_resize
        )
        assert theirs == kept
    root = describe({**MODELS["root"], "mean": mean, "std": std})
    _, described = from_timm(*to_timm(weights(root), root))
    assert described["model"]["mean"] == mean


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool": "gap"}, r"ViTForImageClassification can't hold this model: pool = 'gap'"),
        ({"representation_size": 9}, "representation_size = 9"),
        ({"registers": 1}, "registers = 1"),
        (
            {"layer_scale": 1.0},
            "Dinov2ForImageClassification can't hold this model: pool = 'token'",
        ),
        ({"qk_norm": True}, "qk_norm = True"),
        ({"mlp": "swiglu"}, "mlp = 'swiglu'"),
        ({"pre_norm": True}, r"(?s)CLIPVisionModelWithProjection can't hold.*head/bias"),
        ({"pool": "map"}, "SiglipVisionModel has no classifier"),
        ({"rotary": "mixed", "position": "none"}, "rotary = 'mixed'"),
        ({"rotary": "centred", "position": "none"}, "DINOv3ViTModel has no classifier"),
        ({"parallel": True}, "parallel = True, not False"),
        ({"position": "relative"}, "position = 'relative', not 'learned_1d' or"),
        ({"position": "rotary"}, "position = 'rotary'"),
        ({"position": "learned_2d"}, "position = 'learned_2d'"),
        ({"position_at": "layers"}, "position_at = 'layers', not 'stem'"),
    ],
)
def test_what_hugging_face_cannot_hold(options, message):
    description = describe({**VIT, **options})
    with pytest.raises(ValueError, match=message):
        to_hugging_face(weights(description), description)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({**VIT, "representation_size": 9}, "pre_logits/bias: not expected"),
        ({**VIT, "pool": "token+gap"}, r"pool = 'token\+gap'"),
        ({**VIT, "rotary": "axial", "mlp": "gelu_tanh"}, "mlp = 'gelu_tanh' beside its other"),
        ({**VIT, "position": "relative"}, "position = 'relative'"),
        ({**VIT, "norm_epsilon": 1e-12}, "norm_epsilon = 1e-12, timm's is 1e-6"),
        ({**VIT, "pool": "map", "qk_norm": True}, "MAPHead_0/.*key_norm/scale: not expected"),
        ({"variant": "R50x1", "preactivation": False}, "gn_root/scale: not expected"),
        ({"variant": "R26x1"}, r"no BiT ResNet with stages \(2, 2, 2, 2\)"),
        ({"variant": "R+ViT-nano/16", "stem_width": 32}, "and a root 32 wide"),
        ({"variant": "Mixer-S/16"}, "timm's Mixers have the exact 'gelu'"),
        ({"variant": "Mixer-S/8", "mlp": "gelu"}, "no Mixer of width 512, depth 8 and patch 8"),
    ],
)
def test_what_timm_cannot_hold(model, message):
    description = describe(model)
    with pytest.raises(ValueError, match=message):
        to_timm(weights(description), description)


def test_broken_state_dicts():
    params, description = case("token")
    arrays, files = to_timm(params, description)

    def read(changed, **arguments):
        config = files["config.json"]
        config = {**config, "model_args": {**config["model_args"], **arguments}}
        return from_timm({n: a for n, a in (arrays | changed).items() if a is not None},
                         {"config.json": config})  # fmt: skip

    with pytest.raises(ValueError, match=r"(?s)decoder\.weight: not expected.*norm\.bias: missing"):
        read({"norm.bias": None, "decoder.weight": np.ones(3)})
    shaped = read({"blocks.1.mlp.fc1.weight": np.ones((191, 96), np.float32)})
    with pytest.raises(ValueError, match=r"Dense_0/kernel: \(96, 191\), expected \(96, 192\)"):
        checked(*shaped)
    with pytest.raises(ValueError, match=r"attn\.q\.weight \(96, 96\): not the shape.*5 heads"):
        read({}, num_heads=5)
    with pytest.raises(ValueError, match=r"patch_embed\.proj\.weight \(3,\): not the shape"):
        read({"patch_embed.proj.weight": np.ones(3)})
    with pytest.raises(ValueError, match=r"model_args of config\.json has unsupported block_fn"):
        read({}, block_fn="ParallelScalingBlock")
    with pytest.raises(
        ValueError, match=r"fc_norm \(of global_pool = 'avg'\) = True where the tensors have False"
    ):
        read({}, global_pool="avg")
    with pytest.raises(ValueError, match="the weights don't fit ViT-nano/8 as described"):
        to_timm(params, describe({**VIT, "depth": 3}))
    with pytest.raises(ValueError, match="4 class names for 5 classes"):
        to_timm(params, {**description, "class_names": list("abcd")})

    arrays, files = to_hugging_face(params, description)
    for change, message in (
        ({"model_type": "deit"}, "not a Hugging Face deit that can be read"),
        ({"hidden_act": "relu"}, "unknown hidden_act .*'relu'"),
        ({"image_size": 64}, "don't fit 64 patches and 1 other"),
        ({"num_attention_heads": 7}, "with 7 heads"),
    ):
        with pytest.raises(ValueError, match=message):
            from_hugging_face(arrays, {"config.json": {**files["config.json"], **change}})
    unscaled = {**files, "preprocessor_config.json": {"do_rescale": False}}
    with pytest.raises(ValueError, match="does not scale pixels by 1/255"):
        from_hugging_face(arrays, unscaled)


def write(folder, arrays, files):
    save_file(arrays, folder / "model.safetensors", {"format": "pt"})
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))


def read(folder):
    files = {path.name: json.loads(path.read_text()) for path in folder.glob("*.json")}
    return load_file(folder / "model.safetensors"), files


def compare(theirs, expected, atol=1e-4):
    """Asserts that logits and features agree and are of order 1, so that differences show."""
    for a, b in zip(theirs[:2], expected[:2], strict=True):
        assert 0.1 < np.abs(b).max() < 10
        np.testing.assert_allclose(a, b, rtol=0, atol=atol)


def scramble(torch, model):
    """Random weights, as `weights` draws them."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            spread = 0.2
            if tensor.ndim in (2, 4):
                spread = STANDARDISED if "conv" in name else tensor[0].numel() ** -0.5
            is_scale = tensor.ndim == 1 and name.endswith("weight")
            tensor.copy_(spread * torch.randn(tensor.shape) + float(is_scale))
    return model.eval()


def run_hugging_face(torch, model, images):
    assert not model.training
    with torch.no_grad():
        inputs = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
        return model(inputs).logits.numpy(), model.vit(inputs).last_hidden_state[:, 0].numpy()


@pytest.mark.parametrize("kind", HUGGING_FACE)
def test_transformers_computes_our_logits(kind, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    params, description = case(kind)
    write(tmp_path, *to_hugging_face(params, description))
    model, report = transformers.ViTForImageClassification.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(report.values()), report
    images = pixels(description)
    theirs = run_hugging_face(torch, model, images)
    compare(theirs, ours(params, description, images), atol=1e-5)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    photo = np.random.default_rng(2).integers(0, 256, (32, 64, 3), np.uint8)
    processed = processor(photo, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    np.testing.assert_allclose(processed, normalize(photo), atol=1e-6)


@pytest.mark.parametrize("activation", ["gelu", "gelu_new"])
def test_we_compute_the_logits_of_transformers(activation, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        **{"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_labels": 7},
        **{"intermediate_size": 96, "image_size": 48, "patch_size": 16, "hidden_act": activation},
    )
    model = scramble(torch, transformers.ViTForImageClassification(config))
    model.save_pretrained(tmp_path)
    params, description = from_hugging_face(*read(tmp_path))
    images = pixels(description)
    theirs = run_hugging_face(torch, model, images)
    compare(ours(params, description, images), theirs, atol=1e-5)
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    assert_identical(from_hugging_face(state, read(tmp_path)[1])[0], params)  # newer names


def run_timm(torch, model, images):
    model = model.eval()
    with torch.no_grad():
        inputs = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
        features = model.forward_head(model.forward_features(inputs), pre_logits=True)
        return model(inputs).numpy(), features.numpy()


@pytest.mark.parametrize("kind", MODELS)
def test_timm_computes_our_logits(kind, tmp_path):
    torch, timm = pytest.importorskip("torch"), pytest.importorskip("timm")
    params, description = case(kind)
    arrays, files = to_timm(params, description)
    write(tmp_path, arrays, files)
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert {n: t.shape for n, t in model.state_dict().items()} == {
        n: a.shape for n, a in arrays.items()
    }
    images = pixels(description)
    compare(run_timm(torch, model, images), ours(params, description, images))


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("vit_tiny_patch16_224", {"img_size": 32, "depth": 2}),
        ("vit_tiny_patch16_224", {"img_size": 32, "depth": 2, "num_heads": 6, "reg_tokens": 2}),
        ("vit_base_patch32_siglip_256", {"img_size": 64, "depth": 1}),
        ("vit_tiny_r_s16_p8_224", {"img_size": 64, "depth": 1}),
        ("mixer_s32_224", {"img_size": 64}),
        ("resnetv2_50x1_bit", {}),
    ],
)
def test_we_compute_the_logits_of_timm(architecture, options, tmp_path):
    torch, timm = pytest.importorskip("torch"), pytest.importorskip("timm")
    model = scramble(torch, timm.create_model(architecture, num_classes=7, **options))
    config = {
        **{"architecture": architecture, "model_args": options},
        "pretrained_cfg": {"input_size": (3, 64, 64), "mean": (0.5,) * 3, "std": (0.5,) * 3},
    }
    arrays = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    params, description = from_timm(arrays, {"config.json": config})
    assert description["num_classes"] == 7
    images = pixels(description)
    compare(ours(params, description, images), run_timm(torch, model, images))
    exported, _ = to_timm(params, description)
    model.load_state_dict({n: torch.from_numpy(a) for n, a in exported.items()}, strict=True)
    compare(ours(params, description, images), run_timm(torch, model, images))


def test_architectures_read_are_timms_plain_blocks():
    """For every timm name that is read, timm builds the architecture that is assumed."""
    torch, timm = pytest.importorskip("torch"), pytest.importorskip("timm")
    names = [name for name in timm.list_models() if (name, architecture(name))[1] is not None]
    assert len(names) > 210
    activations = {"GELU": "gelu", "QuickGELU": "quick_gelu", "GELUTanh": "gelu_tanh"}
    for name in names:
        known = architecture(name)
        with torch.device("meta"):
            model = timm.create_model(name)
        tensors, block = model.state_dict(), model.blocks[0]
        assert known.parallel == (type(block).__name__ == "ParallelScalingBlock"), name
        if known.parallel:
            sizes = (model.embed_dim, len(model.blocks), len(block.mlp_bias), block.num_heads)
            assert (sizes, known.patch) == (known[:4], model.patch_embed.patch_size[0]), name
            continue
        mlp = block.mlp
        assert type(model).__name__ == "Eva" if known.eva else "VisionTransformer", name
        assert type(block).__name__ == ("EvaBlock" if known.eva else "Block"), name
        sizes = (model.embed_dim, len(model.blocks), mlp.fc2.in_features, block.attn.num_heads)
        assert sizes == known[:4], name
        assert block.norm1.eps == known.options.get("epsilon", 1e-6), name
        activation = activations.get(type(mlp.act).__name__, "gelu")
        assert activation == known.options.get("act_layer", "gelu"), name
        registers = tensors.get("reg_token")
        assert known.registers == (0 if registers is None else registers.shape[1]), name
        expected = {
            "class_token": "cls_token",
            "use_abs_pos_emb": "pos_embed",
            "qkv_bias": r"blocks\.0\.attn\.(qkv\.bias|q_bias|q_proj\.bias)",
            "pre_norm": "norm_pre.weight",
            "use_pre_transformer_norm": "norm_pre.weight",
            "final_norm": "(fc_)?norm.weight",
            "scale_mlp": "blocks.0.mlp.norm.weight",
            "scale_attn_inner": "blocks.0.attn.norm.weight",
        }
        found = {n: any(re.fullmatch(p, t) for t in tensors) for n, p in expected.items()}
        stated = {n: known.options[n] for n in expected if n in known.options}
        assert stated == {n: found[n] for n in stated}, name
        scaled = any(re.fullmatch(r"blocks\.0\.(ls1\.gamma|gamma_1)", t) for t in tensors)
        assert scaled == ("init_values" in known.options), name
        assert known.distilled == ("dist_token" in tensors), name
        assert ("attn_pool.latent" in tensors) == (known.options.get("global_pool") == "map"), name
