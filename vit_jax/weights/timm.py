"""Converts timm models: ViTs of all plain kinds, hybrids, BiT's `resnetv2_*_bit`, `mixer_*`.

Functions take or return the contents of a folder as on timm's hub: the arrays of
`model.safetensors` and the JSON files, name -> content. No torch is needed.
`timm_architectures.py` knows what an architecture's name says, `timm_export.py` writes.
"""

import math
import re
from typing import Any

import numpy as np

from vit_jax.config import InputError, unknown
from vit_jax.models import names
from vit_jax.models.variants import ModelConfig, described_model
from vit_jax.weights import preprocessing, pytorch, timm_names
from vit_jax.weights.describe import count
from vit_jax.weights.stated import Stated, agree
from vit_jax.weights.timm_architectures import Architecture, architecture
from vit_jax.weights.timm_export import to_timm

__all__ = ["from_timm", "to_timm"]
_EXAMPLES = (
    *("vit_base_patch16_224", "vit_small_patch14_dinov2", "vit_small_patch16_dinov3"),
    *("vit_base_patch16_clip_224", "vit_base_patch16_siglip_224", "deit3_small_patch16_224"),
    *("deit_small_distilled_patch16_224", "flexivit_base", "eva02_base_patch14_224"),
    *("vit_base_r50_s16_224", "resnetv2_50x1_bit", "mixer_b16_224"),
)
_ANY = re.compile(  # arguments that matter in training alone, or how the same is computed
    r"\w*drop\w*_rate|weight_init|fix_init|dynamic_img_\w+|strict_img_size|head_init_scale"
    r"|rope_(?:shift|jitter|rescale)_coords|qkv_fused|attn_type|swiglu_align_to|no_embed_class"
)
_ONLY = {  # arguments that tensors don't show -> the value that our models have
    **{"in_chans": 3, "proj_bias": True, "pos_embed": "learn", "pool_include_prefix": False},
    **{"scale_attn_norm": False, "scale_mlp_norm": False, "use_post_norm": False},
    **{"attn_only_layer_scale": False, "gated_attn": False},
}
_READ = {
    *("img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "act_layer"),
    *("global_pool", "class_token", "fc_norm", "reg_tokens", "num_reg_tokens", "init_values"),
    *("qk_norm", "qkv_bias", "pre_norm", "final_norm", "num_classes", "swiglu_mlp", "scale_mlp"),
    *("scale_attn_inner", "use_abs_pos_emb", "use_rot_pos_emb", "rope_type", "rope_grid_offset"),
    *("rope_grid_indexing", "rope_temperature", "rope_rotate_half", "ref_feat_shape"),
    *("use_pre_transformer_norm", "use_post_transformer_norm", "use_fc_norm"),
    *("attn_pool_num_heads", "attn_pool_mlp_ratio", "stem_type", "stem_chs", "channels"),
}
_BLOCKS = r"blocks\.(\d+)\."
_POOLS = {"token": "token", "avg": "gap", "map": "map"}


def from_timm(
    arrays: dict, files: dict[str, dict], image_size: tuple[int, int] | None = None
) -> tuple[dict[str, np.ndarray], dict]:
    """Imports a state dict and JSON files; returns flat parameters and their description.

    Raises ValueError for an architecture not known to compute the same as ours, for unknown or
    missing tensors, and where config.json states another model than the tensors are of.
    """
    config = Stated(files.get("config.json", {}), "config.json")
    if "architecture" not in config:
        raise InputError(
            "no config.json with timm's `architecture` beside the weights: it tells the number of "
            "heads and the activation"
        )
    name = config.text("architecture").split(".")[0]
    arguments = config.part("model_args")
    pretrained = config.part("pretrained_cfg") if "pretrained_cfg" in config else config
    size = arguments.size("img_size") or pretrained.size("input_size", image_size or (224, 224))

    known, heads, unit, fields = architecture(name), 1, 1, {}
    arrays = {key: array for key, array in arrays.items() if not key.startswith("rope.periods")}
    pool_heads = None
    if name.startswith("mixer_"):
        depth = max(count(arrays, _BLOCKS), 1)
        pairs, fields = timm_names.mixer_pairs(depth), {"mlp": "gelu", "norm_epsilon": 1e-6}
    elif re.fullmatch(r"resnetv2_\d+x\d+_bit\w*", name):
        pairs = timm_names.bit_pairs(timm_names.read_stages(arrays, ""))
        stem = arguments.choice("stem_type", {"": "", "fixed": "fixed"}, "fixed")
        fields = {"zero_padded_pool": stem == "fixed"}
    elif known is not None:
        heads = arguments.whole("num_heads", known.num_heads, least=1)
        pool_heads = arguments.whole(
            "attn_pool_num_heads", known.options.get("attn_pool_num_heads")
        )
        way = timm_names.split_parallel if known.parallel else timm_names.split
        stages, arrays = None, way(arrays)
        if any(key.startswith(timm_names.BACKBONE) for key in arrays):
            stages = timm_names.read_stages(arrays, re.escape(timm_names.BACKBONE))
            unit = 4 * 2 ** max(len(stages) - 1, 0)
        depth = max(count(arrays, _BLOCKS), 1)
        pairs = timm_names.vit_pairs(depth, stages, arrays, "theirs", known.parallel)
    else:
        raise unknown("timm architecture", name, _EXAMPLES)
    params = pytorch.from_torch(arrays, pairs, heads, f"timm {name}", pool_heads)

    if "embedding/kernel" in params:
        unit *= len(params["embedding/kernel"])
        params = pytorch.without_prefix_slots(params, math.prod(side // unit for side in size))
    if known is not None:
        params = pytorch.reordered(params, _order(params, _options(known, arguments)))
        fields = _fields(params, known, arguments, config)
    labels = config.names("label_names") or pretrained.names("label_names")
    params, description = pytorch.described(params, size, fields, labels)
    resolved = described_model(description).config
    _compare(resolved, description["num_classes"], known, arguments, config)
    description["preprocess"], mean, std = preprocessing.from_timm(pretrained)
    pytorch.pixels(description, mean, std)
    return params, description


def _fields(params: dict, known: Architecture, arguments: Stated, config: Stated) -> dict[str, Any]:
    """Returns fields of `ModelConfig` that weights don't show: of model_args, else of the name."""
    stated = _options(known, arguments)
    fields: dict[str, Any] = {"norm_epsilon": stated.number("epsilon", 1e-6)}
    fields |= {"parallel": True} if known.parallel else {}
    activations = {name: name for name in ("gelu", "gelu_tanh", "quick_gelu")}
    if not any("/MlpBlock_0/gate/" in name for name in params):
        fields["mlp"] = stated.choice("act_layer", activations, "gelu")
    scale = arguments.number("init_values")
    if scale is not None and any("layer_scale" in name for name in params):
        fields["layer_scale"] = scale
    has_positions = "pos_embedding" in params
    fields |= {"position_resize": "bicubic_antialias"} if has_positions else {"position": "none"}
    if (rotary := _rotary(stated)) != "none":
        fields |= {"rotary": rotary, "rotary_base": stated.number("rope_temperature", 1e4, above=0)}
        reference, offset = stated.size("ref_feat_shape"), stated.number("rope_grid_offset", 0.0)
        if rotary == "axial" and reference is not None:
            if reference[0] != reference[1]:
                raise stated.wrong("ref_feat_shape", "the same number of rows and columns")
            fields["rotary_reference"] = reference[0]
        if offset and rotary != "axial":
            raise stated.wrong("rope_grid_offset", f"0 beside rope_type = {rotary!r}")
        fields["rotary_offset"] = float(offset)

    has_class = "cls" in params
    pools = ("map",) if "MAPHead_0/probe" in params else ("token", "avg") if has_class else ("avg",)
    pool = pools[0]
    for source in (arguments, config, Stated(known.options, "the architecture's name")):
        if "global_pool" in source:
            pool = source.text("global_pool")
            if pool not in pools:
                shown = " or ".join(map(repr, pools))
                raise source.wrong("global_pool", f"{shown}, as the weights are")
            break
    fields["pool"] = _POOLS[pool]
    if has_class and pool != "token":
        fields["class_token"] = True
    return fields


def _options(known: Architecture, arguments: Stated) -> Stated:
    given = {name: value for name, value in arguments.fields.items() if value is not None}
    return Stated({**known.options, **given}, "model_args of config.json")


def _rotary(stated: Stated) -> str:
    """Returns `ModelConfig.rotary`."""
    if not stated.flag("use_rot_pos_emb", False):
        return "none"
    kinds = {"cat": "axial", "mixed": "mixed", "dinov3": "centred"}
    return stated.choice("rope_type", kinds, "cat")


def _order(params: dict, stated: Stated) -> np.ndarray | slice:
    """Returns the order of a head's features in which they are rotated here."""
    rotary = _rotary(stated)
    if rotary == "none":
        return slice(None)
    xy = stated.choice("rope_grid_indexing", {"ij": "ij", "xy": "xy"}, "ij") == "xy"
    if rotary == "mixed" and not xy:
        raise stated.wrong("rope_grid_indexing", "'xy' with rope_type = 'mixed'")
    head_dim = params["Transformer/encoderblock_0/" + names.QUERY_KERNEL].shape[-1]
    half = stated.flag("rope_rotate_half", False)
    return timm_names.rotary_order(head_dim, half=half, columns_first=xy and rotary != "mixed")


def _compare(
    model: ModelConfig, classes: int, known: Architecture | None, arguments: Stated, config: Stated
) -> None:
    """Raises ValueError unless the tensors are what the name, config and model_args state."""
    for name in sorted(arguments.fields.keys()):
        value = arguments.fields[name]
        same = value is None or (name in _ONLY and value == _ONLY[name])
        if name not in _READ and not same and not _ANY.fullmatch(name):
            raise InputError(
                f"model_args of config.json has unsupported {name} = {value!r}: expected "
                f"{_ONLY.get(name, 'no such argument')}"
            )
    rows = [("num_classes", s.whole("num_classes"), classes) for s in (arguments, config)]
    if known is not None:
        rows += _rows(model, known, arguments)
    agree("config.json", rows)


def _rows(model: ModelConfig, known: Architecture, arguments: Stated) -> list[tuple]:
    """Returns (timm's argument, its stated value, the tensors' value)."""
    stated = _options(known, arguments)
    # The only argument whose null isn't the architecture's default.
    layer_scale = {**known.options, **arguments.fields}.get("init_values")
    width = arguments.whole("embed_dim", known.width)
    mlp_dim = width * arguments.number("mlp_ratio", known.mlp_dim / known.width)
    gated = model.mlp == "swiglu"
    # A gated MLP's ratio may be that of both its layers, and its width is rounded up.
    found = (model.mlp_dim, 2 * model.mlp_dim) if gated else (model.mlp_dim,)
    close = any(abs(m - mlp_dim) <= 8 for m in found)
    registers = arguments.whole("num_reg_tokens", known.registers)
    rows = [
        ("embed_dim", width, model.width),
        ("depth", arguments.whole("depth", known.depth), model.depth),
        ("the MLP's width", found[0] if close else int(mlp_dim), found[0]),
        ("reg_tokens", arguments.whole("reg_tokens", registers), model.registers),
        ("LayerScale (init_values)", layer_scale is not None, model.layer_scale is not None),
        ("a distillation token", known.distilled, model.distillation),
    ]
    if known.patch is not None:
        side = int(model.variant.rpartition("/")[2])
        rows.append(("patch_size", arguments.size("patch_size", (known.patch,) * 2), (side, side)))
    found_flags = {
        "class_token": model.has_class_token,
        "qkv_bias": model.qkv_bias != "",
        "qk_norm": model.qk_norm,
        "swiglu_mlp": gated,
        "scale_mlp": model.mlp_norm,
        "scale_attn_inner": model.attention_norm,
        "use_abs_pos_emb": model.position == "learned_1d",
        "final_norm": model.final_norm != "none",
        "use_post_transformer_norm": model.final_norm == "tokens",
        "fc_norm": model.final_norm == "pooled",
        "use_fc_norm": model.final_norm == "pooled",
        "pre_norm": model.pre_norm,
        "use_pre_transformer_norm": model.pre_norm,
    }
    rows += [(name, stated.flag(name), value) for name, value in found_flags.items()]
    if (
        not known.eva
        and model.has_class_token
        and model.pool == "gap"
        and "fc_norm" not in arguments
    ):
        rows.append(("fc_norm (of global_pool = 'avg')", True, model.final_norm == "pooled"))
    return rows
