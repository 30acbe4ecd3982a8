"""Tables of timm's tensor names and ours: ViT, hybrid stems, BiT ResNets, Mixer."""

import math
import re
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
    "MlpBlock_0/Dense_1": "mlp.fc2",
    "MlpBlock_0/Dense_0": "mlp.fc1",
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
_OPTIONAL = {  # of a block; a whole layer each
    "MlpBlock_0/gate": "mlp.gate",
    "MlpBlock_0/norm": "mlp.norm",
    f"{_ATTENTION}/norm": "attn.norm",
}
# Tensors that timm concatenates along the first axis.
_FUSED = {
    "attn.qkv": ("attn.q", "attn.k", "attn.v"),
    "attn_pool.kv": ("attn_pool.k", "attn_pool.v"),
}
# Names in timm's Eva, and of gated MLPs -> those in its VisionTransformer, or ours above.
_RENAMES = (
    (r"\.attn\.([qkv])_proj\.", r".attn.\1."),
    (r"\.attn\.([qv])_bias$", r".attn.\1.bias"),
    (r"\.gamma_([12])$", r".ls\1.gamma"),
    (r"\.mlp\.fc1_g\.", ".mlp.gate."),
    (r"\.mlp\.fc1_x\.", ".mlp.fc1."),
)


def vit_pairs(
    depth: int,
    stages: tuple[int, ...] | None,
    names: Collection[str],
    side: str,
    parallel: bool = False,
) -> list[Pair]:
    """Returns the pairs of a ViT, or with `stages` of a hybrid; optional ones if in `names`.

    `parallel`: blocks have one norm, and norms no bias.
    """
    pairs = [Pair("embedding/kernel", "patch_embed.proj.weight", "conv")]
    probe = Pair("MAPHead_0/probe", "attn_pool.latent", "tokens")
    optional = [
        [Pair("embedding/bias", "patch_embed.proj.bias")],
        [Pair("pos_embedding", "pos_embed", "tokens")],
        [Pair("cls", "cls_token", "tokens")],
        [Pair("distillation", "dist_token", "tokens")],
        [Pair("registers", "reg_token", "tokens")],
        norm("pre_norm", "norm_pre"),
        norm("Transformer/encoder_norm", "norm"),
        norm("pooled_norm", "fc_norm"),
        [probe, *attention_and_mlp("MAPHead_0/", "attn_pool.", _MAP_HEAD)],
        [Pair("head/kernel", "head.weight", "dense")],
        [Pair("head/bias", "head.bias")],
        linear("head_distillation", "head_dist"),
    ]
    if side == "theirs":  # only in files of older timm versions
        optional.append(linear("pre_logits", "pre_logits.fc"))
    for i in range(depth):
        ours, theirs = f"Transformer/encoderblock_{i}/", f"blocks.{i}."
        block = attention_and_mlp(ours, theirs, _BLOCK)
        biases = [pair for pair in block if re.search(r"/(query|key|value)/bias", pair.ours)]
        pairs += [pair for pair in block if pair not in biases]
        optional += [
            *([pair] for pair in biases),
            *(attention_and_mlp(ours, theirs, {a: b}) for a, b in _OPTIONAL.items()),
            [Pair(f"{ours}layer_scale_{j}", f"{theirs}ls{j + 1}.gamma") for j in range(2)],
            [Pair(f"{ours}rotary_frequencies", f"{theirs}rope", "tokens")],
            [
                Pair(f"{ours}{_ATTENTION}/{x}_norm/scale", f"{theirs}attn.{x[0]}_norm.weight")
                for x in ("query", "key")
            ],
        ]
    if stages is not None:
        pairs += stem_pairs(stages, BACKBONE + ("stem." if stages else ""), BACKBONE, "v1")
    pairs += present(optional, names, side)
    missing = re.compile(r".*(?:LayerNorm_1/scale|(?:LayerNorm_\d|_norm)/bias)")
    return [pair for pair in pairs if not (parallel and missing.fullmatch(pair.ours))]


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


def fuse(arrays: dict[str, np.ndarray], eva: bool = False) -> dict[str, np.ndarray]:
    """Concatenates query, key and value, and a gated MLP's layers; adds zero biases to their norms.

    `eva`: names of timm's Eva instead of its VisionTransformer.
    """
    arrays = dict(arrays)
    for gate in [name for name in arrays if ".mlp.gate." in name]:
        layer = gate.replace("gate", "fc1")
        separate = eva and gate.partition(".gate.")[0] + ".norm.weight" in arrays
        if separate:
            arrays[layer.replace("fc1", "fc1_x")] = arrays.pop(layer)
            arrays[layer.replace("fc1", "fc1_g")] = arrays.pop(gate)
        else:
            arrays[layer] = np.concatenate([arrays.pop(gate), arrays[layer]])
    for whole, parts in _FUSED.items():
        for first in [name for name in arrays if name.rpartition(".")[0].endswith(parts[0])]:
            names = [first.replace(parts[0], part) for part in parts]
            if all(name in arrays for name in names):
                pieces = [arrays.pop(name) for name in names]
                arrays[first.replace(parts[0], whole)] = np.concatenate(pieces)
            else:  # Eva's keys have no bias
                for name in [name for name in names if name in arrays]:
                    arrays[re.sub(r"\.([qv])\.bias$", r".\1_bias", name)] = arrays.pop(name)
    if eva:
        frequencies = [name for name in arrays if name.endswith(".rope")]
        if frequencies:
            arrays["rope.freqs"] = np.stack([arrays.pop(name) for name in frequencies], axis=1)
        arrays = {re.sub(r"\.ls([12])\.gamma$", r".gamma_\1", n): a for n, a in arrays.items()}
    for name in [name for name in arrays if name.endswith(("q_norm.weight", "k_norm.weight"))]:
        arrays[name.replace("weight", "bias")] = np.zeros_like(arrays[name])
    return arrays


def split(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Inverts `fuse`; raises ValueError for a non-zero bias in a LayerNorm of queries or keys."""
    arrays = dict(arrays)
    if "rope.freqs" in arrays:
        for i, frequencies in enumerate(np.moveaxis(arrays.pop("rope.freqs"), 1, 0)):
            arrays[f"blocks.{i}.rope"] = frequencies
    fused = {**_FUSED}
    if any(re.fullmatch(r"blocks\.0\.mlp\.fc1\.weight", n) for n in arrays) and _packed(arrays):
        fused["mlp.fc1"] = ("mlp.gate", "mlp.fc1")
    for whole, parts in fused.items():
        for name in [name for name in arrays if name.rpartition(".")[0].endswith(whole)]:
            if name.startswith("attn_pool.mlp"):
                continue
            array = arrays.pop(name)
            if not array.ndim or len(array) % len(parts):
                raise InputError(f"{name} {array.shape}: expected {len(parts)} equal parts")
            for part, piece in zip(parts, np.split(array, len(parts)), strict=True):
                arrays[name.replace(whole, part)] = piece
    for old, new in _RENAMES:
        arrays = {re.sub(old, new, name): array for name, array in arrays.items()}
    for name in [name for name in arrays if name.endswith(("q_norm.bias", "k_norm.bias"))]:
        if arrays.pop(name).any():
            raise InputError(f"{name} is not zero: norms of queries and keys have no bias here")
    return arrays


_PARALLEL = {  # names in timm's ParallelScalingBlock -> those in its Block
    "in_norm.weight": "norm1.weight",
    "mlp_bias": "mlp.fc1.bias",
    **{f"{x}_norm.weight": f"attn.{x}_norm.weight" for x in "qk"},
    **{f"attn_out_proj.{leaf}": f"attn.proj.{leaf}" for leaf in ("weight", "bias")},
    **{f"mlp_out_proj.{leaf}": f"mlp.fc2.{leaf}" for leaf in ("weight", "bias")},
}
_LAYERS = ("mlp.fc1", "attn.q", "attn.k", "attn.v")  # of which `in_proj` is made


def split_parallel(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Renames a parallel block's tensors, and splits the kernel of its first layers."""
    found = {}
    for name, array in arrays.items():
        block, leaf = re.fullmatch(r"(blocks\.\d+\.)?(.*)", name).groups(default="")
        if leaf == "in_proj.weight" and array.ndim == 2 and len(array) > 3 * array.shape[1]:
            ends = len(array) - np.arange(3, 0, -1) * array.shape[1]
            pieces = zip(_LAYERS, np.split(array, ends), strict=True)
            found |= {f"{block}{layer}.weight": piece for layer, piece in pieces}
        else:
            found[block + (_PARALLEL.get(leaf, leaf) if block else leaf)] = array
    return found


def fuse_parallel(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Inverts `split_parallel`."""
    arrays, theirs = dict(arrays), {new: old for old, new in _PARALLEL.items()}
    for first in [name for name in arrays if name.endswith(f"{_LAYERS[0]}.weight")]:
        pieces = [arrays.pop(first.replace(_LAYERS[0], layer)) for layer in _LAYERS]
        arrays[first.replace(f"{_LAYERS[0]}.", "in_proj.")] = np.concatenate(pieces)

    def rename(name):
        block, leaf = re.fullmatch(r"(blocks\.\d+\.)?(.*)", name).groups(default="")
        return block + (theirs.get(leaf, leaf) if block else leaf)

    return {rename(name): array for name, array in arrays.items()}


def _packed(arrays: dict[str, np.ndarray]) -> bool:
    """Whether the first dense layer of the MLPs holds a gate too: twice the second's inputs."""
    first, second = (arrays.get(f"blocks.0.mlp.fc{i}.weight", np.empty(0)) for i in (1, 2))
    return first.ndim == second.ndim == 2 and first.shape[0] == 2 * second.shape[1]


def rotary_order(head_dim: int, *, half: bool, columns_first: bool) -> np.ndarray:
    """Returns the index in timm's head of each of our features.

    Ours are K / 2 first elements of pairs, then K / 2 second ones; of either the first half is
    rotated by rows. timm's pairs are neighbours unless `half`.
    """
    pair = np.arange(head_dim // 2)
    pair = np.roll(pair, head_dim // 4) if columns_first else pair
    first, second = (pair, pair + head_dim // 2) if half else (2 * pair, 2 * pair + 1)
    return np.concatenate([first, second])


def ratio(mlp_dim: int, width: int) -> float:
    """Returns a ratio with int(width * ratio) == mlp_dim, as timm computes it."""
    exact = mlp_dim / width
    return exact if int(width * exact) == mlp_dim else math.nextafter(exact, math.inf)
