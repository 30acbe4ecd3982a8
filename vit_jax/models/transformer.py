"""Attention, MLP, block, encoder: the pre-norm Transformer of arXiv 2010.11929, section 3.1.

Letters in shapes: B images, N tokens, M tokens attended to, D width, H heads, K = D / H, L layers.

`keys` are PRNG keys, one per image ([B]); None turns dropout and stochastic depth off. A dropout
mask depends only on (seed, step, position in the global batch), so it is the same on every mesh,
with or without accumulation, scan and remat.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from vit_jax.config import InputError
from vit_jax.models.attention import attention_weights, flash_attention, pallas_attention
from vit_jax.models.dense import Dense
from vit_jax.models.hardware import choose_attention, recomputed_on_cpu
from vit_jax.models.head import measured
from vit_jax.models.positions import Positions, position_table, rotary_table, rotate
from vit_jax.parallel.mesh import constrain_batch


def keeps_products(primitive: Any, *arguments: Any, **parameters: Any) -> bool:
    """A `jax.checkpoint` policy that saves what is expensive to recompute.

    Saves matmuls, convolutions, kernels and `checkpoint_name`d values; recomputes plain attention's
    scores.
    """
    kernels = ("conv_general_dilated", "pallas_call", "dot_product_attention_fwd_wrapper", "name")
    dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return primitive.name in kernels or bool(dots(primitive, *arguments, **parameters))


# What a block saves for its backward pass; the backward pass recomputes everything else.
REMAT_POLICIES: dict[str, Callable | None] = {
    "none": None,
    "dots": keeps_products,
    "full": jax.checkpoint_policies.nothing_saveable,
}
MLPS = ("gelu_tanh", "gelu", "quick_gelu", "swiglu")
BIASED = ("qkv", "qv", "")  # which of query, key and value have a bias


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Sizes and options of the blocks; `variants.ModelConfig` documents them with their sources."""

    width: int
    depth: int
    num_heads: int
    mlp_dim: int
    mlp: str = "gelu_tanh"
    norm_epsilon: float = 1e-6
    dropout: float = 0.0
    attention_dropout: float = 0.0
    stochastic_depth: float = 0.0
    qkv_bias: str = "qkv"
    qk_norm: bool = False
    attention_norm: bool = False
    mlp_norm: bool = False
    layer_scale: float | None = None
    parallel: bool = False
    lora_rank: int = 0
    lora_alpha: float = 16.0
    attention: str = "auto"
    dtype: Any = jnp.float32
    scan: bool = False
    remat: str = "none"

    def __post_init__(self):
        if self.lora_rank < 0 or self.lora_alpha <= 0:
            raise InputError(
                f"lora_rank = {self.lora_rank}, lora_alpha = {self.lora_alpha}: expected a rank of "
                "at least 1, or 0 for no adapters, and a positive alpha"
            )


def fold_keys(keys: jax.Array | None, data: int | jax.Array) -> jax.Array | None:
    """Folds a number into each image's key: [B] -> [B]."""
    return None if keys is None else jax.vmap(jax.random.fold_in, (0, None))(keys, data)


def dropout(x: jax.Array, rate: float, keys: jax.Array | None) -> jax.Array:
    """Zeroes elements of x [B, ...] with probability `rate` and scales the rest by 1/(1 - rate)."""
    if keys is None or rate == 0.0:
        return x
    drop = random_words(keys, x.shape[1:]) < jnp.uint32(rate * 2**32)
    return jnp.where(drop, jnp.zeros_like(x), x / (1.0 - rate))


def random_words(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Random uint32 words [B, *shape] for keys [B].

    Draws one random word per column and one per row, adds them and hashes each sum with the
    finalizer of MurmurHash3, with Wellons' constants (lowbias32,
    nullprogram.com/blog/2018/07/31). For 2-D shapes, a shorter first axis gives a prefix.

    Takes a tenth of the operations of `jax.random.bits`, which took 43% of a ViT-B/16's step on a
    TPU.
    """
    rows, columns = math.prod(shape[:-1]), shape[-1]
    draw = jax.vmap(lambda key: jax.random.bits(key, (columns + rows,), jnp.uint32))
    words = draw(keys)
    x = words[:, :columns].reshape(-1, *[1] * (len(shape) - 1), columns)
    x = x + words[:, columns:].reshape(-1, *shape[:-1], 1)
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def drop_branch(y: jax.Array, rate: jax.Array, keys: jax.Array | None) -> jax.Array:
    """Stochastic depth (arXiv 1603.09382): zeroes whole images of a branch y [B, N, D].

    Drops each image with probability `rate` [] and scales the others by 1/(1 - rate).
    """
    if keys is None:
        return y
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1.0 - rate))(keys)
    return y * (keep / (1.0 - rate))[:, None, None].astype(y.dtype)


def layer_norm(config: TransformerConfig, name: str, use_bias: bool = True) -> nn.Module:
    """LayerNorm with float32 statistics; RMSNorm in ViT-22B's parallel blocks."""
    options = {"epsilon": config.norm_epsilon, "dtype": config.dtype, "name": name}
    if config.parallel:
        return nn.RMSNorm(**options)
    return recomputed_on_cpu(nn.LayerNorm)(use_bias=use_bias, **options)


def rematted(block: type[nn.Module], policy: str, in_scan: bool = False) -> type[nn.Module]:
    """Wraps a block so that the backward pass recomputes all but what the policy saves.

    In a scan, "none" means "dots": a scan without remat stacks every factor of every derivative in
    memory, which takes a ViT-B/16 longer than recomputing them.
    """
    policy = "dots" if in_scan and policy == "none" else policy
    if policy == "none":
        return block
    # Inside a scan nothing can be merged with the forward pass, so XLA needs no barrier.
    return nn.remat(block, policy=REMAT_POLICIES[policy], prevent_cse=not in_scan)


def further_remat(policy: str, scan: bool) -> list[str]:
    """Returns `policy` and the policies that save less, in descending order of memory."""
    policies = list(REMAT_POLICIES)[list(REMAT_POLICIES).index(policy) :]
    if scan and policy == "none":
        policies.remove("dots")  # the same as "none" in a scan
    return policies


class MultiHeadAttention(nn.Module):
    """Appendix A, equations 5 to 8: x [B, N, D] attends to context [B, M, D] -> [B, N, D].

    With `cache_length`, the collection "cache" holds keys and values of that many tokens. A call
    writes its own at `index` and attends to all of them.

    Call arguments:
        keys: PRNG keys [B] for attention dropout; None turns it off.
        offsets: keys of relative positions, [N, M, H, K].
        angles: rotations of queries and keys, [M, K / 2] or [M, H, K / 2]; x must be the first N of
            the M tokens.
        mask: [N, M], True where attention is allowed.
        index: position of the first token in the cache.
    """

    config: TransformerConfig
    cache_length: int | None = None

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        context: jax.Array,
        keys: jax.Array | None = None,
        *,
        offsets: jax.Array | None = None,
        angles: jax.Array | None = None,
        mask: jax.Array | None = None,
        index: jax.Array | int = 0,
    ) -> jax.Array:
        config = self.config
        heads, head_dim = config.num_heads, config.width // config.num_heads
        options = {"dtype": config.dtype, "kernel_init": nn.initializers.xavier_uniform()}
        options |= {"rank": config.lora_rank, "alpha": config.lora_alpha}
        biased = "" if config.parallel else config.qkv_bias
        query, key, value = (  # [B, N, D] -> [B, N, H, K]
            Dense((heads, head_dim), use_bias=name[0] in biased, name=name, **options)
            for name in ("query", "key", "value")
        )
        project = Dense((config.width,), inputs=2, name="out", **options)

        def out(y):  # [B, N, H, K] -> [B, N, D]
            if config.attention_norm:
                flat = y.reshape(*y.shape[:2], config.width)
                y = layer_norm(config, "norm")(flat).reshape(y.shape)
            return project(y)

        plain = (  # kernels don't return the weights and support no bias, mask or cache
            self.is_mutable_collection("intermediates")
            or (config.attention_dropout > 0 and keys is not None)
            or not (offsets is None and mask is None and self.cache_length is None)
            or self.is_initializing()
        )
        way = choose_attention(
            config.attention, context.shape[1], head_dim, config.dtype, plain=plain
        )
        if way == "cudnn" and x is not context:
            way = "xla"
        if way == "pallas" and not config.qk_norm and angles is None and biased != "qv":
            layers = (query, x), (key, context), (value, context)
            flat, biases = zip(*(layer.product(y) for layer, y in layers), strict=True)
            biases = biases if biased else ()
            y = pallas_attention(*flat, *biases, heads=heads)
            return out(y.reshape(*y.shape[:2], heads, head_dim))

        query, key, value = query(x), key(context), value(context)
        if config.qk_norm:
            query = layer_norm(config, "query_norm", use_bias=False)(query)
            key = layer_norm(config, "key_norm", use_bias=False)(key)
        if angles is not None:
            query, key = rotate(query, angles[: x.shape[1]]), rotate(key, angles)
        if self.cache_length:
            key = self._through_cache("cached_key", key, index)
            value = self._through_cache("cached_value", value, index)
        if way != "xla":
            return out(flash_attention(query, key, value, way))

        bias = None
        if offsets is not None:
            offsets = offsets[: x.shape[1]].astype(query.dtype) * head_dim**-0.5
            bias = jnp.einsum("bnhk,nmhk->bhnm", query, offsets, preferred_element_type=jnp.float32)
        weights, total = attention_weights(query, key, bias=bias, mask=mask)
        self.sow("intermediates", "attention", weights / total)
        weights = dropout(weights.astype(config.dtype), config.attention_dropout, keys)
        y = checkpoint_name(jnp.einsum("bhnm,bmhk->bhnk", weights, value), "weighed") / total
        return out(y.astype(config.dtype).swapaxes(1, 2))

    def _through_cache(self, name: str, new: jax.Array, index: jax.Array | int) -> jax.Array:
        shape = (new.shape[0], self.cache_length, *new.shape[2:])
        cached = self.variable("cache", name, jnp.zeros, shape, new.dtype)
        cached.value = jax.lax.dynamic_update_slice_in_dim(cached.value, new, index, axis=1)
        return cached.value


class MlpBlock(nn.Module):
    """Two dense layers with GELU, or SwiGLU (arXiv 2002.05202): [B, N, D] -> [B, N, D].

    "quick_gelu" is x sigmoid(1.702 x), as in OpenAI's CLIP (arXiv 2103.00020).
    """

    config: TransformerConfig
    kernel_init: Callable = nn.initializers.xavier_uniform()

    @nn.compact
    def __call__(self, x: jax.Array, keys: jax.Array | None = None) -> jax.Array:
        config = self.config

        def dense(features, name, to_nonlinearity=True):
            return Dense(
                (features,),
                to_nonlinearity=to_nonlinearity,
                dtype=config.dtype,
                kernel_init=self.kernel_init,
                bias_init=nn.initializers.normal(1e-6),
                name=name,
            )

        y = dense(config.mlp_dim, "Dense_0")(x)
        if config.mlp == "swiglu":
            y = y * nn.silu(dense(config.mlp_dim, "gate")(x))
        elif config.mlp == "quick_gelu":
            y = recomputed_on_cpu(lambda y: y * nn.sigmoid(1.702 * y))(y)
        else:
            gelu = functools.partial(nn.gelu, approximate=config.mlp == "gelu_tanh")
            y = recomputed_on_cpu(gelu)(y)
        if config.mlp_norm:
            y = layer_norm(config, "norm")(y)
        y = dropout(y, config.dropout, fold_keys(keys, 0))
        y = dense(x.shape[-1], "Dense_1", to_nonlinearity=False)(y)
        return dropout(y, config.dropout, fold_keys(keys, 1))


class EncoderBlock(nn.Module):
    """Equations 2 and 3. Returns (x, None): the carry and the output that `nn.scan` expects.

    With `first`, the block returns only the first `first` tokens, which attend to all tokens.

    Call arguments:
        layer: inputs that differ between blocks: `keys` [B], `drop` [] (the rate of stochastic
            depth) and `here` [] (0 where the block doesn't use the shared position table).
        table: the shared position table, see `positions.position_table`.
    """

    config: TransformerConfig
    positions: Positions
    first: int | None = None

    @nn.compact
    def __call__(
        self, x: jax.Array, layer: dict[str, Any], table: jax.Array | None
    ) -> tuple[jax.Array, None]:
        # Without the constraint XLA splits activations along features, like FSDP's kernels.
        x = constrain_batch(x)
        config, positions, keys = self.config, self.positions, layer["keys"]
        if positions.at == "layers":
            table = position_table(self, positions, config.width, config.num_heads)
        elif table is not None:
            table = table * layer["here"].astype(table.dtype)
        x, relative = positions.add(x, table)
        if positions.rotary is not None:
            heads = config.num_heads
            relative["angles"] = rotary_table(self, positions, heads, config.width // heads)

        def branch(y, number):  # LayerScale and stochastic depth, before the residual addition
            if config.layer_scale is not None:
                init = nn.initializers.constant(config.layer_scale)
                y = y * self.param(f"layer_scale_{number}", init, (config.width,)).astype(y.dtype)
            if config.stochastic_depth:
                y = drop_branch(y, layer["drop"], fold_keys(keys, 3 + number))
            return y

        y = context = layer_norm(config, "LayerNorm_0")(x)
        if self.first is not None:
            x, y = x[:, : self.first], y[:, : self.first]
        attention = MultiHeadAttention(config, name="MultiHeadDotProductAttention_0")
        attended = attention(y, context, fold_keys(keys, 2), **relative)
        attended = branch(dropout(attended, config.dropout, fold_keys(keys, 0)), 0)
        if not config.parallel:
            x = x + attended
            y = layer_norm(config, "LayerNorm_1")(x)
        y = branch(MlpBlock(config, name="MlpBlock_0")(y, fold_keys(keys, 1)), 1)
        x = x + attended + y if config.parallel else x + y
        self.sow("intermediates", "output", x)
        return measured(self, x), None


class Encoder(nn.Module):
    """L blocks and a LayerNorm (`final_norm`): [B, N, D] -> [B, N, D]; [B, first, D] with `first`.

    With `scan`, the first L - 1 blocks are one loop over stacked parameters (`encoderblock`,
    leading axis L - 1), which compiles faster. Otherwise all are unrolled (`encoderblock_0` ...).
    Results are the same.
    """

    config: TransformerConfig
    positions: Positions
    final_norm: bool = True

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        keys: jax.Array | None,
        table: jax.Array | None = None,
        first: int | None = None,
    ) -> jax.Array:
        config, depth = self.config, self.config.depth
        number = jnp.arange(depth)
        layers = {
            "keys": None if keys is None else jax.vmap(fold_keys, (None, 0))(keys, number),
            "drop": jnp.linspace(0.0, config.stochastic_depth, depth),  # deeper blocks drop more
            "here": (number == 0) | (self.positions.at != "stem"),
        }
        arguments = (config, self.positions)
        # Initialisation loops over all blocks, so that parameters don't depend on `scan`.
        looped = 0 if not config.scan else depth if self.is_initializing() else depth - 1
        if looped:
            scanned = nn.scan(
                rematted(EncoderBlock, config.remat, in_scan=True),
                variable_axes={"params": 0, "intermediates": 0, "squares": 0},
                split_rngs={"params": True},
                in_axes=(0, nn.broadcast),
                length=looped,
            )
            layer = jax.tree.map(lambda leaf: leaf[:looped], layers)
            x, _ = scanned(*arguments, name="encoderblock")(x, layer, table)
        block = rematted(EncoderBlock, config.remat)
        for i in range(looped, depth):
            layer = jax.tree.map(lambda leaf, i=i: leaf[i], layers)
            last = first if i == depth - 1 else None
            x, _ = block(*arguments, last, name=f"encoderblock_{i}")(x, layer, table)
        x = x[:, :first]
        if self.final_norm:
            x = layer_norm(config, "encoder_norm")(x)
        self.sow("intermediates", "encoded", x)
        return x
