"""Converts the Vision Transformers of Hugging Face's `transformers`.

ViT, DeiT, MAE, MSN, I-JEPA, DINOv2 with and without registers, DINOv3, and the image towers of
CLIP, SigLIP and SigLIP 2. Functions take or return the contents of a `transformers` folder: the
arrays of `model.safetensors` and the JSON files, name -> content. `hugging_face_names.py` holds the
names. No torch is needed.
"""

import math
from typing import Any

import numpy as np

from vit_jax.config import InputError
from vit_jax.models.variants import Model, ModelConfig, described_model
from vit_jax.weights import preprocessing, pytorch, timm_names
from vit_jax.weights.describe import count
from vit_jax.weights.hugging_face_names import (
    DROPPED,
    KINDS,
    TWO_TOWERS,
    Kind,
    fuse,
    published,
    renamed,
    timm_like,
)
from vit_jax.weights.stated import Stated, agree

_ACTIVATIONS = {
    **{"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"},
    "quick_gelu": "quick_gelu",
}
_MLPS = ("gelu", "gelu_tanh", "quick_gelu", "swiglu")


def from_hugging_face(
    arrays: dict, files: dict[str, dict], image_size: tuple[int, int] | None = None
) -> tuple[dict[str, np.ndarray], dict]:
    """Imports a state dict and JSON files; returns flat parameters and their description.

    A ViTModel has no classifier; its optional pooler becomes `pre_logits`. Text towers, decoders
    and mask tokens are dropped. Raises ValueError for another model, for unknown or missing
    tensors, and where config.json states another model than the tensors are of.
    """
    config = Stated(files.get("config.json", {}), "config.json")
    if not config.fields:
        raise InputError("no config.json beside the weights: it tells the number of heads")
    architecture = ", ".join(config.names("architectures") or ["unknown"])
    model_type = config.text("model_type", "vit")
    if model_type in TWO_TOWERS:
        model_type, config = TWO_TOWERS[model_type], config.part("vision_config")
    if model_type not in KINDS:
        raise InputError(
            f"config.json is of a {model_type!r} model, expected {', '.join(map(repr, KINDS))}, "
            "or timm's config.json"
        )
    kind = KINDS[model_type]
    if "cls_classifier.weight" in arrays:
        kind = kind._replace(heads_of_classes=("cls_classifier", "distillation_classifier"))
    if "visual_projection.weight" in arrays:
        kind = kind._replace(heads_of_classes=("visual_projection",))
    arrays = {name: a for name, a in arrays.items() if not DROPPED.fullmatch(name)}
    arrays = published(arrays, kind)
    arrays = _of_this_task(arrays, kind, architecture)
    if kind.heads_of_classes == ("visual_projection",):  # has no bias
        projection = arrays["visual_projection.weight"]
        arrays["visual_projection.bias"] = np.zeros(len(projection), np.float32)

    present = timm_like(list(arrays), kind)
    depth = max(count(present, r"blocks\.(\d+)\."), 1)
    pairs = renamed(timm_names.vit_pairs(depth, None, present, "theirs"), kind)
    if "classifier.weight" not in arrays:  # a ViTModel; its pooler is optional
        pooler = pytorch.linear("pre_logits", f"{kind.prefix}pooler.dense")
        pairs += pytorch.present([pooler], arrays, "theirs")
    heads = config.whole("num_attention_heads", kind.heads, least=1)
    params = pytorch.from_torch(arrays, pairs, heads, f"Hugging Face {model_type}")
    if kind is KINDS["deit"] and "distillation" in params:  # not read by the only classifier
        params["registers"] = params.pop("distillation")

    patch = len(params["embedding/kernel"])
    naflex = model_type == "siglip2_vision_model"
    side = math.isqrt(config.whole("num_patches", 256, least=1)) * patch
    size = (side, side) if naflex else config.size("image_size", image_size or (224, 224))
    params = pytorch.without_prefix_slots(params, size[0] // patch * (size[1] // patch))
    fields = _fields(params, config, kind)
    if "Mean" in _pool(architecture) or model_type == "ijepa":
        fields["pool"] = "gap"
        fields |= {"class_token": True} if "cls" in params else {}
    labels = config.names("id2label") if "id2label" in config else None
    named = labels and any(name != f"LABEL_{i}" for i, name in enumerate(labels))
    params, description = pytorch.described(params, size, fields, labels if named else None)
    _compare(described_model(description), config, patch, model_type)
    if "preprocessor_config.json" in files:
        pixels = Stated(files["preprocessor_config.json"], "preprocessor_config.json")
        description["preprocess"], mean, std = preprocessing.from_hugging_face(pixels, size)
        pytorch.pixels(description, mean, std)
    if naflex:
        description["notes"] = [
            f"a NaFlex model, read for images of one size, {side}x{side} unless another is given: "
            "other aspect ratios are squashed"
        ]
    return params, description


def _pool(architecture: str) -> str:
    """Returns "Mean" for classifiers that average the patches."""
    means = tuple(f"{name}ForImageClassification" for name in ("CLIP", "Siglip", "Siglip2"))
    return "Mean" if architecture in means else ""


def _of_this_task(arrays: dict, kind: Kind, architecture: str) -> dict:
    """Leaves out layers that a classifier of a tower doesn't run."""
    unused = {
        "CLIPForImageClassification": f"{kind.prefix}post_layernorm.",
        "SiglipForImageClassification": f"{kind.prefix}head.",
        "Siglip2ForImageClassification": f"{kind.prefix}head.",
    }
    prefix = unused.get(architecture)
    return {n: a for n, a in arrays.items() if prefix is None or not n.startswith(prefix)}


def _fields(params: dict, config: Stated, kind: Kind) -> dict[str, Any]:
    """Returns fields of ModelConfig that aren't visible in weights."""
    fields: dict[str, Any] = {
        "norm_epsilon": config.number("layer_norm_eps", kind.epsilon, above=0)
    }
    if not any("/MlpBlock_0/gate/" in name for name in params):
        fields["mlp"] = config.choice("hidden_act", _ACTIVATIONS, kind.activation)
    if "pre_logits/bias" in params and config.text("pooler_act", "tanh") != "tanh":
        raise config.wrong("pooler_act", "'tanh'")
    if "pos_embedding" in params:
        antialias = "_antialias" if kind is KINDS["dinov2_with_registers"] else ""
        fields["position_resize"] = f"bicubic{antialias}"
    if kind is KINDS["siglip2_vision_model"]:
        fields["position_resize"] = "bilinear_antialias"
    if kind is KINDS["dinov3_vit"]:
        rope = config.part("rope_parameters") if "rope_parameters" in config else config
        fields |= {"position": "none", "rotary": "centred"}
        fields["rotary_base"] = rope.number("rope_theta", 100.0, above=0)
    return fields


def _compare(network: Model, config: Stated, patch: int, model_type: str) -> None:
    """Raises ValueError unless the tensors are what config.json states."""
    model = network.config
    mlp_dim = config.whole("intermediate_size")
    if model.mlp == "swiglu" and "use_swiglu_ffn" in config:
        mlp_dim = None  # DINOv2 rounds two thirds of mlp_ratio * hidden_size
    elif mlp_dim is None and "mlp_ratio" in config:
        mlp_dim = int(model.width * config.number("mlp_ratio"))
    gated = config.flag("use_gated_mlp", config.flag("use_swiglu_ffn"))
    dino = model_type.startswith("dino")
    two_in_one = model_type.startswith("dinov2") and network.num_classes > 0
    rotary = model_type == "dinov3_vit"
    with_class = not model_type.startswith("siglip") and model_type != "ijepa"
    distilled = model_type == "deit" and not model.distillation  # an unread token is a register
    registers = config.whole("num_register_tokens", 4 if model_type.endswith("registers") else 0)
    rows = [
        ("hidden_size", config.whole("hidden_size"), model.width),
        ("num_hidden_layers", config.whole("num_hidden_layers"), model.depth),
        ("intermediate_size", mlp_dim, model.mlp_dim),
        ("patch_size", config.size("patch_size"), (patch, patch)),
        ("num_channels", config.whole("num_channels"), 3),
        ("a gated MLP", gated, model.mlp == "swiglu"),
        ("num_register_tokens", registers + distilled, model.registers),
        ("qkv_bias", config.flag("qkv_bias", None if rotary else True), model.qkv_bias != ""),
        ("key_bias", config.flag("key_bias", False if rotary else None), "k" in model.qkv_bias),
        ("a class token", with_class, model.has_class_token),
        ("position embeddings", not rotary, model.position == "learned_1d"),
        ("LayerScale", dino, model.layer_scale is not None),
        ("a head of class token and mean", two_in_one, model.pool == "token+gap"),
    ]
    agree("config.json", rows)


def to_hugging_face(params: dict, description: dict) -> tuple[dict[str, np.ndarray], dict]:
    """Exports to the model of transformers that has the options.

    Returns the state dict and {"config.json": ..., "preprocessor_config.json": ...}. Raises
    ValueError for models that none can hold.
    """
    target, classes = "Hugging Face's transformers", description["num_classes"]
    params, config = pytorch.exportable(params, description, target, _MLPS)
    if "embedding/kernel" not in params:
        raise InputError(f"{target} can't hold this model: {config.variant} is no ViT")
    model_type, architecture = _model_type(config, classes)
    kind, target = KINDS[model_type], f"Hugging Face's {architecture}"
    if model_type == "deit":
        kind = kind._replace(heads_of_classes=("cls_classifier", "distillation_classifier"))
    no_slots = {name: params[name] for name in ("registers",) if name in params}
    params = pytorch.with_prefix_slots({n: a for n, a in params.items() if n not in no_slots})
    params |= no_slots
    if model_type == "clip_vision_model" and classes:
        kind = kind._replace(heads_of_classes=("visual_projection",))
        if not params["head/bias"].any():  # it has no bias
            del params["head/bias"]
        else:
            raise InputError(f"{target} can't hold this model: head/bias, and it isn't zero")
    elif model_type in ("dinov3_vit", "siglip_vision_model") and classes:
        raise InputError(f"{target} has no classifier: write features, or another format")
    own = _own_fields(model_type, architecture, config, classes)
    pairs = renamed(timm_names.vit_pairs(config.depth, None, params, "ours"), kind)
    arrays = fuse(pytorch.to_torch(params, pairs, target), kind)

    names = description.get("class_names") or [f"LABEL_{i}" for i in range(classes)]
    height, side = description["image_size"]
    patch = len(params["embedding/kernel"])
    activations = {ours: theirs for theirs, ours in _ACTIVATIONS.items() if theirs != "gelu_new"}
    model: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": model_type,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.mlp_dim,
        "hidden_act": activations.get(config.mlp, "silu" if config.rotary != "none" else "gelu"),
        "layer_norm_eps": config.norm_epsilon,
        "image_size": height if height == side else [height, side],
        "patch_size": patch,
        "num_channels": 3,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }
    model |= own
    spec = description.get("preprocess", "resize")
    pixels = preprocessing.to_hugging_face(spec, (height, side), config.mean, config.std)
    return arrays, {"config.json": model, "preprocessor_config.json": pixels}


def _model_type(config: ModelConfig, classes: int) -> tuple[str, str]:
    """Returns `model_type` and class of the transformers model with a model's options."""
    if config.rotary == "centred":
        return "dinov3_vit", "DINOv3ViTModel"
    if config.layer_scale is not None:
        name = "Dinov2WithRegisters" if config.registers else "Dinov2"
        task = "ForImageClassification" if classes else "Model"
        return ("dinov2_with_registers" if config.registers else "dinov2"), name + task
    if config.distillation:
        return "deit", "DeiTForImageClassificationWithTeacher"
    if config.pre_norm:
        return "clip_vision_model", "CLIPVisionModel" + ("WithProjection" if classes else "")
    if config.pool == "map":
        return "siglip_vision_model", "SiglipVisionModel"
    return "vit", "ViTForImageClassification" if classes else "ViTModel"


def _own_fields(
    model_type: str, architecture: str, config: ModelConfig, classes: int
) -> dict[str, Any]:
    """Returns fields of one model type's config, and checks what it can't state."""
    pools = {
        "dinov2": ("token+gap" if classes else "token",),
        "dinov2_with_registers": ("token+gap" if classes else "token",),
        "siglip_vision_model": ("map",),
    }
    biases = "qv" if model_type == "dinov3_vit" else "qkv"
    gated = ("dinov2", "dinov2_with_registers", "dinov3_vit")
    wrong = {
        "pool": config.pool not in pools.get(model_type, ("token",)),
        "mlp": config.mlp == "swiglu" and model_type not in gated,
        "qkv_bias": config.qkv_bias not in (biases, "qkv" if biases == "qv" else ""),
        "final_norm": config.final_norm != "tokens",
        "attention_norm": config.attention_norm,
        "mlp_norm": config.mlp_norm,
        "rotary": config.rotary not in ("none", "centred"),
        "class_token": not config.has_class_token and config.pool != "map",
        "registers": config.registers and "registers" not in model_type and biases == "qkv",
        "qk_norm": config.qk_norm,
        "representation_size": config.representation_size is not None,
    }
    for field, is_wrong in wrong.items():
        if is_wrong:
            raise InputError(
                f"Hugging Face's {architecture} can't hold this model: {field} = "
                f"{getattr(config, field)!r}"
            )
    if model_type == "dinov3_vit":
        return {
            "use_gated_mlp": config.mlp == "swiglu",
            "num_register_tokens": config.registers,
            "rope_theta": config.rotary_base,
            "query_bias": True,
            "key_bias": config.qkv_bias == "qkv",
            "value_bias": True,
            "layerscale_value": config.layer_scale,
            "mlp_bias": True,
            "proj_bias": True,
        }
    if model_type.startswith("dinov2"):
        swiglu = config.mlp == "swiglu"

        def made(ratio):  # of SwiGLU two thirds, rounded up to a multiple of 8
            hidden = config.width * ratio
            return (int(hidden * 2 / 3) + 7) // 8 * 8 if swiglu else hidden

        ratio = next((ratio for ratio in range(1, 17) if made(ratio) == config.mlp_dim), None)
        if ratio is None:
            raise InputError(
                f"Hugging Face's {model_type} can't hold this model: mlp_dim = {config.mlp_dim} of "
                "no whole mlp_ratio"
            )
        return {
            "use_swiglu_ffn": swiglu,
            "mlp_ratio": ratio,
            "layerscale_value": config.layer_scale,
            "qkv_bias": config.qkv_bias != "",
            **({"num_register_tokens": config.registers} if config.registers else {}),
        }
    if model_type == "clip_vision_model":
        return {"projection_dim": classes}
    return {"qkv_bias": config.qkv_bias != ""} if model_type in ("vit", "deit") else {}
