"""Tables of timm's tensor names and ours: ViT, hybrid stems, BiT ResNets, Mixer."""

from collections.abc import Collection

import numpy as np

from vit_jax.config import InputError
from vit_jax.weights.describe import count
from vit_jax.weights.pytorch import Pair, attention_and_mlp, linear, norm, present

BACKBONE = "patch_embed.backbone."  # prefix of a hybrid's ResNet
_ATTENTION = "MultiHeadDotProductAttention_0"
_BLOCK = {
    "LayerNorm_0": "norm1",
    f"{_ATTENTION}/query": "attn.q",
    f"{_ATTENTION}/key": "attn.k",
    f"{_ATTENTION}/value": "attn.v",
    f"{_ATTENTION}/out": "attn.proj",
    "LayerNorm_1": "norm2",
    "MlpBlock_0/Dense_0": "mlp.fc1",
    "MlpBlock_0/Dense_1": "mlp.fc2",
}
_MAP_HEAD = {
    f"{_ATTENTION}/query": "q",
    f"{_ATTENTION}/key": "k",
    f"{_ATTENTION}/value": "v",
    f"{_ATTENTION}/out": "proj",
    "LayerNorm_0": "norm",
    "MlpBlock_0/Dense_0": "mlp.fc1",
    "MlpBlock_0/Dense_1": "mlp.fc2",
}
_MIXER_BLOCK = {
    "LayerNorm_0": "norm1",
    "token_mixing/Dense_0": "mlp_tokens.fc1",
    "token_mixing/Dense_1": "mlp_tokens.fc2",
    "LayerNorm_1": "norm2",
    "channel_mixing/Dense_0": "mlp_channels.fc1",
    "channel_mixing/Dense_1": "mlp_channels.fc2",
}
# Tensors that timm concatenates along the first axis.
_FUSED = {
    "attn.qkv": ("attn.q", "attn.k", "attn.v"),
    "attn_pool.kv": ("attn_pool.k", "attn_pool.v"),
}


def vit_pairs(
    depth: int, stages: tuple[int, ...] | None, names: Collection[str], side: str
) -> list[Pair]:
    """Returns the pairs of a ViT, or with `stages` of a hybrid; optional ones if in `names`."""
    pairs = [
        *linear("embedding", "patch_embed.proj", "conv"),
        Pair("pos_embedding", "pos_embed", "tokens"),
        *norm("Transformer/encoder_norm", "norm"),
    ]
    probe = Pair("MAPHead_0/probe", "attn_pool.latent", "tokens")
    optional = [
        [Pair("cls", "cls_token", "tokens")],
        [Pair("registers", "reg_token", "tokens")],
        [probe, *attention_and_mlp("MAPHead_0/", "attn_pool.", _MAP_HEAD)],
        linear("head", "head"),
    ]
    if side == "theirs":  # only in files of older timm versions
        optional.append(linear("pre_logits", "pre_logits.fc"))
    for i in range(depth):
        ours, theirs = f"Transformer/encoderblock_{i}/", f"blocks.{i}."
        pairs += attention_and_mlp(ours, theirs, _BLOCK)
        optional += [
            [Pair(f"{ours}layer_scale_{j}", f"{theirs}ls{j + 1}.gamma") for j in range(2)],
            [
                Pair(f"{ours}{_ATTENTION}/{x}_norm/scale", f"{theirs}attn.{x[0]}_norm.weight")
                for x in ("query", "key")
            ],
        ]
    if stages is not None:
        pairs += stem_pairs(stages, BACKBONE + ("stem." if stages else ""), BACKBONE, "v1")
    return pairs + present(optional, names, side)


def bit_pairs(stages: tuple[int, ...]) -> list[Pair]:
    """Returns the pairs of a pre-activation ResNet, whose classifier is a 1x1 convolution."""
    pairs = stem_pairs(stages, "stem.", "", "v2")
    return [*pairs, *norm("gn_head", "norm"), *linear("head", "head.fc", "pointwise")]


def stem_pairs(stages: tuple[int, ...], root: str, prefix: str, version: str) -> list[Pair]:
    """Returns the pairs of a ResNet's root and stages; `root`, `prefix`: timm's paths to them."""
    pairs = [Pair("conv_root/kernel", f"{root}conv.weight", "conv")]
    if version == "v1":
        pairs += norm("gn_root", f"{root}norm")
    for stage, units in enumerate(stages):
        for unit in range(units):
            ours = f"block{stage + 1}/unit{unit + 1}/"
            theirs = f"{prefix}stages.{stage}.blocks.{unit}."
            for i in (1, 2, 3):
                pairs.append(Pair(f"{ours}conv{i}/kernel", f"{theirs}conv{i}.weight", "conv"))
                pairs += norm(f"{ours}gn{i}", f"{theirs}norm{i}")
            if unit == 0:
                projection = f"{theirs}downsample."
                pairs.append(Pair(f"{ours}conv_proj/kernel", f"{projection}conv.weight", "conv"))
                if version == "v1":
                    pairs += norm(f"{ours}gn_proj", f"{projection}norm")
    return pairs


def mixer_pairs(depth: int) -> list[Pair]:
    """Returns the pairs of a Mixer."""
    pairs = linear("stem", "stem.proj", "conv") + norm("pre_head_layer_norm", "norm")
    for i in range(depth):
        pairs += attention_and_mlp(f"MixerBlock_{i}/", f"blocks.{i}.", _MIXER_BLOCK)
    return pairs + linear("head", "head")


def read_stages(names: Collection[str], prefix: str) -> tuple[int, ...]:
    """Counts the units per stage of a timm ResNet."""
    number = count(names, rf"{prefix}stages\.(\d+)\.")
    return tuple(count(names, rf"{prefix}stages\.{i}\.blocks\.(\d+)\.") for i in range(number))


def fuse(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Concatenates query, key and value tensors; adds zero biases to their LayerNorms."""
    arrays = dict(arrays)
    for whole, parts in _FUSED.items():
        for first in [name for name in arrays if name.rpartition(".")[0].endswith(parts[0])]:
            pieces = [arrays.pop(first.replace(parts[0], part)) for part in parts]
            arrays[first.replace(parts[0], whole)] = np.concatenate(pieces)
    for name in [name for name in arrays if name.endswith(("q_norm.weight", "k_norm.weight"))]:
        arrays[name.replace("weight", "bias")] = np.zeros_like(arrays[name])
    return arrays


def split(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Inverts `fuse`; raises ValueError for a non-zero bias in a LayerNorm of queries or keys."""
    arrays = dict(arrays)
    for whole, parts in _FUSED.items():
        for name in [name for name in arrays if name.rpartition(".")[0].endswith(whole)]:
            array = arrays.pop(name)
            if len(array) % len(parts):
                raise InputError(f"{name} {array.shape}: expected {len(parts)} equal parts")
            for part, piece in zip(parts, np.split(array, len(parts)), strict=True):
                arrays[name.replace(whole, part)] = piece
    for name in [name for name in arrays if name.endswith(("q_norm.bias", "k_norm.bias"))]:
        if arrays.pop(name).any():
            raise InputError(f"{name} is not zero: norms of queries and keys have no bias here")
    return arrays
