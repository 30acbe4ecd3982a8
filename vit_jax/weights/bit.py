"""Converts parameter names of BiT's published ResNets (google-research/big_transfer), both ways.

Our `block1/unit1/gn2/scale` is `resnet/block1/unit01/b/group_norm/gamma` there.
"""

import re
from collections.abc import Mapping

import numpy as np

from vit_jax.config import InputError
from vit_jax.weights.official import Arrays, rename

_BIT_NAMES = {  # without the unit's prefix
    "conv_root/kernel": "root_block/standardized_conv2d/kernel",
    "gn_head/scale": "group_norm/gamma",
    "gn_head/bias": "group_norm/beta",
    "head/kernel": "head/conv2d/kernel",
    "head/bias": "head/conv2d/bias",
    "conv_proj/kernel": "a/proj/standardized_conv2d/kernel",
}
for _number, _letter in enumerate("abc", start=1):
    _BIT_NAMES[f"conv{_number}/kernel"] = f"{_letter}/standardized_conv2d/kernel"
    _BIT_NAMES[f"gn{_number}/scale"] = f"{_letter}/group_norm/gamma"
    _BIT_NAMES[f"gn{_number}/bias"] = f"{_letter}/group_norm/beta"
_OUR_NAMES = {bit: ours for ours, bit in _BIT_NAMES.items()}


def from_bit(arrays: Mapping[str, np.ndarray]) -> Arrays:
    """Renames arrays of a BiT file; reshapes the head's kernel [1, 1, C, classes] to 2-D.

    Keeps unknown names, for `weights.adapt` to report. Raises ValueError if two tensors get the
    same name.
    """
    renamed = rename(arrays, _our_name)
    if "head/kernel" in renamed and renamed["head/kernel"].shape[:-2] == (1, 1):
        renamed["head/kernel"] = renamed["head/kernel"][0, 0]
    return renamed


def to_bit(arrays: Mapping[str, np.ndarray]) -> Arrays:
    """Renames arrays of a ResNet v2 to BiT's names; `from_bit` restores the same bits.

    Raises:
      ValueError: tensors that BiT's models don't have.
    """
    if surplus := sorted(name for name in arrays if _bit_name(name) is None):
        raise InputError(
            f"BiT's ResNets have no {', '.join(surplus)}: expected a pre-activation ResNet (v2), "
            "use another format"
        )
    renamed = rename(arrays, _bit_name)
    if (head := "resnet/head/conv2d/kernel") in renamed:
        if len(renamed[head]) != len(arrays["gn_head/scale"]):
            raise InputError("BiT's ResNets have no stage_features: use another format")
        renamed[head] = renamed[head][None, None]
    return renamed


def _our_name(name: str) -> str:
    counted = re.sub(r"(standardized_conv2d)_\d+", r"\1", name)  # in some files
    match = re.fullmatch(r"resnet/(?:(block\d+)/unit(\d+)/)?(.+)", counted)
    if not match or match[3] not in _OUR_NAMES:
        return name
    unit = f"{match[1]}/unit{int(match[2])}/" if match[1] else ""
    return unit + _OUR_NAMES[match[3]]


def _bit_name(name: str) -> str | None:
    match = re.fullmatch(r"(?:(block\d+)/unit(\d+)/)?(.+)", name)
    if not match or match[3] not in _BIT_NAMES:
        return None
    unit = f"{match[1]}/unit{int(match[2]):02d}/" if match[1] else ""
    return f"resnet/{unit}{_BIT_NAMES[match[3]]}"
