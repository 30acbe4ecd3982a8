"""Infers an architecture from the names and shapes of its parameters.

Parameters are flat ("/"-joined name -> array), under our names, with unrolled layers.
"""

import math
import re
from collections.abc import Iterable
from typing import Any

from vit_jax.config import InputError
from vit_jax.models import names
from vit_jax.models.variants import HYBRID_STEMS, MIXER_SIZES, RESNET_STAGES, VIT_SIZES

_BLOCK = names.ENCODER_BLOCK.format(0)
_MIXER_BLOCK = names.MIXER_BLOCK.format(0)


def describe(params: dict, image_size: tuple[int, int] | None = None) -> dict[str, Any]:
    """Infers the description of a model.

    Options that shapes don't show are as published: tanh GELU, epsilon 1e-6.

    Args:
      params: flat name -> array.
      image_size: (height, width) in pixels. Needed for grids that aren't square; ResNets default
        to 224 x 224.

    Returns:
      {"model": fields of ModelConfig, "num_classes": 0 without a head, "image_size"}.

    Raises:
      ValueError: an unknown or incomplete architecture, or an image size that doesn't fit.
    """
    readers = {"ViT": _vit, "Mixer": _mixer, "ResNet": _resnet}
    read = {names.FAMILIES[family].first_kernel: reader for family, reader in readers.items()}
    reader = next((reader for name, reader in read.items() if name in params), None)
    if reader is None:
        found = ", ".join(sorted(params)[:5])
        raise InputError(
            f"no ViT, hybrid, ResNet or Mixer: expected one of {', '.join(read)} among its "
            f"{len(params)} tensors ({found}, ...)"
        )
    try:
        model, unit, tokens = reader(params)
    except (KeyError, IndexError, TypeError) as error:
        raise InputError(f"incomplete weights: {error} is missing or of another shape") from error
    if image_size is None:
        side = math.isqrt(tokens or 0)
        if tokens is not None and side * side != tokens:
            raise InputError(
                f"position embeddings of {tokens} patches, not a square grid: give the image size, "
                f"such as {unit}x{unit * tokens}"
            )
        image_size = (unit * side,) * 2 if tokens else (224, 224)
    elif tokens not in (None, math.prod(side // unit for side in image_size)):
        raise InputError(f"image size {image_size}: expected one of {tokens} patches of {unit}")
    classes = params[names.HEAD_BIAS].shape[0] if names.HEAD_BIAS in params else 0
    return {"model": model, "num_classes": classes, "image_size": list(image_size)}


def count(among: Iterable[str], pattern: str) -> int:
    """Counts the distinct values of the pattern's group at the beginning of names."""
    return len({m[1] for name in among if (m := re.match(pattern, name))})


def nearest(table: dict[str, tuple], found: dict[str, int]) -> tuple[str, dict[str, int]]:
    """Returns the nearest name in a table of sizes, and the fields in which `found` differs."""
    sizes = tuple(found.values())
    name = min(table, key=lambda name: math.dist(*(map(math.log, s) for s in (table[name], sizes))))
    usual = dict(zip(found, table[name], strict=True))
    return name, {field: size for field, size in found.items() if usual[field] != size}


def _vit(params: dict) -> tuple[dict, int, int | None]:
    """Returns fields of ModelConfig, the patch side in pixels, and the number of patches."""
    patch, _, _, width = params[names.FAMILIES["ViT"].first_kernel].shape
    size, differing = nearest(
        VIT_SIZES,
        {
            "width": width,
            "depth": count(params, names.FAMILIES["ViT"].block),
            "mlp_dim": params[_BLOCK + names.MLP_BIAS].shape[0],
            "num_heads": params[_BLOCK + names.QUERY_KERNEL].shape[1],
        },
    )
    variant, unit = f"ViT-{size}/{patch}", patch
    if names.ROOT_KERNEL in params:
        stages, stem_width = _stages(params)
        stems = {stem: key for key, stem in HYBRID_STEMS.items()}
        if (stages, patch) not in stems:
            raise InputError(f"unknown hybrid: stages {stages} under patches of {patch}")
        stem, side = stems[stages, patch]
        variant, unit = f"{stem}+ViT-{size}/{side}", patch * 4 * 2 ** max(len(stages) - 1, 0)
        if stem_width != 64:
            differing["stem_width"] = stem_width
    model = {"variant": variant, **differing, **_pooling(params, width)}
    if names.PRE_LOGITS_BIAS in params:
        model["representation_size"] = params[names.PRE_LOGITS_BIAS].shape[0]
    if names.REGISTERS in params:
        model["registers"] = params[names.REGISTERS].shape[1]
    if _BLOCK + names.LAYER_SCALE in params:
        model["layer_scale"] = 1e-5  # the initial value; the file doesn't tell it
    if _BLOCK + names.QUERY_BIAS not in params:
        model["qkv_bias"] = ""
    elif _BLOCK + names.KEY_BIAS not in params:
        model["qkv_bias"] = "qv"
    for field, name in (
        ("pre_norm", names.PRE_NORM),
        ("distillation", names.DISTILLATION),
        ("qk_norm", _BLOCK + names.QUERY_NORM),
        ("attention_norm", _BLOCK + names.ATTENTION_NORM),
        ("mlp_norm", _BLOCK + names.MLP_NORM),
    ):
        if name in params:
            model[field] = True
    if _BLOCK + names.GATE_KERNEL in params:
        model["mlp"] = "swiglu"
    if _BLOCK + names.ROTARY_FREQUENCIES in params:
        model["rotary"] = "mixed"
    if names.POSITION in params:
        return model, unit, params[names.POSITION].shape[1]
    # big_vision's models without learned positions have fixed ones (arXiv 2205.01580).
    return {**model, "position": "none" if "rotary" in model else "sincos_2d"}, unit, None


def _pooling(params: dict, width: int) -> dict[str, Any]:
    """Returns the fields of ModelConfig about class token, pooling and last norm."""
    fields: dict[str, Any] = {}
    has_class = names.CLASS_TOKEN in params
    if names.PROBE in params:
        fields["pool"] = "map"
        heads, mlp_dim = params[names.PROBE_QUERY].shape[1], params[names.PROBE_BIAS].shape[0]
        if heads != params[_BLOCK + names.QUERY_KERNEL].shape[1]:
            fields["pool_heads"] = heads
        if mlp_dim != params[_BLOCK + names.MLP_BIAS].shape[0]:
            fields["pool_mlp_dim"] = mlp_dim
    elif not has_class or names.POOLED_NORM in params:
        fields["pool"] = "gap"
    else:
        wide = names.HEAD_KERNEL in params and params[names.HEAD_KERNEL].shape[0] == 2 * width
        fields["pool"] = "token+gap" if wide else "token"
    if has_class and fields["pool"] in ("map", "gap"):
        fields["class_token"] = True
    if names.FINAL_NORM not in params:
        fields["final_norm"] = "pooled" if names.POOLED_NORM in params else "none"
    return fields


def _mixer(params: dict) -> tuple[dict, int, int]:
    patch, _, _, width = params[names.FAMILIES["Mixer"].first_kernel].shape
    tokens, token_mlp_dim = params[_MIXER_BLOCK + names.TOKEN_KERNEL].shape
    size, differing = nearest(
        MIXER_SIZES,
        {
            "width": width,
            "depth": count(params, names.FAMILIES["Mixer"].block),
            "token_mlp_dim": token_mlp_dim,
            "mlp_dim": params[_MIXER_BLOCK + names.CHANNEL_BIAS].shape[0],
        },
    )
    return {"variant": f"Mixer-{size}/{patch}", **differing}, patch, tokens


def _resnet(params: dict) -> tuple[dict, int, None]:
    stages, width = _stages(params)
    depth = next((name for name, units in RESNET_STAGES.items() if units == stages), None)
    model: dict[str, Any] = {"variant": f"R{depth or 50}x{max(width // 64, 1)}"}
    if depth is None:
        model["stages"] = list(stages)
    if width % 64:
        model["stem_width"] = width
    if names.ROOT_SCALE in params:
        model["preactivation"] = False
    else:
        model["zero_padded_pool"] = True
    channels = 4 * width * 2 ** (len(stages) - 1)
    if "head/kernel" in params and len(params["head/kernel"]) != channels:
        model["stage_features"] = True
    return model, 32, None


def _stages(params: dict) -> tuple[tuple[int, ...], int]:
    """Returns the units per stage, and the root's width."""
    stages = count(params, names.STAGE)
    units = (count(params, names.UNIT.format(stage)) for stage in range(1, stages + 1))
    return tuple(units), params[names.ROOT_KERNEL].shape[-1]
