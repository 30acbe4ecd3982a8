"""Converts timm models: `vit_*` with hybrids, BiT's `resnetv2_*_bit`, `mixer_*`.

Functions take or return the contents of a folder as on timm's hub: the arrays of
`model.safetensors` and the JSON files, name -> content. No torch is needed.
`timm.create_model("local-dir:...", pretrained=True)` builds an exported model: `model_args` in its
config.json holds the options that the architecture's name doesn't.
"""

import math
import re
from typing import Any

import numpy as np

from vit_jax.config import InputError, unknown
from vit_jax.models.variants import MIXER_SIZES, VIT_SIZES, ModelConfig
from vit_jax.weights import pytorch, timm_names
from vit_jax.weights.describe import count

_SIZES = {
    "tiny": "Ti",
    "small": "S",
    "medium": "M",
    "base": "B",
    "large": "L",
    "so400m": "So400m",
    "huge": "H",
    "giant": "g",
    "gigantic": "G",
}
# Architectures with the same blocks and number of heads as ours.
_VIT = re.compile(
    r"(?!vit_giant_.*dinov2)"  # SwiGLU
    rf"(?:vit|deit3?)_({'|'.join(_SIZES)})_"
    r"(?:patch\d+(?:_reg\d)?(?:_dinov2|_siglip(?:_gap)?)?|r_s16_p8|r26_s32|r50_s16|r50_s32)"
    r"(?:_\d+)?(?:_in21k)?"
)
_TANH = re.compile(
    r"vit_(?:base_patch32|so400m_patch16)_siglip.*|vit_large_patch16_siglip(?:_gap)?_512"
)
_VIT_NAMES = (
    *("vit_tiny_patch16_224", "vit_small_patch8_224", "vit_small_patch16_224"),
    *("vit_small_patch32_224", "vit_base_patch8_224", "vit_base_patch16_224"),
    *("vit_base_patch32_224", "vit_large_patch14_224", "vit_large_patch16_224"),
    *("vit_large_patch32_224", "vit_huge_patch14_224", "vit_giant_patch14_224"),
    "vit_gigantic_patch14_224",
)
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
_ARGUMENTS = {  # supported `model_args`, and those that don't change results
    *("img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "act_layer"),
    *("global_pool", "class_token", "fc_norm", "reg_tokens", "no_embed_class", "init_values"),
    *("qk_norm", "dynamic_img_size", "num_classes", "channels", "stem_chs", "drop_path_rate"),
    "stem_type",
}
_BLOCKS = r"blocks\.(\d+)\."
_POOLS = {"token": "token", "gap": "avg", "map": "map"}


def to_timm(params: dict, description: dict) -> tuple[dict[str, np.ndarray], dict]:
    """Exports to timm: returns the state dict and {"config.json": ...}.

    Hybrids differ slightly, also those that timm publishes: timm standardises kernels by
    sqrt(variance + 1e-8) instead of (deviation + 1e-5) and has another GroupNorm epsilon. With R26
    and kernels of deviation 0.05, features change by 1.5e-4.

    Raises:
      ValueError: an option that timm's models don't support; the message names it.
    """
    params, config = pytorch.exportable(params, description, "timm")
    if config.norm_epsilon != 1e-6:
        raise InputError(
            f"timm can't hold this model: norm_epsilon = {config.norm_epsilon}, timm's is 1e-6 and "
            "its config.json has no field for it"
        )
    vit, mixer = ("embedding/kernel" in params, "stem/kernel" in params)
    family = "vit" if vit else "mixer" if mixer else "bit"
    if family == "vit":
        name, arguments, pairs = _describe_vit(params, config, description["image_size"])
        params = pytorch.with_prefix_slots(params)
    elif family == "mixer":
        name, arguments, pairs = _describe_mixer(params, config, description["image_size"])
    else:
        name, arguments, pairs = _describe_bit(config)
    arrays = timm_names.fuse(pytorch.to_torch(params, pairs, f"timm's {name}"))

    root = timm_names.BACKBONE + ("stem.conv" if config.stages else "conv")
    first = {"mixer": "stem.proj", "bit": "stem.conv", "vit": "patch_embed.proj"}[family]
    info = {
        "architecture": name,
        "num_classes": description["num_classes"],
        "num_features": len(arrays["norm.weight"]),
        "global_pool": _POOLS[config.pool] if family == "vit" else "avg",
        "model_args": arguments,
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": [3, *description["image_size"]],
            "fixed_input_size": family != "bit",
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "crop_mode": "squash",
            "mean": list(pytorch.MEAN),
            "std": list(pytorch.STD),
            "num_classes": description["num_classes"],
            "pool_size": None,
            "first_conv": root if family == "vit" and config.stages is not None else first,
            "classifier": "head.fc" if family == "bit" else "head",
        },
    }
    if names := description.get("class_names"):
        info["label_names"] = list(names)
    return arrays, {"config.json": info}


def _describe_vit(params: dict, config: ModelConfig, image_size: list[int]) -> tuple:
    """Returns architecture, model_args and pairs."""
    patch, _, _, width = params["embedding/kernel"].shape
    sizes = (config.width, config.depth, config.mlp_dim, config.num_heads)
    arguments: dict[str, Any] = {
        "img_size": list(image_size),
        "patch_size": patch,
        "embed_dim": width,
        "depth": config.depth,
        "num_heads": config.num_heads,
        "mlp_ratio": _ratio(config.mlp_dim, width),
        "act_layer": config.mlp,
    }
    if config.pool != "token":
        arguments |= {"class_token": False, "global_pool": _POOLS[config.pool], "fc_norm": False}
    if config.registers:
        arguments["reg_tokens"] = config.registers
    if config.layer_scale is not None:
        arguments["init_values"] = config.layer_scale or 1e-5  # timm takes 0 as no LayerScale
    if config.qk_norm:
        arguments["qk_norm"] = True
    if config.stages is None:
        size = next((s for s, ours in _SIZES.items() if VIT_SIZES[ours] == sizes), None)
        name = f"vit_{size}_patch{patch}_224"
        name = name if name in _VIT_NAMES else "vit_base_patch16_224"
    elif config.stages in _HYBRID_NAMES and config.stem_width == 64:
        name = _HYBRID_NAMES[config.stages]
    else:
        raise InputError(
            f"timm has no hybrid with stages {config.stages} and a root {config.stem_width} wide: "
            f"expected one of {', '.join(map(str, _HYBRID_NAMES))} and 64"
        )
    return name, arguments, timm_names.vit_pairs(config.depth, config.stages, params, "ours")


def _describe_bit(config: ModelConfig) -> tuple:
    if config.stages not in _BIT_NAMES:
        raise InputError(
            f"timm has no BiT ResNet with stages {config.stages}: expected one of "
            f"{', '.join(map(str, _BIT_NAMES))}"
        )
    pairs, names = timm_names.bit_pairs(config.stages), _BIT_NAMES[config.stages]
    arguments = {} if config.zero_padded_pool else {"stem_type": ""}
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
    ratios = [_ratio(config.token_mlp_dim, width), _ratio(config.mlp_dim, width)]
    arguments = {"img_size": list(image_size), "mlp_ratio": ratios}
    return f"mixer_{size.lower()}{patch}_224", arguments, timm_names.mixer_pairs(config.depth)


def _ratio(mlp_dim: int, width: int) -> float:
    """Returns a ratio with int(width * ratio) == mlp_dim, as timm computes it."""
    ratio = mlp_dim / width
    return ratio if int(width * ratio) == mlp_dim else math.nextafter(ratio, math.inf)


def from_timm(arrays: dict, files: dict[str, dict]) -> tuple[dict[str, np.ndarray], dict]:
    """Imports a state dict and JSON files; returns flat parameters and their description.

    Another mean and standard deviation of pixels are folded into a ViT's patch embedding. Raises
    ValueError for an architecture not known to compute the same as ours, and for unknown or missing
    tensors.
    """
    config = files.get("config.json", {})
    if "architecture" not in config:
        raise InputError(
            "no config.json with timm's `architecture` beside the weights: it tells the number of "
            "heads and the activation"
        )
    name, arguments = config["architecture"].split(".")[0], config.get("model_args") or {}
    if strange := sorted(arguments.keys() - _ARGUMENTS):
        raise InputError(f"model_args of config.json has unsupported {', '.join(strange)}")
    pretrained = config.get("pretrained_cfg", config)
    size = arguments.get("img_size") or pretrained.get("input_size", (3, 224, 224))[1:]
    size = pytorch.both_sides(size)

    heads, unit, fields = 1, 1, {}
    if name.startswith("mixer_"):
        depth = max(count(arrays, _BLOCKS), 1)
        pairs, fields = timm_names.mixer_pairs(depth), {"mlp": "gelu", "norm_epsilon": 1e-6}
    elif re.fullmatch(r"resnetv2_\d+x\d+_bit\w*", name):
        pairs = timm_names.bit_pairs(timm_names.read_stages(arrays, ""))
        stem = arguments.get("stem_type", "fixed")
        if stem not in ("", "fixed"):
            raise unknown("stem_type", stem, ("", "fixed"))
        fields = {"zero_padded_pool": stem == "fixed"}
    elif match := _VIT.fullmatch(name):
        heads = arguments.get("num_heads", VIT_SIZES[_SIZES[match[1]]][3])
        fields = _vit_fields(name, arguments)
        stages, arrays = None, timm_names.split(arrays)
        if any(key.startswith(timm_names.BACKBONE) for key in arrays):
            stages = timm_names.read_stages(arrays, re.escape(timm_names.BACKBONE))
            unit = 4 * 2 ** max(len(stages) - 1, 0)
        depth = max(count(arrays, _BLOCKS), 1)
        pairs = timm_names.vit_pairs(depth, stages, arrays, "theirs")
    else:
        known = (*_VIT_NAMES, *_HYBRID_NAMES.values(), "resnetv2_50x1_bit", "mixer_b16_224")
        raise unknown("timm architecture", name, known)
    params = pytorch.from_torch(arrays, pairs, heads, f"timm {name}")

    if "pos_embedding" in params:
        unit *= len(params["embedding/kernel"])
        params = pytorch.without_prefix_slots(params, math.prod(side // unit for side in size))
    mean, std = (pretrained.get(key, pytorch.MEAN) for key in ("mean", "std"))
    if "embedding/kernel" in params and "conv_root/kernel" not in params:
        params = pytorch.fold_normalization(params, mean, std)
    elif (tuple(mean), tuple(std)) != (pytorch.MEAN, pytorch.STD):
        raise InputError(f"{name} expects pixels with mean {mean} and std {std}, not 0.5 and 0.5")
    names = config.get("label_names") or pretrained.get("label_names")
    params, description = pytorch.described(params, size, fields, names)

    pool = _POOLS[description["model"].get("pool", "gap")]
    found = arguments.get("global_pool") or config.get("global_pool") or pool
    if found != pool:
        raise InputError(f"global_pool = {found!r}, but the weights are those of {pool!r}")
    return params, description


def _vit_fields(name: str, arguments: dict) -> dict[str, Any]:
    """Returns fields of ModelConfig that aren't visible in weights."""
    activation = arguments.get("act_layer", "gelu_tanh" if _TANH.fullmatch(name) else "gelu")
    if activation not in ("gelu", "gelu_tanh"):
        raise unknown("act_layer", activation, ("gelu", "gelu_tanh"))
    scale = arguments.get("init_values")
    layer_scale = {} if scale is None else {"layer_scale": scale}
    return {"mlp": activation, "norm_epsilon": 1e-6, **layer_scale}
