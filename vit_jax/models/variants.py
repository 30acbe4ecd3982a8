"""From an architecture's name to a model: `ViT-B/16` -> frozen config -> init and apply.

The rest of the package sees only `build_model` and, on the model, `init`, `apply` and
`intermediates` on nested dicts: no module of flax's leaves this room.
"""

import dataclasses
import re

import chex
import jax
import jax.numpy as jnp

from vit_jax.config import unknown
from vit_jax.models.transformer import REMAT_POLICIES, unstack_layers
from vit_jax.models.vit import Output, ViT

# Width, depth, MLP width, heads. Table 1 of arXiv 2010.11929 (B, L, H), arXiv 2106.10270 (Ti, S);
# nano is ours, for tests and the quickstart.
VIT_SIZES: dict[str, tuple[int, int, int, int]] = {
    "nano": (96, 4, 192, 3),
    "Ti": (192, 12, 768, 3),
    "S": (384, 12, 1536, 6),
    "B": (768, 12, 3072, 12),
    "L": (1024, 24, 4096, 16),
    "H": (1280, 32, 5120, 16),
}
POOLS = ("token", "gap")
DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """An architecture. `None` takes the named variant's size."""

    variant: str  # "ViT-B/16": family-size/patch
    width: int | None = None
    depth: int | None = None
    mlp_dim: int | None = None
    num_heads: int | None = None
    pool: str = "token"  # class token, or "gap": global average pooling
    representation_size: int | None = None  # width of the tanh layer `pre_logits`; None: no layer
    dropout: float = 0.0  # after every dense layer but q, k, v, and after the position embeddings
    head_bias: float = 0.0  # initial bias of the head; -10 with sigmoid loss over many classes
    dtype: str = "bfloat16"  # of activations and matrix products; parameters are float32
    scan: bool = False  # one loop over the layers: faster to compile, the same numbers
    remat: str = "none"  # recompute in the backward pass: none | dots | full; the same numbers


@dataclasses.dataclass(frozen=True)
class Model:
    """A network with its shape fixed: parameters and images in, logits and features out."""

    config: ModelConfig
    num_classes: int
    image_size: tuple[int, int]
    module: ViT

    def init(self, key: jax.Array) -> dict:
        """Fresh float32 parameters, a function of `key` alone (not of scan or remat)."""
        scanned = self.module.clone(scan=True, remat="none")
        params = scanned.init(key, jnp.zeros((1, *self.image_size, 3)))["params"]
        return params if self.config.scan else unstack_layers(params, self.module.depth)

    def apply(self, params: dict, images: jax.Array, keys: jax.Array | None = None) -> Output:
        """Runs the network on images [B, H, W, 3], uint8 or float in [-1, 1].

        With `keys` [B], a PRNG key an image, dropout is on; without them it is off.
        """
        chex.assert_shape(images, (None, *self.image_size, 3))
        chex.assert_shape(images, (None, *self.image_size, 3))
        return self.module.apply({"params": params}, normalize(images), keys)

    def intermediates(self, params: dict, images: jax.Array) -> dict[str, jax.Array]:
        """`blocks` [L, B, N, D], every block's output, and `encoded` [B, N, D], the last norm's."""
        _, state = self.module.apply(
            {"params": params}, normalize(images), mutable=["intermediates"]
        )
        encoder = state["intermediates"]["Transformer"]
        if self.config.scan:
            blocks = encoder["encoderblock"]["output"][0]
        else:
            outputs = [encoder[f"encoderblock_{i}"]["output"][0] for i in range(self.module.depth)]
            blocks = jnp.stack(outputs)
        return {"blocks": blocks, "encoded": encoder["encoded"][0]}


def normalize(images: jax.Array) -> jax.Array:
    """uint8 pixels -> float32 in [-1, 1], as published; float images pass."""
    return (images.astype(jnp.float32) - 127.5) / 127.5 if images.dtype == jnp.uint8 else images


def build_model(config: ModelConfig, num_classes: int, image_size: tuple[int, int]) -> Model:
    """The model that `config` names, for images of `image_size` (height, width).

    Raises ValueError for a name that isn't in the table (with the nearest ones), an image size
    that the patch doesn't divide, and sizes that don't fit together.
    """
    match = re.fullmatch(r"ViT-(\w+)/(\d+)", config.variant)
    if not match or match[1] not in VIT_SIZES or int(match[2]) == 0:
        known = [f"ViT-{size}/{patch}" for size in VIT_SIZES for patch in (8, 14, 16, 32)]
        raise unknown("variant", config.variant, known)
    patch = int(match[2])
    named = dict(zip(("width", "depth", "mlp_dim", "num_heads"), VIT_SIZES[match[1]], strict=True))
    size = {k: v if getattr(config, k) is None else getattr(config, k) for k, v in named.items()}

    for side in image_size:
        if side % patch or side <= 0:
            below = max(side // patch, 1) * patch
            raise ValueError(
                f"image size {image_size[0]}x{image_size[1]} is not a multiple of the patch of "
                f"{config.variant}: use a multiple of {patch} ({below} or {below + patch})"
            )
    if size["width"] % size["num_heads"]:
        raise ValueError(f"width {size['width']} does not divide into {size['num_heads']} heads")
    if num_classes < 1:
        raise ValueError(f"num_classes = {num_classes}: expected at least 1")
    if not 0.0 <= config.dropout < 1.0:
        raise ValueError(f"dropout = {config.dropout}: expected a rate in [0, 1)")
    for kind, known in (("pool", POOLS), ("dtype", DTYPES), ("remat", REMAT_POLICIES)):
        if getattr(config, kind) not in known:
            raise unknown(kind, getattr(config, kind), known)

    module = ViT(
        patch=patch,
        **size,
        num_classes=num_classes,
        pool=config.pool,
        representation_size=config.representation_size,
        dropout=config.dropout,
        head_bias=config.head_bias,
        dtype=jnp.dtype(config.dtype),
        scan=config.scan,
        remat=config.remat,
    )
    return Model(config, num_classes, image_size, module)
