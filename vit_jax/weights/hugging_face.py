"""Converts Hugging Face `transformers`: ViTForImageClassification, and ViTModel (read only).

Functions take or return the contents of a `transformers` folder: the arrays of `model.safetensors`
and the JSON files, name -> content. Tensor names are those of published files; files written by
transformers 5 may have other names, which are also read. No torch is needed.
"""

import re

import numpy as np

from vit_jax.config import InputError, unknown
from vit_jax.models.names import FAMILIES
from vit_jax.weights import pytorch
from vit_jax.weights.describe import count
from vit_jax.weights.pytorch import Pair

_ACTIVATIONS = {"gelu_tanh": "gelu_pytorch_tanh", "gelu": "gelu"}
_BLOCK = {
    "LayerNorm_0": "layernorm_before",
    "MultiHeadDotProductAttention_0/query": "attention.attention.query",
    "MultiHeadDotProductAttention_0/key": "attention.attention.key",
    "MultiHeadDotProductAttention_0/value": "attention.attention.value",
    "MultiHeadDotProductAttention_0/out": "attention.output.dense",
    "LayerNorm_1": "layernorm_after",
    "MlpBlock_0/Dense_0": "intermediate.dense",
    "MlpBlock_0/Dense_1": "output.dense",
}
# Names of transformers 5's modules, and of a bare ViTModel -> the published ones.
_RENAMES = (
    (r"^(?=(?:embeddings|encoder|layers|layernorm|pooler)\.)", "vit."),
    (r"^vit\.layers\.", "vit.encoder.layer."),
    (r"(?<=\.)attention\.q_proj\.", "attention.attention.query."),
    (r"(?<=\.)attention\.k_proj\.", "attention.attention.key."),
    (r"(?<=\.)attention\.v_proj\.", "attention.attention.value."),
    (r"(?<=\.)attention\.o_proj\.", "attention.output.dense."),
    (r"(?<=\.)mlp\.fc1\.", "intermediate.dense."),
    (r"(?<=\.)mlp\.fc2\.", "output.dense."),
)


def _pairs(depth: int) -> list[Pair]:
    pairs = [
        Pair("cls", "vit.embeddings.cls_token", "tokens"),
        Pair("pos_embedding", "vit.embeddings.position_embeddings", "tokens"),
        *pytorch.linear("embedding", "vit.embeddings.patch_embeddings.projection", "conv"),
        *pytorch.norm("Transformer/encoder_norm", "vit.layernorm"),
    ]
    for i in range(depth):
        ours, theirs = f"Transformer/encoderblock_{i}/", f"vit.encoder.layer.{i}."
        pairs += pytorch.attention_and_mlp(ours, theirs, _BLOCK)
    return pairs


def to_hugging_face(params: dict, description: dict) -> tuple[dict[str, np.ndarray], dict]:
    """Exports to ViTForImageClassification.

    Returns the state dict and {"config.json": ..., "preprocessor_config.json": ...}. Raises
    ValueError for models that it can't hold: other pooling than the class token, `pre_logits`,
    registers and other options.
    """
    target = "Hugging Face's ViTForImageClassification"
    params, config = pytorch.exportable(params, description, target)
    if "pos_embedding" in params:
        params = pytorch.with_prefix_slots(params)
    depth = count(params, FAMILIES["ViT"].block)
    arrays = pytorch.to_torch(params, _pairs(depth) + pytorch.linear("head", "classifier"), target)

    patch, _, _, width = params["embedding/kernel"].shape
    attention = "Transformer/encoderblock_0/MultiHeadDotProductAttention_0/query/bias"
    mlp = "Transformer/encoderblock_0/MlpBlock_0/Dense_0/bias"
    height, side = description["image_size"]
    classes = description["num_classes"]
    names = description.get("class_names") or [f"LABEL_{i}" for i in range(classes)]
    model = {
        "architectures": ["ViTForImageClassification"],
        "model_type": "vit",
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": len(params[attention]),
        "intermediate_size": len(params[mlp]),
        "hidden_act": _ACTIVATIONS[config.mlp],
        "layer_norm_eps": config.norm_epsilon,
        "image_size": height if height == side else [height, side],
        "patch_size": patch,
        "num_channels": 3,
        "qkv_bias": True,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }
    pixels = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": side},
        "resample": 2,  # PIL's bilinear
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(pytorch.MEAN),
        "image_std": list(pytorch.STD),
    }
    return arrays, {"config.json": model, "preprocessor_config.json": pixels}


def from_hugging_face(arrays: dict, files: dict[str, dict]) -> tuple[dict[str, np.ndarray], dict]:
    """Imports a state dict and JSON files; returns flat parameters and their description.

    A ViTModel has no classifier; its optional pooler becomes `pre_logits`. Another mean and
    standard deviation in `preprocessor_config.json` are folded into the patch embedding. Raises
    ValueError for another model, and for unknown or missing tensors.
    """
    config = files.get("config.json", {})
    if missing := {"model_type", "num_attention_heads", "image_size"} - config.keys():
        raise InputError(
            f"no config.json with {', '.join(sorted(missing))} beside the weights: add the model's"
        )
    if config["model_type"] != "vit":
        raise InputError(f"config.json is of a {config['model_type']!r} model, expected 'vit'")
    for pattern, published in _RENAMES:
        arrays = {re.sub(pattern, published, name): array for name, array in arrays.items()}

    depth = max(count(arrays, r"vit\.encoder\.layer\.(\d+)\."), 1)
    head = pytorch.linear("head", "classifier")
    if head[0].theirs not in arrays:  # a ViTModel; its pooler is optional
        head = pytorch.present([pytorch.linear("pre_logits", "vit.pooler.dense")], arrays, "theirs")
    heads = config["num_attention_heads"]
    params = pytorch.from_torch(arrays, _pairs(depth) + head, heads, "Hugging Face ViT")

    patch = len(params["embedding/kernel"])
    size = pytorch.both_sides(config["image_size"])
    params = pytorch.without_prefix_slots(params, size[0] // patch * (size[1] // patch))
    params = pytorch.fold_normalization(params, *_pixels(files.get("preprocessor_config.json", {})))
    activation = config.get("hidden_act", "gelu")
    if activation == "gelu_new":
        activation = "gelu_pytorch_tanh"
    known = {theirs: ours for ours, theirs in _ACTIVATIONS.items()}
    if activation not in known:
        raise unknown("hidden_act", activation, known)
    if "pre_logits/bias" in params and config.get("pooler_act", "tanh") != "tanh":
        raise InputError(f"pooler_act = {config['pooler_act']!r}: expected 'tanh'")
    fields = {"mlp": known[activation], "norm_epsilon": config.get("layer_norm_eps", 1e-12)}
    labels = {int(i): name for i, name in config.get("id2label", {}).items()}
    named = any(name != f"LABEL_{i}" for i, name in labels.items())
    names = [labels[i] for i in sorted(labels)] if named else None
    return pytorch.described(params, size, fields, names)


def _pixels(config: dict) -> tuple[list[float], list[float]]:
    """Returns mean and standard deviation for pixels in [0, 1]; default as transformers' ViT."""
    scale = config.get("rescale_factor", 1 / 255) if config.get("do_rescale", True) else 1.0
    if abs(scale * 255 - 1) > 1e-6 or not config.get("do_normalize", True):
        raise InputError(
            "preprocessor_config.json does not scale pixels by 1/255 and normalise them: expected "
            "do_rescale, rescale_factor = 1/255 and do_normalize"
        )
    return config.get("image_mean", pytorch.MEAN), config.get("image_std", pytorch.STD)
