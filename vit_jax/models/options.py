"""The sizes of published architectures, and every option of a model with its source."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from vit_jax.config import InputError, build, setting

# Width, depth, MLP width, heads. Table 1 of arXiv 2010.11929 (B, L, H) and its figure 4 (b, all of
# B's widths halved), arXiv 2106.10270 (Ti, S), arXiv 2106.04560 (s, g, G), arXiv 2209.06794 (e),
# arXiv 2305.13035 (So400m), big_vision (mu, M); nano is ours, for tests and the quickstart.
VIT_SIZES: dict[str, tuple[int, int, int, int]] = {
    "mu": (32, 1, 128, 2),
    "nano": (96, 4, 192, 3),
    "Ti": (192, 12, 768, 3),
    "s": (256, 6, 1024, 8),
    "S": (384, 12, 1536, 6),
    "b": (384, 12, 1536, 6),
    "M": (512, 12, 2048, 8),
    "B": (768, 12, 3072, 12),
    "L": (1024, 24, 4096, 16),
    "So400m": (1152, 27, 4304, 16),
    "H": (1280, 32, 5120, 16),
    "g": (1408, 40, 6144, 16),
    "G": (1664, 48, 8192, 16),
    "e": (1792, 56, 15360, 16),
}
# Width, depth, MLP widths across tokens and across channels: Table 1 of arXiv 2105.01601.
MIXER_SIZES: dict[str, tuple[int, int, int, int]] = {
    "S": (512, 8, 256, 2048),
    "B": (768, 12, 384, 3072),
    "L": (1024, 24, 512, 4096),
}
# Units of the four stages: arXiv 1512.03385 and 1912.11370; 26 from arXiv 2106.10270.
RESNET_STAGES: dict[str, tuple[int, ...]] = {
    "26": (2, 2, 2, 2),
    "50": (3, 4, 6, 3),
    "101": (3, 4, 23, 3),
    "152": (3, 8, 36, 3),
    "200": (3, 24, 36, 3),
}
# (Stem, number after "/") -> stages, patch side on the stem's output. Section 4.1 of arXiv
# 2010.11929 ("/16" moves the fourth stage's units to the third); arXiv 2106.10270 ("R+Ti/16"
# downsamples by 32).
HYBRID_STEMS: dict[tuple[str, str], tuple[tuple[int, ...], int]] = {
    ("R", "16"): ((), 8),
    ("R26", "32"): ((2, 2, 2, 2), 1),
    ("R50", "32"): ((3, 4, 6, 3), 1),
    ("R50", "16"): ((3, 4, 9), 1),
}
KNOWN = (
    *(f"ViT-{size}/{patch}" for size in VIT_SIZES for patch in (8, 14, 16, 32)),
    *(f"R{depth}x{width}" for depth in RESNET_STAGES for width in (1, 2, 3, 4)),
    *(f"{stem}+ViT-{s}/{side}" for stem, side in HYBRID_STEMS for s in ("Ti", "S", "B", "L")),
    *(f"Mixer-{size}/{patch}" for size in MIXER_SIZES for patch in (16, 32)),
)
POOLS = ("token", "gap", "map", "token+gap")
RESIZES = ("bilinear", "bilinear_antialias", "bicubic", "bicubic_antialias")
FINAL_NORMS = ("tokens", "pooled", "none")
DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """An architecture: "ViT-B/16", "R50x1", "R50+ViT-B/16", "R26+S/32", "Mixer-B/16", ...

    Fields with the value None take the size of the variant. A field that the variant's family
    doesn't have must stay at its default.
    """

    variant: str  # a name of `vit_jax models`, or another of these forms
    width: int | None = None  # of the tokens
    depth: int | None = None  # blocks
    mlp_dim: int | None = None  # hidden width of the MLP
    num_heads: int | None = None  # of attention
    token_mlp_dim: int | None = None  # Mixer
    stages: tuple[int, ...] | None = None  # ResNet and hybrid: units per stage
    stem_width: int | None = None  # ResNet and hybrid: channels of the root; 64 for "x1"
    preactivation: bool = True  # ResNet: v2, as BiT; False: v1, as the hybrids' stems
    # ResNet v2: max pooling pads with 0, as in BiT's training; False: with -inf, as in big_vision.
    # Logits differ in the fourth digit.
    zero_padded_pool: bool = False
    # ResNet: features are mean and deviation of the channels of every stage's output, not the mean
    # of the last. Better for a head on frozen features (Head2Toe, arXiv 2201.03529).
    stage_features: bool = False

    # token: class token | gap: mean of patches | map: attention pooling (arXiv 2106.04560) |
    # token+gap: the first two in one vector, as DINOv2's linear heads (arXiv 2304.07193).
    pool: str = "token"
    pool_heads: int | None = None  # of attention pooling; None: num_heads
    pool_mlp_dim: int | None = None  # of attention pooling; None: mlp_dim
    class_token: bool | None = None  # None: where pool reads it
    distillation: bool = False  # second class token and head, averaged (DeiT, arXiv 2012.12877)
    # Place of the last LayerNorm: tokens: before pooling | pooled: after it, as MAE fine-tunes
    # (arXiv 2111.06377) | none.
    final_norm: str = "tokens"
    # Width of the tanh layer `pre_logits`; -1: the model's width; None: no layer.
    representation_size: int | None = setting(None, inherited=False)
    position: str = "learned_1d"  # none | learned_1d | learned_2d | sincos_2d | relative | rotary
    position_at: str | None = None  # stem | layers | shared; None: layers for relative, rotary
    # How learned positions are resized to another grid (`weights.adapt`): bilinear: corner to
    # corner, as published | bicubic: as transformers' | bicubic_antialias: as timm's, and as
    # transformers' DINOv2 with registers | bilinear_antialias: as SigLIP 2's NaFlex models.
    position_resize: str = setting("bilinear", inherited=False)
    # Rotary positions in every block, beside `position`: none | axial | centred | mixed, see
    # `models.positions`.
    rotary: str = "none"
    rotary_base: float = 100.0  # ratio of the highest and lowest frequency
    rotary_reference: int | None = None  # axial: side of the grid to which coordinates are scaled
    rotary_offset: float = 0.0  # axial: added to the coordinates before scaling
    registers: int = 0  # learned tokens without a position (arXiv 2309.16588)
    # LayerNorm before the first block, and no bias in the patch embedding (CLIP, arXiv 2103.00020).
    pre_norm: bool = False

    # After every dense layer except query, key and value, and after the position embeddings.
    dropout: float = setting(0.0, inherited=False)
    attention_dropout: float = setting(0.0, inherited=False)  # of the attention weights
    # Drop rate of the last block's branches; grows linearly from 0 at the first block.
    stochastic_depth: float = setting(0.0, inherited=False)
    qkv_bias: str = "qkv"  # which of query, key, value have a bias; qv: as BEiT (arXiv 2106.08254)
    qk_norm: bool = False  # LayerNorm of queries and keys (ViT-22B, arXiv 2302.05442)
    layer_scale: float | None = None  # initial scale of every branch (arXiv 2103.17239)
    parallel: bool = False  # attention and MLP in parallel; no biases in q, k, v, norms (ViT-22B)
    # LayerNorm of the attention's and of the MLP's hidden features (EVA-02, arXiv 2303.11331).
    attention_norm: bool = False
    mlp_norm: bool = False
    # gelu_tanh: as published | gelu: exact, as PyTorch's | quick_gelu: x sigmoid(1.702 x), OpenAI's
    # CLIP | swiglu (arXiv 2002.05202)
    mlp: str = "gelu_tanh"
    norm_epsilon: float = 1e-6  # of LayerNorm

    # Mean and standard deviation of pixels in [0, 1], by channel, that the model standardises with.
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    # Rank and scale of LoRA's adapters of attention; 0: none (`models.lora`).
    lora_rank: int = setting(0, inherited=False)
    lora_alpha: float = setting(16.0, inherited=False)
    # Predictions per patch; set by masked patch prediction.
    patch_outputs: int | None = None
    # Initial bias of the head, for example -10 for a sigmoid loss over many classes.
    head_bias: float = setting(0.0, inherited=False)
    # Implementation of attention (`models.attention`): auto | xla | pallas | cudnn. Results agree
    # within rounding.
    attention: str = setting("auto", changes="speed")
    dtype: str = "bfloat16"  # of activations and matrix products; parameters are float32
    # Loops over all blocks except the last. Compiles faster, runs slower except on CPUs, same
    # results. In the loop, remat = none means dots.
    scan: bool = setting(False, inherited=False)
    # Recomputation in the backward pass: none | dots | full. Same results.
    remat: str = setting("none", changes="speed", inherited=False)

    @property
    def has_class_token(self) -> bool:
        """`class_token`, or whether `pool` reads one."""
        return self.pool in ("token", "token+gap") if self.class_token is None else self.class_token


@dataclasses.dataclass(frozen=True)
class Description:
    """The JSON beside a model's parameters."""

    model: ModelConfig
    num_classes: int
    image_size: tuple[int, int]  # height, width
    class_names: tuple[str, ...] = ()
    preprocess: str = "resize"  # see `data.augment.parse_preprocess`
    temperature: float = 1.0  # divides the logits
    notes: tuple[str, ...] = ()

    def __post_init__(self):
        if not self.temperature > 0:
            raise InputError(f"temperature = {self.temperature}: expected more than 0")

    @classmethod
    def read(cls, description: Mapping[str, Any]) -> "Description":
        """Checks every value's type; passes over keys of other versions."""
        names = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(description, Mapping):
            raise InputError(f"the model's description is {description!r}, expected an object")
        if missing := set(names[:3]) - description.keys():
            raise InputError(f"the model's description lacks {', '.join(sorted(missing))}")
        return build(cls, {n: description[n] for n in names if n in description}, "description")


_COMMON = {"variant", "head_bias", "dtype", "remat", "mean", "std"}
_STEM = {"stages", "stem_width"}
_SIZES = ("width", "depth", "mlp_dim", "num_heads", "token_mlp_dim", "stem_width", "patch_outputs")
LEAST = dict.fromkeys((*_SIZES, "pool_heads", "pool_mlp_dim", "rotary_reference"), 1)
LEAST |= {"registers": 0, "representation_size": -1}
_RESNET = {"preactivation", "zero_padded_pool", "stage_features"}
_VIT = {f.name for f in dataclasses.fields(ModelConfig)} - _STEM - _RESNET - {"token_mlp_dim"}
_MIXER = {"width", "depth", "mlp_dim", "token_mlp_dim", "dropout", "stochastic_depth", "mlp"}
FIELDS: dict[str, set[str]] = {
    "ViT": _VIT,
    "hybrid": _VIT | _STEM,
    "ResNet": _COMMON | _STEM | _RESNET,
    "Mixer": _COMMON | _MIXER | {"norm_epsilon"},
}
