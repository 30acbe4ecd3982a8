"""Regexes on parameter names.

A name is the "/"-joined path of a parameter, such as
"Transformer/encoderblock_0/MlpBlock_0/Dense_0/kernel". Scanned layers are stacked in one tensor:
"Transformer/encoderblock/MlpBlock_0/Dense_0/kernel". A new model family adds a row to `FAMILIES`.
"""

import re
from typing import NamedTuple


class Family(NamedTuple):
    """How the parameters of a model family are named. Regexes match from a name's first letter."""

    first_kernel: str  # the kernel that marks the family
    block: str | None  # regex of a numbered block; None for a family without blocks
    after_blocks: str  # regex of what follows the last block


FAMILIES = {
    "ViT": Family(
        "embedding/kernel",
        r"Transformer/encoderblock_(\d+)/",
        "Transformer/encoder_norm|MAPHead_0|pooled_norm|pre_logits|head|patch_head",
    ),
    "Mixer": Family("stem/kernel", r"MixerBlock_(\d+)/", "pre_head|head"),
    "ResNet": Family("conv_root/kernel", None, "head"),
}

ENCODER_BLOCK = "Transformer/encoderblock_{}/"  # prefix of an unrolled block, by number
MIXER_BLOCK = "MixerBlock_{}/"
STACKED_BLOCKS = "Transformer/encoderblock/"  # prefix of scanned blocks
ATTENTION = "MultiHeadDotProductAttention_0"

# Names of single parameters. The second group is relative to a block.
HEAD_KERNEL, HEAD_BIAS = "head/kernel", "head/bias"
CLASS_TOKEN, DISTILLATION, REGISTERS = "cls", "distillation", "registers"
PROBE, PROBE_BIAS = "MAPHead_0/probe", "MAPHead_0/MlpBlock_0/Dense_0/bias"
PROBE_QUERY = f"MAPHead_0/{ATTENTION}/query/kernel"
PRE_NORM, FINAL_NORM, POOLED_NORM = (
    "pre_norm/scale",
    "Transformer/encoder_norm/scale",
    "pooled_norm/scale",
)
PRE_LOGITS_BIAS = "pre_logits/bias"
POSITION = "pos_embedding"  # learned_1d
POSITION_ROWS, POSITION_COLUMNS = "pos_embedding_rows", "pos_embedding_columns"  # learned_2d
ROOT_KERNEL, ROOT_SCALE = "conv_root/kernel", "gn_root/scale"  # of a ResNet; the scale: v1

QUERY_BIAS, KEY_BIAS = f"{ATTENTION}/query/bias", f"{ATTENTION}/key/bias"
ATTENTION_NORM, MLP_NORM = f"{ATTENTION}/norm/scale", "MlpBlock_0/norm/scale"
ROTARY_FREQUENCIES = "rotary_frequencies"
QUERY_KERNEL, QUERY_NORM = f"{ATTENTION}/query/kernel", f"{ATTENTION}/query_norm/scale"
MLP_BIAS, GATE_KERNEL = "MlpBlock_0/Dense_0/bias", "MlpBlock_0/gate/kernel"
LAYER_SCALE = "layer_scale_0"
TOKEN_KERNEL, CHANNEL_BIAS = "token_mixing/Dense_0/kernel", "channel_mixing/Dense_0/bias"

# Modules with a kernel on RGB pixels; a model has the first that it contains.
PIXEL_MODULES = ("conv_root", "embedding", "stem")

# Regexes from a name's first letter: a ResNet's stages, and the units of stage number {}.
STAGE, UNIT = r"block(\d+)/", r"block{}/unit(\d+)/"

# Whole-name regexes.
DISTILLATION_HEAD = "head_distillation/"
HEAD = f"(head|{DISTILLATION_HEAD[:-1]})/.*"
KERNELS = ".*/kernel"
ATTENTION_LAYERS = ".*MultiHeadDotProductAttention.*"
ADAPTERS = ".*/lora_[ab]"  # LoRA
PRETRAINING_ONLY = ("pre_logits/.*", "mask_embedding", "patch_head/.*")
PATCH_KERNEL = "(embedding|stem)/kernel"
POSITIONS = f"(.*/)?{POSITION}"
POSITION_AXES = f"(.*/)?({POSITION_ROWS}|{POSITION_COLUMNS})"
RELATIVE_POSITIONS = "(.*/)?relative_embedding"
TOKEN_MIXING = ".*/token_mixing/.*"
PROJECTIONS = ".*/(query|key|value)/kernel"  # [D, H, K]

_BLOCK = "|".join(family.block for family in FAMILIES.values() if family.block)
# The matrices between embedding and head: of blocks, scanned or not, and of attention pooling.
HIDDEN_KERNELS = rf"({_BLOCK}|{STACKED_BLOCKS}|MAPHead_0/).*/kernel"
_AFTER_BLOCKS = "|".join(family.after_blocks for family in FAMILIES.values())


def block_number(name: str) -> int | None:
    """The number of the block that a parameter belongs to; None outside of numbered blocks."""
    match = re.match(_BLOCK, name)
    return int(match[match.lastindex]) if match else None


def is_stacked(name: str) -> bool:
    """Whether a parameter holds the layers of a scan along its first axis."""
    return name.startswith(STACKED_BLOCKS)


def follows_blocks(name: str) -> bool:
    """Whether a parameter belongs to what comes after the last block: final norm, pooling, head."""
    return re.match(_AFTER_BLOCKS, name) is not None
