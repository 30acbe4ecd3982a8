"""Converts parameter names of google-research/vision_transformer and big_vision, both ways.

Our names are big_vision's current ones. Mixers and hybrids' ResNets have the same names everywhere.
"""

import math
import re
from collections.abc import Callable, Mapping
from operator import methodcaller

import numpy as np

from vit_jax.config import InputError
from vit_jax.models.stacking import unstack
from vit_jax.weights.describe import floats

Arrays = dict[str, np.ndarray]

# Prefix of a model's names -> regex of the other tensors in such a file.
_PREFIXES = {"opt/target/": "opt/.*", "params/": "opt/.*", "img/": "txt/.*|t|b"}
# The original files number all modules of a block together, Linen numbers each kind separately.
_MODULE = r"(Transformer/encoderblock_\d+)/(\w+)/(.*)"
_COUNTERS = {
    "MultiHeadDotProductAttention_1": "MultiHeadDotProductAttention_0",
    "LayerNorm_2": "LayerNorm_1",
    "MlpBlock_3": "MlpBlock_0",
}
_POSITION = "Transformer/posembed_input/pos_embedding"
_LATER_POSITION = "Transformer/pos_embedding"  # big_vision until 2022
_GROUP_NORM = re.compile(r"(block\d+/unit\d+/)?gn\w+/(scale|bias)")
_KNOWN = re.compile(  # our names that exist in the official models
    r"cls|pos_embedding|MAPHead_0/probe|conv_root/kernel"
    r"|(embedding|stem|pre_logits|head)/(kernel|bias)"
    r"|(Transformer/encoder_norm|pre_head_layer_norm|gn_root)/(scale|bias)"
    r"|(Transformer/encoderblock(_\d+)?|MAPHead_0|MixerBlock_\d+)"
    r"/(LayerNorm_[01]/(scale|bias)|(MlpBlock_0|\w+_mixing)/Dense_[01]/(kernel|bias)"
    r"|MultiHeadDotProductAttention_0/(query|key|value|out)/(kernel|bias))"
    r"|block\d+/unit\d+/(conv(\d|_proj)/kernel|gn(\d|_proj)/(scale|bias))"
)


def from_official(arrays: Mapping[str, np.ndarray]) -> Arrays:
    """Renames arrays from official names to ours; scanned layers stay stacked.

    Supports the original 2020 and AugReg files, flax optimizers (`opt/target/...`), big_vision
    (`params/...`, formerly with `Transformer/pos_embedding`) and the image tower of its two-tower
    models (`params/img/...`). Drops optimizer states and the text tower. Keeps unknown names, for
    `weights.adapt` to report.

    Official position embeddings [1, 1 + N, D] may have a slot for the class token. It is added to
    `cls`, and `pos_embedding` is [1, N, D].

    Raises:
      ValueError: two tensors with the same new name, integers, or position embeddings of another
        shape.
    """
    for prefix, others in _PREFIXES.items():
        while any(name.startswith(prefix) for name in arrays):  # also "params/params/"
            ours = (n for n in arrays if n.startswith(prefix) or not re.fullmatch(others, n))
            arrays = rename({n: arrays[n] for n in ours}, methodcaller("removeprefix", prefix))
    renamed = rename(arrays, _linen_name)
    for name, array in renamed.items():
        if _GROUP_NORM.fullmatch(name) and array.shape[:-1] == (1, 1, 1):  # see google/flax#1721
            renamed[name] = array.reshape(-1)
    if "cls" in renamed and "pos_embedding" in renamed:
        cls, position = renamed["cls"], renamed["pos_embedding"]
        if position.ndim != 3 or cls.shape != (1, 1, position.shape[2]):
            raise InputError(
                f"cls {cls.shape} and position embeddings {position.shape}: expected (1, 1, width) "
                "and (1, tokens, width), those of a Vision Transformer"
            )
        floats("cls", cls), floats("pos_embedding", position)  # checks, as below they are added
        tokens = position.shape[1]
        # big_vision supports square grids only, and detects the slot by the size.
        odd = _LATER_POSITION in arrays and math.isqrt(tokens) ** 2 + 1 == tokens
        if odd or _POSITION in arrays:
            renamed["cls"], renamed["pos_embedding"] = cls + position[:, :1], position[:, 1:]
    return renamed


def to_official(arrays: Mapping[str, np.ndarray]) -> Arrays:
    """Renames arrays to the names of the original 2020 and AugReg files; unstacks scanned layers.

    timm and the reference code read these names. `from_official` restores the same bits.

    Raises:
      ValueError: tensors that the official models don't have.
    """
    if surplus := sorted(name for name in arrays if not _KNOWN.fullmatch(name)):
        raise InputError(
            f"the official models have no {', '.join(surplus)}: use another format, a plain .npz"
        )
    renamed = rename(unstack(dict(arrays)), _original_name)
    if "cls" in renamed and _POSITION in renamed:
        position = renamed[_POSITION]
        slot = np.full_like(position[:, :1], -0.0)  # x + -0.0 is x to the bit, for x = -0.0 too
        renamed[_POSITION] = np.concatenate([slot, position], axis=1)
    return renamed


def rename(arrays: Mapping[str, np.ndarray], new_name: Callable[[str], str]) -> Arrays:
    """Renames arrays by `new_name`; raises ValueError if two get the same name."""
    renamed, origin = {}, {}
    for name, array in arrays.items():
        new = new_name(name)
        if new in renamed:
            raise InputError(
                f"{origin[new]} and {name} are both {new} here: expected one model's weights in a "
                "file, leave one of them out"
            )
        renamed[new], origin[new] = array, name
    return renamed


def _linen_name(name: str) -> str:
    if name in (_POSITION, _LATER_POSITION):
        return "pos_embedding"
    return re.sub(_MODULE, lambda m: f"{m[1]}/{_COUNTERS.get(m[2], m[2])}/{m[3]}", name)


def _original_name(name: str) -> str:
    if name == "pos_embedding":
        return _POSITION
    counters = {linen: original for original, linen in _COUNTERS.items()}
    return re.sub(_MODULE, lambda m: f"{m[1]}/{counters.get(m[2], m[2])}/{m[3]}", name)
