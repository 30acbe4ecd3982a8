"""Converts tensors between our layout and PyTorch's, from one table of names for both directions.

Shared by `timm.py` and `hugging_face.py`. Parameters are flat ("/"-joined name -> array), state
dicts "."-joined name -> array. Descriptions are those of `formats.py`, with `num_classes` = 0
without a classifier. No torch is needed.

Letters in shapes: I inputs, O outputs, D width, H heads, K = D / H, N patches.
"""

import functools
import math
import re
from collections.abc import Collection, Iterable
from typing import NamedTuple

import jax
import numpy as np

from vit_jax.config import InputError
from vit_jax.models.positions import sincos_2d
from vit_jax.models.stacking import flatten, unstack
from vit_jax.models.variants import Model, ModelConfig, described_model
from vit_jax.weights.describe import describe, floats

MEAN = STD = (0.5, 0.5, 0.5)  # map pixels in [0, 1] to our [-1, 1]
RANKS = {  # of PyTorch's tensor, per layout
    **{"vector": 1, "tokens": 3, "dense": 2, "conv": 4, "pointwise": 4},
    **{"heads": 2, "heads_bias": 1, "merge": 2, "token": 1, "table": 2},
}


class Pair(NamedTuple):
    """A tensor's name here and in PyTorch, and its layout: see `_to_torch`."""

    ours: str
    theirs: str
    layout: str = "vector"


def norm(ours: str, theirs: str) -> list[Pair]:
    """Returns the pairs of a LayerNorm or GroupNorm."""
    return [Pair(f"{ours}/scale", f"{theirs}.weight"), Pair(f"{ours}/bias", f"{theirs}.bias")]


def linear(ours: str, theirs: str, layout: str = "dense") -> list[Pair]:
    """Returns the pairs of a layer with kernel and bias."""
    bias = "heads_bias" if layout == "heads" else "vector"
    return [
        Pair(f"{ours}/kernel", f"{theirs}.weight", layout),
        Pair(f"{ours}/bias", f"{theirs}.bias", bias),
    ]


def attention_and_mlp(ours: str, theirs: str, names: dict[str, str]) -> list[Pair]:
    """Returns the pairs of a block or of attention pooling; `names`: our module -> theirs."""
    pairs = []
    for module, name in names.items():
        last = module.split("/")[-1]
        if last.startswith("LayerNorm") or last == "norm":
            pairs += norm(ours + module, theirs + name)
        else:
            layout = {"query": "heads", "key": "heads", "value": "heads", "out": "merge"}
            pairs += linear(ours + module, theirs + name, layout.get(last, "dense"))
    return pairs


def present(groups: Iterable[list[Pair]], names: Collection[str], side: str) -> list[Pair]:
    """Returns the groups with at least one tensor in `names`; `side` is "ours" or "theirs"."""
    return [
        pair for group in groups if any(getattr(p, side) in names for p in group) for pair in group
    ]


def to_torch(params: dict, pairs: list[Pair], target: str) -> dict[str, np.ndarray]:
    """Converts parameters to a state dict; ValueError unless the pairs match them exactly."""
    _compare(params, [pair.ours for pair in pairs], f"{target} can't hold this model")
    return {
        pair.theirs: np.ascontiguousarray(
            _to_torch(np.asarray(params[pair.ours], np.float32), pair.layout)
        )
        for pair in pairs
    }


def from_torch(
    arrays: dict, pairs: list[Pair], num_heads: int, source: str, pool_heads: int | None = None
) -> dict:
    """Converts a state dict to parameters; ValueError unless the pairs match it exactly.

    `pool_heads`: of attention pooling, by default `num_heads`.
    """
    _compare(arrays, [pair.theirs for pair in pairs], f"not a {source} that can be read")
    params = {}
    for ours, theirs, layout in pairs:
        array = np.asarray(floats(theirs, arrays[theirs]), np.float32)
        try:
            if array.ndim != RANKS[layout] or not array.size:
                raise InputError(f"expected {RANKS[layout]} non-empty dimensions")
            heads = pool_heads if pool_heads and ours.startswith("MAPHead_0/") else num_heads
            params[ours] = np.ascontiguousarray(_from_torch(array, layout, heads))
        except ValueError as error:
            raise InputError(
                f"{theirs} {array.shape}: not the shape of {ours} with {num_heads} heads ({error})"
            ) from error
    return params


def _to_torch(array: np.ndarray, layout: str) -> np.ndarray:
    match layout:
        case "dense":  # [I, O] -> [O, I]
            return array.T
        case "conv":  # [height, width, I, O] -> [O, I, height, width]
            return array.transpose(3, 2, 0, 1)
        case "pointwise":  # [I, O] -> [O, I, 1, 1]
            return array.T[:, :, None, None]
        case "heads":  # [D, H, K] -> [H * K, D]
            return array.reshape(len(array), -1).T
        case "heads_bias":  # [H, K] -> [H * K]
            return array.reshape(-1)
        case "merge":  # [H, K, D] -> [D, H * K]
            return array.reshape(-1, array.shape[-1]).T
        case "token":  # [1, 1, D] -> [D]
            return array.reshape(-1)
        case "table":  # [1, N, D] -> [N, D]
            return array.reshape(array.shape[1:])
    return array


def _from_torch(array: np.ndarray, layout: str, num_heads: int) -> np.ndarray:
    match layout:
        case "dense":
            return array.T
        case "conv":
            return array.transpose(2, 3, 1, 0)
        case "pointwise":
            return array.reshape(array.shape[:2]).T
        case "heads":
            return array.T.reshape(array.shape[1], num_heads, -1)
        case "heads_bias":
            return array.reshape(num_heads, -1)
        case "merge":
            return array.T.reshape(num_heads, -1, len(array))
        case "token":
            return array[None, None]
        case "table":
            return array[None]
    return array


def _compare(found: Collection[str], expected: Collection[str], problem: str) -> None:
    lines = [f"  {name}: not expected" for name in sorted(set(found) - set(expected))]
    lines += [f"  {name}: missing" for name in sorted(set(expected) - set(found))]
    if lines:
        more = [f"  ... and {len(lines) - 20} more"] if len(lines) > 20 else []
        raise InputError("\n".join([f"{problem}:", *lines[:20], *more]))


def exportable(
    params: dict,
    description: dict,
    target: str,
    mlps: tuple[str, ...] = ("gelu", "gelu_tanh"),
    parallel: bool = False,
) -> tuple[dict, ModelConfig]:
    """Returns unrolled parameters for export, and their resolved config.

    Fixed positions (`none`, `sincos_2d`) of a ViT become an array like learned ones, except beside
    rotary ones. Raises ValueError if the description doesn't fit the parameters, and for options
    that no PyTorch ViT supports. `mlps`, `parallel`: what the target supports.
    """
    fields, names = {**description["model"], "scan": False}, description.get("class_names")
    if names is not None and len(names) != description["num_classes"]:
        raise InputError(f"{len(names)} class names for {description['num_classes']} classes")
    params, model = checked(unstack(params), {**description, "model": fields})
    if model.grid is None:
        return params, model.config
    config, tokens = model.config, math.prod(model.grid)
    width = params["embedding/kernel"].shape[-1]
    for field, value, held in (
        ("position", config.position, ("learned_1d", "sincos_2d", "none")),
        ("position_at", config.position_at or "stem", ("stem",)),
        ("parallel", config.parallel, (False, parallel)),
        ("mlp", config.mlp, mlps),
    ):
        if value not in held:
            choices = " or ".join(map(repr, dict.fromkeys(held)))
            raise InputError(f"{target} can't hold this model: {field} = {value!r}, not {choices}")
    if config.position == "sincos_2d":
        params = {**params, "pos_embedding": sincos_2d(model.grid, width)}
    elif config.position == "none" and config.rotary == "none":
        params = {**params, "pos_embedding": np.zeros((1, tokens, width), np.float32)}
    return params, config


def checked(params: dict, description: dict) -> tuple[dict, Model]:
    """Returns the parameters and the described model; ValueError unless names and shapes fit."""
    model = described_model(description)
    shapes = _shapes(model)
    problem = f"the weights don't fit {model.config.variant} as described"
    _compare(params, shapes, problem)
    wrong = [n for n, shape in shapes.items() if floats(n, params[n]).shape != shape]
    if wrong:
        lines = [f"  {n}: {params[n].shape}, expected {shapes[n]}" for n in sorted(wrong)]
        raise InputError("\n".join([f"{problem}:", *lines[:20]]))
    return params, model


@functools.lru_cache
def _shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every parameter."""
    shapes = flatten(jax.eval_shape(lambda: model.init(jax.random.key(0))))
    return {name: shape.shape for name, shape in shapes.items()}


_PREFIX = ("cls", "distillation", "registers")  # before the patches, in this order everywhere


def with_prefix_slots(params: dict) -> dict:
    """Pads position embeddings [1, N, D] to [1, prefix + N, D], as PyTorch's models have them.

    The slots are zero: the positions of `cls` and `registers` are part of these tokens.
    """
    if "pos_embedding" not in params:
        return params
    position = params["pos_embedding"]
    slots = sum(params[name].shape[1] for name in _PREFIX if name in params)
    return {**params, "pos_embedding": np.pad(position, ((0, 0), (slots, 0), (0, 0)))}


def without_prefix_slots(params: dict, tokens: int) -> dict:
    """Inverts `with_prefix_slots`: adds each slot to its token. Does nothing without slots.

    The first tokens may have slots and the registers none, as in Hugging Face's DINOv2.
    """
    if "pos_embedding" not in params:
        return params
    params = dict(params)
    position, start = params["pos_embedding"], 0
    lengths = {name: params[name].shape[1] for name in _PREFIX if name in params}
    every, slots = sum(lengths.values()), position.shape[1] - tokens
    if slots not in (0, every, every - lengths.get("registers", 0)):
        raise InputError(
            f"position embeddings {position.shape} don't fit {tokens} patches and {every} other "
            "tokens: check the config's image size"
        )
    for name, length in lengths.items():
        if start < slots:
            slot = position[:, start : start + length]
            start += length
            if slot.any():  # -0.0 + 0.0 would change a bit
                params[name] = params[name] + slot
    return {**params, "pos_embedding": position[:, slots:]} if slots else params


def pixels(description: dict, mean: Iterable[float], std: Iterable[float]) -> None:
    """Notes in a description how pixels in [0, 1] are standardised, unless it is our default."""
    for name, values in (("mean", tuple(mean)), ("std", tuple(std))):
        if values != MEAN:
            description["model"][name] = list(values)


def reordered(params: dict, order: np.ndarray) -> dict:
    """Reorders the features of each head's queries and keys; the products are the same.

    Raises ValueError for a head of another size.
    """
    pattern = re.compile(
        r"Transformer/encoderblock_\d+/MultiHeadDotProductAttention_0/"
        r"((query|key)/(kernel|bias)|(query|key)_norm/scale)"
    )
    found = {name: array for name, array in params.items() if pattern.fullmatch(name)}
    if not isinstance(order, slice):
        for name, array in found.items():
            if array.shape[-1] != len(order):
                raise InputError(f"{name} {array.shape}: expected heads of {len(order)} features")
    return params | {n: np.ascontiguousarray(array[..., order]) for n, array in found.items()}


def described(
    params: dict, image_size: tuple[int, int], fields: dict, class_names: list[str] | None
) -> tuple[dict, dict]:
    """Returns parameters and description; `fields`: of ModelConfig, not visible in weights."""
    description = describe(params, image_size)
    description["model"] |= fields
    if class_names and len(class_names) == description["num_classes"]:
        description["class_names"] = class_names
    return params, description
