"""Writes timm's models: see `timm.py`.

`timm.create_model("local-dir:...", pretrained=True)` builds an exported model: `model_args` in its
config.json holds the options that the architecture's name doesn't.
"""

from typing import Any

import numpy as np
from absl import logging

from vit_jax.config import InputError
from vit_jax.models.variants import MIXER_SIZES, VIT_SIZES, ModelConfig
from vit_jax.weights import preprocessing, pytorch, timm_names

_SIZES = {
    **{"tiny": "Ti", "small": "S", "medium": "M", "base": "B", "large": "L"},
    **{"so400m": "So400m", "huge": "H", "giant": "g", "gigantic": "G"},
}
_VIT_NAMES = (
    *("vit_tiny_patch16_224", "vit_small_patch8_224", "vit_small_patch16_224"),
    *("vit_small_patch32_224", "vit_base_patch8_224", "vit_base_patch16_224"),
    *("vit_base_patch32_224", "vit_large_patch14_224", "vit_large_patch16_224"),
    *("vit_large_patch32_224", "vit_huge_patch14_224", "vit_giant_patch14_224"),
    "vit_gigantic_patch14_224",
)
# timm's config.json has no field for the epsilon, nor for a gated MLP in its VisionTransformer:
# (its class Eva, gated MLP, epsilon) -> an architecture that has them.
_BASES = {
    (False, False, 1e-6): "vit_base_patch16_224",
    (False, False, 1e-5): "vit_base_patch16_clip_224",
    (False, True, 1e-6): "vit_giant_patch14_dinov2",
    (True, False, 1e-6): "eva_giant_patch14_224",
    (True, False, 1e-5): "vit_small_patch16_dinov3",
    (True, True, 1e-6): "eva_giant_patch14_224",
    (True, True, 1e-5): "vit_small_patch16_dinov3",
}
_HYBRID_NAMES = {  # by stages
    (): "vit_tiny_r_s16_p8_224",
    (2, 2, 2, 2): "vit_small_r26_s32_224",
    (3, 4, 9): "vit_base_r50_s16_224",
    (3, 4, 6, 3): "vit_large_r50_s32_224",
}
_BIT_NAMES = {  # by stages, then by width factor; the first also takes other widths
    (3, 4, 6, 3): {1: "resnetv2_50x1_bit", 3: "resnetv2_50x3_bit"},
    (3, 4, 23, 3): {1: "resnetv2_101x1_bit", 3: "resnetv2_101x3_bit"},
    (3, 8, 36, 3): {2: "resnetv2_152x2_bit", 4: "resnetv2_152x4_bit"},
}
_POOLS = {"token": "token", "gap": "avg", "map": "map"}
_MLPS = ("gelu", "gelu_tanh", "quick_gelu", "swiglu")


def to_timm(params: dict, description: dict) -> tuple[dict[str, np.ndarray], dict]:
    """Exports to timm: returns the state dict and {"config.json": ...}.

    Hybrids differ slightly, also those that timm publishes: timm standardises kernels by
    sqrt(variance + 1e-8) instead of (deviation + 1e-5) and has another GroupNorm epsilon. With R26
    and kernels of deviation 0.05, features change by 1.5e-4.

    Raises:
      ValueError: an option that timm's models don't support; the message names it.
    """
    params, config = pytorch.exportable(params, description, "timm", _MLPS)
    vit, mixer = ("embedding/kernel" in params, "stem/kernel" in params)
    family = "vit" if vit else "mixer" if mixer else "bit"
    if config.norm_epsilon not in ((1e-6, 1e-5) if vit and config.stages is None else (1e-6,)):
        raise InputError(
            f"timm can't hold this model: norm_epsilon = {config.norm_epsilon}, timm's is 1e-6 and "
            "its config.json has no field for it"
        )
    eva = family == "vit" and _needs_eva(config)
    if family == "vit":
        name, arguments, pairs = _describe_vit(params, config, description["image_size"], eva)
        params = _rotated_as_timm(pytorch.with_prefix_slots(params), config)
    elif family == "mixer":
        name, arguments, pairs = _describe_mixer(params, config, description["image_size"])
    else:
        name, arguments, pairs = _describe_bit(config)
    arrays = timm_names.fuse(pytorch.to_torch(params, pairs, f"timm's {name}"), eva)

    root = timm_names.BACKBONE + ("stem.conv" if config.stages else "conv")
    first = {"mixer": "stem.proj", "bit": "stem.conv", "vit": "patch_embed.proj"}[family]
    last = {"bit": "head.fc", "vit": ["head", "head_dist"] if config.distillation else "head"}
    info = {
        "architecture": name,
        "num_classes": description["num_classes"],
        "num_features": params["embedding/kernel"].shape[-1] if vit else len(arrays["norm.weight"]),
        "global_pool": _POOLS[config.pool] if family == "vit" else "avg",
        "model_args": arguments,
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": [3, *description["image_size"]],
            "fixed_input_size": family != "bit",
            **preprocessing.to_timm(description.get("preprocess", "resize")),
            "mean": list(config.mean),
            "std": list(config.std),
            "num_classes": description["num_classes"],
            "pool_size": None,
            "first_conv": root if family == "vit" and config.stages is not None else first,
            "classifier": last.get(family, "head"),
        },
    }
    if class_names := description.get("class_names"):
        info["label_names"] = list(class_names)
    return arrays, {"config.json": info}


def _needs_eva(config: ModelConfig) -> bool:
    """Whether timm's Eva has the model's options, and its VisionTransformer doesn't."""
    read_by_map = config.pool == "map" and (
        config.has_class_token or config.pool_heads or config.pool_mlp_dim
    )
    norms = config.attention_norm or config.mlp_norm
    gated = config.mlp == "swiglu" and config.norm_epsilon == 1e-5
    return bool(config.rotary != "none" or config.qkv_bias == "qv" or norms or read_by_map or gated)


def _rotated_as_timm(params: dict, config: ModelConfig) -> dict:
    """Reorders queries and keys for `rotary = "mixed"`, whose pairs are neighbours in timm."""
    if config.rotary != "mixed":
        return params
    head_dim = config.width // config.num_heads
    order = timm_names.rotary_order(head_dim, half=False, columns_first=False)
    return pytorch.reordered(params, np.argsort(order))


def _describe_vit(params: dict, config: ModelConfig, image_size: list[int], eva: bool) -> tuple:
    """Returns architecture, model_args and pairs."""
    patch, _, _, width = params["embedding/kernel"].shape
    gated = config.mlp == "swiglu"
    arguments: dict[str, Any] = {
        "img_size": list(image_size),
        "patch_size": patch,
        "embed_dim": width,
        "depth": config.depth,
        "num_heads": config.num_heads,
        "mlp_ratio": timm_names.ratio(config.mlp_dim * (2 if gated and not eva else 1), width),
    }
    for field, value, possible in (
        ("pool", config.pool, tuple(_POOLS)),
        ("mlp", config.mlp, ("gelu", "swiglu") if eva else _MLPS),
        ("distillation", config.distillation, (False,) if eva else (False, True)),
    ):
        if value not in possible:
            raise InputError(
                f"timm can't hold this model: {field} = {value!r} beside its other options, "
                f"expected {' or '.join(map(repr, possible))}"
            )
    arguments |= _eva_arguments(config) if eva else _vit_arguments(config)
    if config.layer_scale is not None:
        arguments["init_values"] = config.layer_scale or 1e-5  # timm takes 0 as no LayerScale
    if config.qk_norm:
        arguments["qk_norm"] = True
    pairs = timm_names.vit_pairs(config.depth, config.stages, params, "ours")
    if config.distillation:
        return "deit_base_distilled_patch16_224", arguments, pairs
    if config.stages is None:
        name = _BASES.get((eva, gated, config.norm_epsilon))
        sizes = (config.width, config.depth, config.mlp_dim, config.num_heads)
        size = next((s for s, ours in _SIZES.items() if VIT_SIZES[ours] == sizes), None)
        own = f"vit_{size}_patch{patch}_224"
        plain = name == "vit_base_patch16_224" and own in _VIT_NAMES
        return (own if plain else name), arguments, pairs
    if config.stages in _HYBRID_NAMES and config.stem_width == 64 and not eva and not gated:
        return _HYBRID_NAMES[config.stages], arguments, pairs
    raise InputError(
        f"timm has no hybrid with stages {config.stages} and a root {config.stem_width} wide: "
        f"expected one of {', '.join(map(str, _HYBRID_NAMES))} and 64"
    )


def _vit_arguments(config: ModelConfig) -> dict[str, Any]:
    """Returns arguments of timm's VisionTransformer that differ from its defaults."""
    arguments: dict[str, Any] = {}
    clip, gated = config.norm_epsilon == 1e-5, config.mlp == "swiglu"
    if not gated:
        arguments["act_layer"] = config.mlp
    if config.pool != "token":
        arguments |= {
            "class_token": config.has_class_token,
            "global_pool": _POOLS[config.pool],
            "fc_norm": config.final_norm == "pooled",
        }
    elif config.final_norm == "pooled":
        arguments["fc_norm"] = True
    if config.final_norm == "none":
        arguments["final_norm"] = False
    if config.registers:
        arguments["reg_tokens"] = config.registers
    if config.pre_norm != clip:
        arguments["pre_norm"] = config.pre_norm
    if config.qkv_bias == "":
        arguments["qkv_bias"] = False
    if gated and config.layer_scale is None:
        arguments["init_values"] = None
    return arguments


def _eva_arguments(config: ModelConfig) -> dict[str, Any]:
    """Returns arguments of timm's Eva, all that the bases may set otherwise."""
    if config.pool == "map" and config.registers:
        raise InputError("timm can't hold this model: its Eva's attention pooling reads registers")
    if config.attention_norm and config.qkv_bias == "qkv":
        raise InputError(
            "timm can't hold this model: attention_norm needs qkv_bias = 'qv' or '', not 'qkv'"
        )
    kinds = {"none": "cat", "axial": "cat", "centred": "dinov3", "mixed": "mixed"}
    arguments = {
        "class_token": config.has_class_token,
        "global_pool": _POOLS[config.pool],
        "use_post_transformer_norm": config.final_norm == "tokens",
        "use_fc_norm": config.final_norm == "pooled",
        "use_pre_transformer_norm": config.pre_norm,
        "num_reg_tokens": config.registers,
        "attn_type": "rope" if config.qkv_bias == "qkv" else "eva",
        "qkv_bias": config.qkv_bias != "",
        "swiglu_mlp": config.mlp == "swiglu",
        "swiglu_align_to": 0,
        "scale_mlp": config.mlp_norm,
        "scale_attn_inner": config.attention_norm,
        "init_values": None,
        "use_abs_pos_emb": config.position != "none",
        "use_rot_pos_emb": config.rotary != "none",
        "rope_type": kinds[config.rotary],
        "rope_temperature": config.rotary_base,
        "rope_rotate_half": config.rotary in ("axial", "centred"),
        "rope_grid_indexing": "xy" if config.rotary == "mixed" else "ij",
        "rope_grid_offset": config.rotary_offset,
        "ref_feat_shape": config.rotary_reference,
    }
    if config.pool == "map":
        width = config.width
        arguments["attn_pool_num_heads"] = config.pool_heads or config.num_heads
        arguments["attn_pool_mlp_ratio"] = timm_names.ratio(
            config.pool_mlp_dim or config.mlp_dim, width
        )
    return arguments


def _describe_bit(config: ModelConfig) -> tuple:
    if config.stage_features:
        raise InputError("timm's ResNets have no stage_features")
    if config.stages not in _BIT_NAMES:
        raise InputError(
            f"timm has no BiT ResNet with stages {config.stages}: expected one of "
            f"{', '.join(map(str, _BIT_NAMES))}"
        )
    pairs, names = timm_names.bit_pairs(config.stages), _BIT_NAMES[config.stages]
    arguments = {}
    if not config.zero_padded_pool:
        arguments = {"stem_type": ""}
        logging.warning(
            "timm's create_model can't build this ResNet: its BiT models pad max pooling with 0, "
            "this one with -inf (zero_padded_pool = False). vit_jax reads the file"
        )
    if (factor := config.stem_width / 64) in names:
        return names[factor], arguments, pairs
    factor, name = next(iter(names.items()))
    stem = config.stem_width // factor  # timm multiplies stem and channels by the name's factor
    sizes = {"stem_chs": stem, "channels": [4 * stem * 2**i for i in range(4)]}
    return name, {**arguments, **sizes}, pairs


def _describe_mixer(params: dict, config: ModelConfig, image_size: list[int]) -> tuple:
    patch, _, _, width = params["stem/kernel"].shape
    size = next((s for s, n in MIXER_SIZES.items() if n[:2] == (width, config.depth)), None)
    if size is None or patch not in (16, 32):
        raise InputError(
            f"timm has no Mixer of width {width}, depth {config.depth} and patch {patch}: expected "
            f"those of {', '.join(MIXER_SIZES)} and 16 or 32"
        )
    if config.mlp != "gelu":
        raise InputError(
            f"timm can't hold this model: mlp = {config.mlp!r}, timm's Mixers have the exact "
            "'gelu' and its config.json has no field for it"
        )
    ratios = [
        timm_names.ratio(config.token_mlp_dim, width),
        timm_names.ratio(config.mlp_dim, width),
    ]
    arguments = {"img_size": list(image_size), "mlp_ratio": ratios}
    return f"mixer_{size.lower()}{patch}_224", arguments, timm_names.mixer_pairs(config.depth)
