"""Builds models from architecture names such as "ViT-B/16".

The rest of the package calls `build_model`, then `init`, `apply` and `intermediates` on nested
dicts. Nothing outside `models/` imports flax.
"""

import dataclasses
import fnmatch
import math
import re
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.config import InputError, unknown
from vit_jax.models import names
from vit_jax.models.hardware import ATTENTIONS, misfit
from vit_jax.models.head import Output
from vit_jax.models.mixer import Mixer
from vit_jax.models.options import (
    DTYPES,
    FIELDS,
    FINAL_NORMS,
    HYBRID_STEMS,
    KNOWN,
    LEAST,
    MIXER_SIZES,
    POOLS,
    RESIZES,
    RESNET_STAGES,
    VIT_SIZES,
    Description,
    ModelConfig,
)
from vit_jax.models.positions import IN_ATTENTION, KINDS, PLACES, ROTARY, Positions, Rotary
from vit_jax.models.resnet import ResNet, StemConfig
from vit_jax.models.stacking import flatten, stack_layers, unstack, unstack_layers
from vit_jax.models.transformer import (
    BIASED,
    MLPS,
    REMAT_POLICIES,
    TransformerConfig,
)
from vit_jax.models.vit import ViT

MAX_SIDE = 1 << 15  # pixels of an image for a ResNet
MAX_PATCHES = 1 << 18  # of an image; tables of fixed positions take memory for each


def list_models(pattern: str = "*") -> list[str]:
    """Returns the names of known architectures that match a glob, such as "*B/16*"."""
    return sorted(fnmatch.filter(KNOWN, pattern))


@dataclasses.dataclass(frozen=True)
class Model:
    """A network for a fixed image size and number of classes.

    If it `measures`, its outputs have the mean squares of its blocks' outputs.
    """

    config: ModelConfig
    num_classes: int
    image_size: tuple[int, int]
    module: ViT | ResNet | Mixer
    measures: bool = dataclasses.field(default=False, kw_only=True)

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
        given = ({"params": params}, self._standardised(images), keys, *indices)
        if not self.measures:
            return self.module.apply(*given)
        output, measured = self.module.apply(*given, mutable=["squares"])
        return output._replace(squares=measured["squares"])

    def _standardised(self, images: jax.Array) -> jax.Array:
        """Maps uint8 pixels, or floats in [-1, 1], to what the network was trained on."""
        images = normalize(images)
        mean, std = (np.asarray(x, np.float64) for x in (self.config.mean, self.config.std))
        if (mean == 0.5).all() and (std == 0.5).all():
            return images
        return images * np.float32(0.5 / std) + np.float32((0.5 - mean) / std)

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
            {"params": params}, self._standardised(images), mutable=["intermediates"]
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
    if family != "ResNet":
        _check_image_size(config.variant, image_size, downsampling)
    elif not all(0 < side <= MAX_SIDE for side in image_size):
        raise InputError(f"image size {image_size}: expected sides of 1 to {MAX_SIDE:,} pixels")

    classifier = {"num_classes": num_classes, "head_bias": config.head_bias}
    if family == "ResNet":
        module = ResNet(stem=stem, stage_features=config.stage_features, **classifier)
    else:
        block = {f.name: getattr(config, f.name) for f in dataclasses.fields(TransformerConfig)}
        block = TransformerConfig(**{**block, "dtype": jnp.dtype(config.dtype)})
        if family == "Mixer":
            module = Mixer(block, patch, config.token_mlp_dim, **classifier)
        else:
            rows, columns = (side // downsampling for side in image_size)
            prefix = config.registers + config.has_class_token + config.distillation
            rotary = (config.rotary_base, config.rotary_reference, config.rotary_offset)
            module = ViT(
                config=block,
                patch=patch,
                positions=Positions(
                    config.position,
                    config.position_at,
                    (rows, columns),
                    prefix,
                    rotary=None if config.rotary == "none" else Rotary(config.rotary, *rotary),
                ),
                pool=config.pool,
                pool_config=dataclasses.replace(
                    block,
                    num_heads=config.pool_heads or config.num_heads,
                    mlp_dim=config.pool_mlp_dim or config.mlp_dim,
                    qkv_bias="qkv",
                    attention_norm=False,
                    mlp_norm=False,
                ),
                final_norm=config.final_norm,
                pre_norm=config.pre_norm,
                class_token=config.has_class_token,
                distillation=config.distillation,
                registers=config.registers,
                representation_size=config.representation_size,
                stem=stem,
                patch_outputs=config.patch_outputs,
                **classifier,
            )
    return Model(config, num_classes, image_size, module)


def described_model(description: dict[str, Any]) -> Model:
    """Inverts `Model.description`; raises ValueError for other dicts."""
    described = Description.read(description)
    return build_model(described.model, described.num_classes, described.image_size)


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
        choices |= {"rotary": ROTARY, "final_norm": FINAL_NORMS, "qkv_bias": BIASED}
        choices |= {"position_resize": RESIZES}
    for kind, known in choices.items():
        if getattr(config, kind) not in known:
            raise unknown(kind, getattr(config, kind), known)
    if num_classes < 0:
        raise InputError(f"num_classes = {num_classes}: expected at least 1, or 0 for no head")
    for rate in ("dropout", "attention_dropout", "stochastic_depth"):
        if not 0.0 <= getattr(config, rate) < 1.0:
            raise InputError(f"{rate} = {getattr(config, rate)}: expected a rate in [0, 1)")
    for name, least in LEAST.items():
        if (value := getattr(config, name)) is not None and value < least:
            raise InputError(f"{name} = {value}: expected {least} or more")
    if config.representation_size == 0:
        raise InputError("representation_size = 0: expected 1 or more, -1 or None")
    if family in ("ViT", "hybrid"):
        if config.width % config.num_heads:
            raise InputError(f"width {config.width} does not divide into {config.num_heads} heads")
        units = {"learned_2d": 2, "sincos_2d": 4, "rotary": 4 * config.num_heads}
        if config.rotary != "none" and config.width % units["rotary"]:
            raise InputError(
                f"width {config.width}: rotary positions need a multiple of {units['rotary']}"
            )
        if config.width % (unit := units.get(config.position, 1)):
            raise InputError(
                f"width {config.width}: {config.position} positions need a multiple of {unit}"
            )
        _check_tokens(config)
        _check_attention(config)
    for name in ("mean", "std"):
        values = getattr(config, name)
        numbers = len(values) == 3 and all(map(math.isfinite, values))
        if not numbers or (name == "std" and min(values) <= 0):
            raise InputError(f"{name} = {values}: expected three numbers, those of std above 0")
    if config.zero_padded_pool and not config.preactivation:
        raise InputError("zero_padded_pool: expected preactivation=True; v1 ResNets pad as SAME")
    if config.stem_width is not None and config.stem_width % 32:
        raise InputError(f"stem_width = {config.stem_width}: expected a multiple of 32 (GroupNorm)")


def _check_tokens(config: ModelConfig) -> None:
    """Raises ValueError where pooling, class tokens, norms and rotary positions don't fit."""
    if config.pool in ("token", "token+gap") and not config.has_class_token:
        raise InputError(f"pool = {config.pool!r} reads a class token: leave class_token open")
    if config.distillation and config.pool != "token":
        raise InputError(f"distillation adds to pool = 'token', not to {config.pool!r}")
    if config.distillation and config.representation_size is not None:
        raise InputError("distillation: expected representation_size = None")
    if config.rotary != "none" and (config.position in IN_ATTENTION or config.rotary_base <= 0):
        raise InputError(
            f"rotary = {config.rotary!r}: expected rotary_base > 0, found {config.rotary_base}; "
            f"and position = 'none' or 'learned_1d', found {config.position!r}"
        )
    if config.width % (config.pool_heads or config.num_heads):
        raise InputError(f"width {config.width}: not a multiple of pool_heads {config.pool_heads}")


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
    height, width = image_size
    if (patches := height * width // unit**2) > MAX_PATCHES:
        raise InputError(
            f"image size {height}x{width}: {patches:,} patches of {variant}, expected at most "
            f"{MAX_PATCHES:,}"
        )
    for side in image_size:
        if side % unit or side <= 0:
            below = max(side // unit, 1) * unit
            raise InputError(
                f"image size {image_size[0]}x{image_size[1]} is not a multiple of the patch of "
                f"{variant}: use a multiple of {unit} ({below} or {below + unit})"
            )
