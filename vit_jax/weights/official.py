"""google-research/vision_transformer's and big_vision's names <-> ours. Pure, arrays to arrays.

Ours are big_vision's present ones. Mixers and the ResNets of hybrids never had others.
"""

import math
import re
from collections.abc import Callable, Mapping
from operator import methodcaller

import numpy as np

from vit_jax.models.stacking import unstack

Arrays = dict[str, np.ndarray]

# What a model's names begin with -> what else such a file holds, which isn't the model's.
_PREFIXES = {"opt/target/": "opt/.*", "params/": "opt/.*", "img/": "txt/.*|t|b"}
# The original files count all modules of a block together, Linen each kind apart.
_MODULE = r"(Transformer/encoderblock_\d+)/(\w+)/(.*)"
_COUNTERS = {
    "MultiHeadDotProductAttention_1": "MultiHeadDotProductAttention_0",
    "LayerNorm_2": "LayerNorm_1",
    "MlpBlock_3": "MlpBlock_0",
}
_POSITION = "Transformer/posembed_input/pos_embedding"
_LATER_POSITION = "Transformer/pos_embedding"  # big_vision's until 2022
_GROUP_NORM = re.compile(r"(block\d+/unit\d+/)?gn\w+/(scale|bias)")
_KNOWN = re.compile(  # ours that the official models compute with
    r"cls|pos_embedding|MAPHead_0/probe|conv_root/kernel"
    r"|(embedding|stem|pre_logits|head)/(kernel|bias)"
    r"|(Transformer/encoder_norm|pre_head_layer_norm|gn_root)/(scale|bias)"
    r"|(Transformer/encoderblock(_\d+)?|MAPHead_0|MixerBlock_\d+)"
    r"/(LayerNorm_[01]/(scale|bias)|(MlpBlock_0|\w+_mixing)/Dense_[01]/(kernel|bias)"
    r"|MultiHeadDotProductAttention_0/(query|key|value|out)/(kernel|bias))"
    r"|block\d+/unit\d+/(conv(\d|_proj)/kernel|gn(\d|_proj)/(scale|bias))"
)


def from_official(arrays: Mapping[str, np.ndarray]) -> Arrays:
    """Arrays under any of the official names -> under ours; scanned layers stay stacked.

    Read are the original 2020 and AugReg files, flax's optimizers (`opt/target/...`), big_vision's
    (`params/...`, formerly with `Transformer/pos_embedding`) and the image tower of its two-tower
    models (`params/img/...`). Optimizer states and the text tower are left out. A name that is
    none of theirs stays as it is, for `weights.adapt` to report.

    There the position embeddings [1, 1 + N, D] may have a slot for the class token, which is only
    ever added to the token: here it is part of `cls`, and `pos_embedding` is [1, N, D].

    Raises:
      ValueError: two names become the same, or position embeddings are of another shape.
    """
    for prefix, others in _PREFIXES.items():
        if any(name.startswith(prefix) for name in arrays):
            ours = (n for n in arrays if n.startswith(prefix) or not re.fullmatch(others, n))
            arrays = rename({n: arrays[n] for n in ours}, methodcaller("removeprefix", prefix))
    renamed = rename(arrays, _linen_name)
    for name, array in renamed.items():
        if _GROUP_NORM.fullmatch(name) and array.shape[:-1] == (1, 1, 1):  # as google/flax#1721
            renamed[name] = array.reshape(-1)
    if "cls" in renamed and "pos_embedding" in renamed:
        cls, position = renamed["cls"], renamed["pos_embedding"]
        if position.ndim != 3 or cls.shape != (1, 1, position.shape[2]):
            raise ValueError(
                f"cls {cls.shape} and position embeddings {position.shape}: expected (1, 1, width) "
                "and (1, tokens, width), those of a Vision Transformer"
            )
        tokens = position.shape[1]
        # big_vision knew square grids alone, and tells by their size whether they have a slot.
        odd = _LATER_POSITION in arrays and math.isqrt(tokens) ** 2 + 1 == tokens
        if odd or _POSITION in arrays:
            renamed["cls"], renamed["pos_embedding"] = cls + position[:, :1], position[:, 1:]
    return renamed


def to_official(arrays: Mapping[str, np.ndarray]) -> Arrays:
    """Arrays under our names -> under those of the original 2020 and AugReg files.

    These are the ones that timm and the reference code read. Scanned layers are unstacked.
    `from_official` gives back the same bits.

    Raises:
      ValueError: the official models have no such tensors, and would leave them out.
    """
    if surplus := sorted(name for name in arrays if not _KNOWN.fullmatch(name)):
        raise ValueError(
            f"the official models have no {', '.join(surplus)}: write another format, a plain .npz"
        )
    renamed = rename(unstack(dict(arrays)), _original_name)
    if "cls" in renamed and _POSITION in renamed:
        position = renamed[_POSITION]
        slot = np.full_like(position[:, :1], -0.0)  # x + -0.0 is x to the bit, for x = -0.0 too
        renamed[_POSITION] = np.concatenate([slot, position], axis=1)
    return renamed


def rename(arrays: Mapping[str, np.ndarray], new_name: Callable[[str], str]) -> Arrays:
    """The same arrays under `new_name(name)`. ValueError if two come to be named the same."""
    renamed, origin = {}, {}
    for name, array in arrays.items():
        new = new_name(name)
        if new in renamed:
            raise ValueError(
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
