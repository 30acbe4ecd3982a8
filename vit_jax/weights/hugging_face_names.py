"""Tensor names of Hugging Face's Vision Transformers, by `model_type`, beside timm's.

A kind maps the names of `timm_names.vit_pairs` to those in published files of transformers.
"""

import math
import re
from typing import NamedTuple

import numpy as np

from vit_jax.weights.pytorch import Pair

_SEPARATE = {f"attn.{x[0]}": f"attention.attention.{x}" for x in ("query", "key", "value")}
_STEM = {
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "cls_token": "embeddings.cls_token",
    "dist_token": "embeddings.distillation_token",
    "reg_token": "embeddings.register_tokens",
    "pos_embed": "embeddings.position_embeddings",
    "norm": "layernorm",
}
_VIT = {
    "norm1": "layernorm_before",
    **_SEPARATE,
    "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_SCALES = {"ls1.gamma": "layer_scale1.lambda1", "ls2.gamma": "layer_scale2.lambda1"}
_DINOV2 = {
    **{same: same for same in ("norm1", "norm2", "mlp.fc1", "mlp.fc2", "mlp.gate")},
    **_SEPARATE,
    "attn.proj": "attention.output.dense",
    **_SCALES,
}
_DINOV3 = {
    **{same: same for same in ("norm1", "norm2")},
    **{f"attn.{x}": f"attention.{x}_proj" for x in "qkv"},
    "attn.proj": "attention.o_proj",
    "mlp.gate": "mlp.gate_proj",
    "mlp.fc1": "mlp.up_proj",
    "mlp.fc2": "mlp.down_proj",
    **_SCALES,
}
_CLIP = {
    "norm1": "layer_norm1",
    **{f"attn.{x}": f"self_attn.{x}_proj" for x in "qkv"},
    "attn.proj": "self_attn.out_proj",
    "norm2": "layer_norm2",
    **{same: same for same in ("mlp.fc1", "mlp.fc2")},
}
_CLIP_STEM = {
    "patch_embed.proj": "embeddings.patch_embedding",
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding.weight",
    "norm_pre": "pre_layrnorm",
    "norm": "post_layernorm",
    "attn_pool.latent": "head.probe",
    **{f"attn_pool.{x}": f"head.attention.{x}" for x in "qkv"},
    "attn_pool.proj": "head.attention.out_proj",
    "attn_pool.norm": "head.layernorm",
    "attn_pool.mlp": "head.mlp",
}


class Kind(NamedTuple):
    """One `model_type` of transformers."""

    prefix: str  # of the trunk
    block: str  # prefix of block {}
    stem: dict[str, str]
    layers: dict[str, str]
    epsilon: float = 1e-12  # defaults of its config
    activation: str = "gelu"
    heads: int = 12
    heads_of_classes: tuple[str, ...] = ("classifier",)


KINDS = {
    "vit": Kind("vit.", "encoder.layer.{}.", _STEM, _VIT),
    "vit_mae": Kind("vit.", "encoder.layer.{}.", _STEM, _VIT),
    "vit_msn": Kind("vit.", "encoder.layer.{}.", _STEM, _VIT, 1e-6),
    "ijepa": Kind("ijepa.", "encoder.layer.{}.", _STEM, _VIT),
    "deit": Kind("deit.", "encoder.layer.{}.", _STEM, _VIT),
    "dinov2": Kind("dinov2.", "encoder.layer.{}.", _STEM, _DINOV2, 1e-6),
    "dinov2_with_registers": Kind(
        "dinov2_with_registers.", "encoder.layer.{}.", _STEM, _DINOV2, 1e-6
    ),
    "dinov3_vit": Kind(
        *("", "layer.{}."),
        {**_STEM, "patch_embed.proj": "embeddings.patch_embeddings", "norm": "norm"},
        *(_DINOV3, 1e-5, "gelu", 6),
    ),
    "clip_vision_model": Kind(
        "vision_model.", "encoder.layers.{}.", _CLIP_STEM, _CLIP, 1e-5, "quick_gelu"
    ),
    "siglip_vision_model": Kind(
        "vision_model.", "encoder.layers.{}.", _CLIP_STEM, _CLIP, 1e-6, "gelu_pytorch_tanh"
    ),
    "siglip2_vision_model": Kind(  # NaFlex: reads patches, of images of any aspect ratio
        "vision_model.", "encoder.layers.{}.", _CLIP_STEM, _CLIP, 1e-6, "gelu_pytorch_tanh"
    ),
}
TWO_TOWERS = {name: f"{name}_vision_model" for name in ("clip", "siglip", "siglip2")}
# Parts that aren't of the image model, or only of its pretraining.
DROPPED = re.compile(
    r"(?:\w+\.)?embeddings\.(?:mask_token|position_ids)|(?:.*\.)?position_ids|decoder\..*"
    r"|text_model\..*|text_projection\..*|logit_(?:scale|bias)|rope_embeddings\..*"
)
# Names of transformers 5's modules, and of a trunk without its prefix -> the published ones.
_RENAMES = (
    (r"^(?=(?:embeddings|encoder|layers?|layernorm|pooler|pre_layrnorm|post_layernorm)\.)", "{}"),
    (r"^(?=head\.(?:probe|attention|layernorm|mlp))", "{}"),
)
_VIT_RENAMES = (
    (r"^(\w+\.)layers\.", r"\1encoder.layer."),
    (r"(?<=\.)attention\.q_proj\.", "attention.attention.query."),
    (r"(?<=\.)attention\.k_proj\.", "attention.attention.key."),
    (r"(?<=\.)attention\.v_proj\.", "attention.attention.value."),
    (r"(?<=\.)attention\.o_proj\.", "attention.output.dense."),
)
_MLP_RENAMES = (
    (r"(?<=\.)mlp\.fc1\.", "intermediate.dense."),
    (r"(?<=\.)mlp\.fc2\.", "output.dense."),
)


def published(arrays: dict[str, np.ndarray], kind: Kind) -> dict[str, np.ndarray]:
    """Renames tensors of any version of transformers to the published names."""
    renames = [(old, new.format(kind.prefix)) for old, new in _RENAMES]
    if kind.prefix == "":
        renames = [(r"^model\.", ""), *renames]
    if kind.layers in (_VIT, _DINOV2):
        renames += _VIT_RENAMES
    if kind.layers is _VIT:
        renames += _MLP_RENAMES
    if kind.layers is _DINOV2:
        renames += [
            (r"(?<=\.)mlp\.gate_proj\.", "mlp.gate."),
            (r"(?<=\.)mlp\.up_proj\.", "mlp.fc1."),
            (r"(?<=\.)mlp\.down_proj\.", "mlp.fc2."),
        ]
    renamed = {}
    for name, array in arrays.items():
        for old, new in renames:
            name = re.sub(old, new, name)  # noqa: PLW2901
        renamed[name] = array
    return _split(_as_convolution(renamed))


def _as_convolution(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Makes a kernel [D, P, P, 3] of SigLIP 2's dense layer on flattened patches: [D, 3, P, P]."""
    name = "vision_model.embeddings.patch_embedding.weight"
    kernel = arrays.get(name, np.empty(0))
    side = math.isqrt(kernel.shape[1] // 3) if kernel.ndim == 2 else 0
    if kernel.shape[1:] != (3 * side * side,):
        return arrays
    kernel = kernel.reshape(-1, side, side, 3).transpose(0, 3, 1, 2)
    return {**arrays, name: np.ascontiguousarray(kernel)}


def _split(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Splits DINOv2's gated MLP and the fused layers of SigLIP's attention pooling."""
    fused = {
        r"(.*\.mlp\.)weights_in(\..*)": (r"\1gate\2", r"\1fc1\2"),
        r"(.*head\.attention\.)in_proj_(weight|bias)": tuple(rf"\1{x}.\2" for x in "qkv"),
    }
    arrays = {re.sub(r"(\.mlp\.)weights_out\.", r"\1fc2.", n): a for n, a in arrays.items()}
    for pattern, parts in fused.items():
        for name in [name for name in arrays if re.fullmatch(pattern, name)]:
            array = arrays.pop(name)
            if array.ndim and len(array) % len(parts) == 0:
                pieces = np.split(array, len(parts))
                arrays |= {
                    re.sub(pattern, part, name): piece
                    for part, piece in zip(parts, pieces, strict=True)
                }
    return arrays


def fuse(arrays: dict[str, np.ndarray], kind: Kind) -> dict[str, np.ndarray]:
    """Inverts what `published` splits."""
    arrays = dict(arrays)
    for name in [name for name in arrays if ".mlp.gate." in name and kind.layers is _DINOV2]:
        layer = name.replace("gate", "fc1")
        arrays[name.replace("gate", "weights_in")] = np.concatenate(
            [arrays.pop(name), arrays.pop(layer)]
        )
        second = name.replace("gate", "fc2")
        arrays[second.replace("fc2", "weights_out")] = arrays.pop(second)
    for leaf in ("weight", "bias"):
        names = [f"{kind.prefix}head.attention.{x}.{leaf}" for x in "qkv"]
        if names[0] in arrays:
            pieces = [arrays.pop(name) for name in names]
            arrays[f"{kind.prefix}head.attention.in_proj_{leaf}"] = np.concatenate(pieces)
    return arrays


def theirs(name: str, kind: Kind) -> str:
    """Returns the published name of one in `timm_names.vit_pairs`."""
    if match := re.fullmatch(r"blocks\.(\d+)\.(.*)", name):
        return kind.prefix + kind.block.format(match[1]) + _lookup(match[2], kind.layers)
    for module, own in zip(("head", "head_dist"), kind.heads_of_classes, strict=False):
        if name.rpartition(".")[0] == module:
            return f"{own}.{name.rpartition('.')[2]}"
    return kind.prefix + _lookup(name, kind.stem)


def _lookup(name: str, table: dict[str, str]) -> str:
    for module in sorted(table, key=len, reverse=True):
        if name == module or name.startswith(module + "."):
            return table[module] + name.removeprefix(module)
    return name


def timm_like(names: list[str], kind: Kind) -> set[str]:
    """Returns names of `timm_names.vit_pairs` for published ones; leaves out unknown ones."""
    found = set()
    block = re.compile(re.escape(kind.prefix + kind.block).replace(r"\{\}", r"(\d+)") + "(.*)")
    layers = {new: old for old, new in kind.layers.items()}
    stem = {new: old for old, new in kind.stem.items()}
    heads = dict(zip(kind.heads_of_classes, ("head", "head_dist"), strict=False))
    for name in names:
        if match := block.fullmatch(name):
            found.add(f"blocks.{match[1]}.{_lookup(match[2], layers)}")
        elif name.rpartition(".")[0] in heads:
            found.add(_lookup(name, heads))
        else:
            found.add(_lookup(name.removeprefix(kind.prefix), stem))
    return found


def renamed(pairs: list[Pair], kind: Kind) -> list[Pair]:
    """Returns the pairs of `timm_names.vit_pairs` under the published names, with their layouts."""
    layouts = {"cls_token": "token", "pos_embed": "table"} if kind.stem is _CLIP_STEM else {}
    return [
        Pair(pair.ours, theirs(pair.theirs, kind), layouts.get(pair.theirs, pair.layout))
        for pair in pairs
    ]
