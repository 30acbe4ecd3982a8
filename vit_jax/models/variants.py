"""Builds models from architecture names such as "ViT-B/16".

The rest of the package calls `build_model`, then `init`, `apply` and `intermediates` on nested
dicts. Nothing outside `models/` imports flax.
"""

import dataclasses
import fnmatch
import re
from typing import Any

import chex
import jax
import jax.numpy as jnp

from vit_jax.config import InputError, build, setting, unknown
from vit_jax.models import names
from vit_jax.models.hardware import ATTENTIONS, misfit
from vit_jax.models.mixer import Mixer
from vit_jax.models.positions import IN_ATTENTION, KINDS, PLACES, Positions
from vit_jax.models.resnet import ResNet, StemConfig
from vit_jax.models.stacking import flatten, stack_layers, unstack, unstack_layers
from vit_jax.models.transformer import (
    MLPS,
    REMAT_POLICIES,
    Output,
    TransformerConfig,
)
from vit_jax.models.vit import ViT

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
POOLS = ("token", "gap", "map")
DTYPES = ("float32", "bfloat16")


def list_models(pattern: str = "*") -> list[str]:
    """Returns the names of known architectures that match a glob, such as "*B/16*"."""
    return sorted(fnmatch.filter(KNOWN, pattern))


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

    pool: str = "token"  # class token | gap: mean | map: attention pooling (arXiv 2106.04560)
    # Width of the tanh layer `pre_logits`; -1: the model's width; None: no layer.
    representation_size: int | None = setting(None, inherited=False)
    position: str = "learned_1d"  # none | learned_1d | learned_2d | sincos_2d | relative | rotary
    position_at: str | None = None  # stem | layers | shared; None: layers for relative, rotary
    registers: int = 0  # learned tokens without a position (arXiv 2309.16588)

    # After every dense layer except query, key and value, and after the position embeddings.
    dropout: float = setting(0.0, inherited=False)
    attention_dropout: float = setting(0.0, inherited=False)  # of the attention weights
    # Drop rate of the last block's branches; grows linearly from 0 at the first block.
    stochastic_depth: float = setting(0.0, inherited=False)
    qk_norm: bool = False  # LayerNorm of queries and keys (ViT-22B, arXiv 2302.05442)
    layer_scale: float | None = None  # initial scale of every branch (arXiv 2103.17239)
    parallel: bool = False  # attention and MLP in parallel; no biases in q, k, v, norms (ViT-22B)
    mlp: str = "gelu_tanh"  # as published | gelu: exact, as PyTorch's | swiglu (arXiv 2002.05202)
    norm_epsilon: float = 1e-6  # of LayerNorm

    lora_rank: int = setting(0, inherited=False)  # of LoRA's adapters of attention; 0: none
    lora_alpha: float = setting(16.0, inherited=False)  # they are scaled by alpha / rank
    patch_outputs: int | None = None  # predictions per patch; set by masked patch prediction
    head_bias: float = setting(0.0, inherited=False)  # initial; -10 for a sigmoid of many classes
    # Implementation of attention (`models.attention`): auto | xla | pallas | cudnn. Results agree
    # within rounding.
    attention: str = setting("auto", changes="speed")
    dtype: str = "bfloat16"  # of activations and matrix products; parameters are float32
    # Loops over all blocks except the last. Compiles faster, runs slower except on CPUs, same
    # results. In the loop, remat = none means dots.
    scan: bool = setting(False, inherited=False)
    # Recomputation in the backward pass: none | dots | full. Same results.
    remat: str = setting("none", changes="speed", inherited=False)


_COMMON = {"variant", "head_bias", "dtype", "remat"}
_STEM = {"stages", "stem_width"}
_SIZES = ("width", "depth", "mlp_dim", "num_heads", "token_mlp_dim", "stem_width", "patch_outputs")
_LEAST = dict.fromkeys(_SIZES, 1) | {"registers": 0, "representation_size": -1}
_RESNET = {"preactivation", "zero_padded_pool"}
_VIT = {f.name for f in dataclasses.fields(ModelConfig)} - _STEM - _RESNET - {"token_mlp_dim"}
_MIXER = {"width", "depth", "mlp_dim", "token_mlp_dim", "dropout", "stochastic_depth", "mlp"}
FIELDS: dict[str, set[str]] = {
    "ViT": _VIT,
    "hybrid": _VIT | _STEM,
    "ResNet": _COMMON | _STEM | _RESNET,
    "Mixer": _COMMON | _MIXER | {"norm_epsilon"},
}


@dataclasses.dataclass(frozen=True)
class Model:
    """A network for a fixed image size and number of classes."""

    config: ModelConfig
    num_classes: int
    image_size: tuple[int, int]
    module: ViT | ResNet | Mixer

    @property
    def grid(self) -> tuple[int, int] | None:
        """Rows and columns of the grid of patches of a ViT or hybrid; None for other families."""
        return self.module.positions.grid if isinstance(self.module, ViT) else None

    @property
    def description(self) -> dict[str, Any]:
        """What `described_model` needs to rebuild the model, for JSON; part of checkpoints."""
        return {
            "model": dataclasses.asdict(self.config),
            "num_classes": self.num_classes,
            "image_size": list(self.image_size),
        }

    def init(self, key: jax.Array) -> dict:
        """Returns initial float32 parameters, which don't depend on scan or remat."""
        module = self.module
        if isinstance(module, ViT):
            scanned = dataclasses.replace(module.config, scan=True, remat="none")
            module = module.clone(config=scanned)
        params = module.init(key, jnp.zeros((1, *self.image_size, 3)))["params"]
        if not isinstance(module, ViT):
            return params
        params = unstack_layers(params)
        return stack_layers(params, module.config.depth) if self.config.scan else params

    def apply(
        self,
        params: dict,
        images: jax.Array,
        keys: jax.Array | None = None,
        patch_indices: jax.Array | None = None,
    ) -> Output:
        """Runs the network.

        Args:
            params: nested parameters, as `init` returns them.
            images: [B, H, W, 3], uint8 or float in [-1, 1].
            keys: PRNG keys [B] for dropout; None turns it off.
            patch_indices: int [B, patches], for a ViT with `patch_outputs`: see `ViT`.
        """
        chex.assert_shape(images, (None, *self.image_size, 3))
        indices = () if patch_indices is None else (patch_indices,)
        return self.module.apply({"params": params}, normalize(images), keys, *indices)

    def intermediates(self, params: dict, images: jax.Array) -> dict[str, jax.Array]:
        """Returns activations inside the encoder of a ViT or hybrid.

        Returns:
            `blocks` [L, B, N, D], each block's output; `attention` [L, B, H, N, N], the attention
            weights; `encoded` [B, N, D], the output of the final norm.

        Raises:
            ValueError: the model has no encoder.
        """
        if not isinstance(self.module, ViT):
            raise InputError(
                f"{self.config.variant} has no Transformer encoder: use a ViT or a hybrid"
            )
        _, state = self.module.apply(
            {"params": params}, normalize(images), mutable=["intermediates"]
        )
        found = unstack(flatten(state["intermediates"]))
        weights = f"{names.ATTENTION}/attention/0"
        blocks = [names.ENCODER_BLOCK.format(i) for i in range(self.module.config.depth)]
        return {
            "blocks": jnp.stack([found[f"{block}output/0"] for block in blocks]),
            "attention": jnp.stack([found[f"{block}{weights}"] for block in blocks]),
            "encoded": found["Transformer/encoded/0"],
        }


def normalize(images: jax.Array) -> jax.Array:
    """Maps uint8 pixels to float32 in [-1, 1], as published; returns float images unchanged."""
    return (images.astype(jnp.float32) - 127.5) / 127.5 if images.dtype == jnp.uint8 else images


def build_model(config: ModelConfig, num_classes: int, image_size: tuple[int, int]) -> Model:
    """Builds the model of a config.

    Args:
        config: the architecture.
        num_classes: outputs of the head; 0 for no head.
        image_size: (height, width) in pixels.

    Raises:
        ValueError: an unknown variant, an image size that isn't a multiple of the patch, a field
            that the family doesn't have, or values that don't fit together.
    """
    family, config, patch = _resolve(config)
    _check(config, family, num_classes)
    downsampling = patch
    stem = None
    if family in ("ResNet", "hybrid"):
        version = "v1" if family == "hybrid" or not config.preactivation else "v2"
        stem = StemConfig(
            stages=config.stages,
            width=config.stem_width,
            version=version,
            zero_padded_pool=config.zero_padded_pool,
            dtype=jnp.dtype(config.dtype),
            remat=config.remat,
        )
        downsampling *= 4 * 2 ** max(len(config.stages) - 1, 0)
    if family != "ResNet":  # ResNets take any size
        _check_image_size(config.variant, image_size, downsampling)

    classifier = {"num_classes": num_classes, "head_bias": config.head_bias}
    if family == "ResNet":
        module = ResNet(stem=stem, **classifier)
    else:
        block = {f.name: getattr(config, f.name) for f in dataclasses.fields(TransformerConfig)}
        block = TransformerConfig(**{**block, "dtype": jnp.dtype(config.dtype)})
        if family == "Mixer":
            module = Mixer(block, patch, config.token_mlp_dim, **classifier)
        else:
            rows, columns = (side // downsampling for side in image_size)
            prefix = config.registers + (config.pool == "token")
            module = ViT(
                config=block,
                patch=patch,
                positions=Positions(config.position, config.position_at, (rows, columns), prefix),
                pool=config.pool,
                registers=config.registers,
                representation_size=config.representation_size,
                stem=stem,
                patch_outputs=config.patch_outputs,
                **classifier,
            )
    return Model(config, num_classes, image_size, module)


def described_model(description: dict[str, Any]) -> Model:
    """Inverts `Model.description`; raises ValueError for other dicts."""
    if missing := {"model", "num_classes", "image_size"} - description.keys():
        raise InputError(f"the model's description lacks {', '.join(sorted(missing))}")
    config = build(ModelConfig, description["model"], "model")
    return build_model(config, description["num_classes"], tuple(description["image_size"]))


def _resolve(config: ModelConfig) -> tuple[str, ModelConfig, int]:
    """Returns the family, the config with sizes instead of None, and the patch side."""
    name, sizes, patch = config.variant, None, 1
    if match := re.fullmatch(r"ViT-(\w+)/(\d+)", name):
        family, patch = "ViT", int(match[2])
        sizes = _transformer_sizes(match[1])
    elif match := re.fullmatch(r"(R\d*)(?:x(\d+))?\+(?:ViT-)?(\w+)/(\d+)", name):
        family, sizes = "hybrid", _transformer_sizes(match[3])
        stages, patch = HYBRID_STEMS.get((match[1], match[4]), (None, 0))
        sizes = sizes and {**sizes, "stages": stages, "stem_width": 64 * int(match[2] or 1)}
    elif match := re.fullmatch(r"R(\d+)(?:x(\d+))?", name):
        family, stages = "ResNet", RESNET_STAGES.get(match[1])
        sizes = stages and {"stages": stages, "stem_width": 64 * int(match[2] or 1)}
    elif match := re.fullmatch(r"Mixer-(\w+)/(\d+)", name):
        family, patch = "Mixer", int(match[2])
        fields = ("width", "depth", "token_mlp_dim", "mlp_dim")
        if match[1] in MIXER_SIZES:
            sizes = dict(zip(fields, MIXER_SIZES[match[1]], strict=True))
    if sizes is None or patch == 0 or sizes.get("stem_width") == 0:
        raise unknown("variant", name, KNOWN)
    for field in dataclasses.fields(ModelConfig):
        if field.name not in FIELDS[family] and getattr(config, field.name) != field.default:
            raise InputError(
                f"model.{field.name} = {getattr(config, field.name)!r}: {name} doesn't have this "
                f"field; a {family} has {', '.join(sorted(FIELDS[family]))}"
            )
    if family in ("ViT", "hybrid"):
        sizes["position_at"] = "layers" if config.position in IN_ATTENTION else "stem"
    given = {k: v for k in sizes if (v := getattr(config, k)) is not None}
    config = dataclasses.replace(config, **{**sizes, **given})
    if config.representation_size == -1:
        config = dataclasses.replace(config, representation_size=config.width)
    return family, config, patch


def _transformer_sizes(name: str) -> dict[str, int] | None:
    sizes = VIT_SIZES.get(name)
    return sizes and dict(zip(("width", "depth", "mlp_dim", "num_heads"), sizes, strict=True))


def _check(config: ModelConfig, family: str, num_classes: int) -> None:
    """Raises ValueError for values outside their range or that don't fit together."""
    choices = {"pool": POOLS, "dtype": DTYPES, "remat": REMAT_POLICIES, "mlp": MLPS}
    if family in ("ViT", "hybrid"):
        choices |= {"position": KINDS, "position_at": PLACES, "attention": ATTENTIONS}
    for kind, known in choices.items():
        if getattr(config, kind) not in known:
            raise unknown(kind, getattr(config, kind), known)
    if num_classes < 0:
        raise InputError(f"num_classes = {num_classes}: expected at least 1, or 0 for no head")
    for rate in ("dropout", "attention_dropout", "stochastic_depth"):
        if not 0.0 <= getattr(config, rate) < 1.0:
            raise InputError(f"{rate} = {getattr(config, rate)}: expected a rate in [0, 1)")
    for name, least in _LEAST.items():
        if (value := getattr(config, name)) is not None and value < least:
            raise InputError(f"{name} = {value}: expected {least} or more")
    if family in ("ViT", "hybrid"):
        if config.width % config.num_heads:
            raise InputError(f"width {config.width} does not divide into {config.num_heads} heads")
        units = {"learned_2d": 2, "sincos_2d": 4, "rotary": 4 * config.num_heads}
        if config.width % (unit := units.get(config.position, 1)):
            raise InputError(
                f"width {config.width}: {config.position} positions need a multiple of {unit}"
            )
        _check_attention(config)
    if config.zero_padded_pool and not config.preactivation:
        raise InputError("zero_padded_pool: expected preactivation=True; v1 ResNets pad as SAME")
    if config.stem_width is not None and config.stem_width % 32:
        raise InputError(f"stem_width = {config.stem_width}: expected a multiple of 32 (GroupNorm)")


def _check_attention(config: ModelConfig) -> None:
    if config.attention in ("auto", "xla"):
        return
    problem = misfit(config.attention, config.width // config.num_heads, config.dtype)
    if rate := config.attention_dropout:
        problem = f"attention_dropout = {rate} needs the weights, which it never stores"
    elif config.position == "relative":
        problem = "it doesn't support relative positions"
    if problem:
        raise InputError(f"attention = {config.attention!r}: {problem}; use 'auto' or 'xla'")


def _check_image_size(variant: str, image_size: tuple[int, int], unit: int) -> None:
    for side in image_size:
        if side % unit or side <= 0:
            below = max(side // unit, 1) * unit
            raise InputError(
                f"image size {image_size[0]}x{image_size[1]} is not a multiple of the patch of "
                f"{variant}: use a multiple of {unit} ({below} or {below + unit})"
            )
