"""The pre-norm Transformer encoder of arXiv 2010.11929, section 3.1, equations 2 to 4.

Letters in shapes: B images, N tokens, D width, H heads, K = D / H, M MLP width, L layers.

Randomness comes as `keys`, one PRNG key an image ([B], or None: deterministic). A dropout mask is
then a function of (seed, step, position in the global batch) alone: the same on every mesh, with
accumulation, scan and remat on or off.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

# What a block keeps for its backward pass; everything else is computed again there.
REMAT_POLICIES: dict[str, Callable | None] = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def fold_keys(keys: jax.Array | None, data: int | jax.Array) -> jax.Array | None:
    """Folds a number into each image's key: [B] -> [B]."""
    return None if keys is None else jax.vmap(jax.random.fold_in, (0, None))(keys, data)


def dropout(x: jax.Array, rate: float, keys: jax.Array | None) -> jax.Array:
    """Zeroes elements of x [B, ...] with probability `rate` and scales the rest by 1/(1 - rate)."""
    if keys is None or rate == 0.0:
        return x
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1.0 - rate, x.shape[1:]))(keys)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))


class MultiHeadAttention(nn.Module):
    """Multi-head self-attention (appendix A, equations 5 to 8): [B, N, D] -> [B, N, D]."""

    num_heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        init = nn.initializers.xavier_uniform()

        def project(name):  # [B, N, D] -> [B, N, H, K]
            features = (self.num_heads, width // self.num_heads)
            return nn.DenseGeneral(features, dtype=self.dtype, kernel_init=init, name=name)(x)

        # Softmax in float32 whatever the dtype of its inputs.
        y = jax.nn.dot_product_attention(project("query"), project("key"), project("value"))
        return nn.DenseGeneral(
            width, axis=(-2, -1), dtype=self.dtype, kernel_init=init, name="out"
        )(y)


class MlpBlock(nn.Module):
    """Two dense layers with a tanh-approximated GELU between: [B, N, D] -> [B, N, D]."""

    mlp_dim: int
    dropout: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, keys: jax.Array | None) -> jax.Array:
        def dense(features, name):
            return nn.Dense(
                features,
                dtype=self.dtype,
                kernel_init=nn.initializers.xavier_uniform(),
                bias_init=nn.initializers.normal(1e-6),
                name=name,
            )

        y = nn.gelu(dense(self.mlp_dim, "Dense_0")(x), approximate=True)
        y = dropout(y, self.dropout, fold_keys(keys, 0))
        y = dense(x.shape[-1], "Dense_1")(y)
        return dropout(y, self.dropout, fold_keys(keys, 1))


class EncoderBlock(nn.Module):
    """Equations 2 and 3. Returns (x, None), the carry and the output that `nn.scan` asks for."""

    num_heads: int
    mlp_dim: int
    dropout: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, keys: jax.Array | None) -> tuple[jax.Array, None]:
        y = layer_norm("LayerNorm_0", self.dtype)(x)
        y = MultiHeadAttention(self.num_heads, self.dtype, name="MultiHeadDotProductAttention_0")(y)
        x = x + dropout(y, self.dropout, fold_keys(keys, 0))
        y = layer_norm("LayerNorm_1", self.dtype)(x)
        y = MlpBlock(self.mlp_dim, self.dropout, self.dtype, name="MlpBlock_0")(
            y, fold_keys(keys, 1)
        )
        x = x + y
        self.sow("intermediates", "output", x)
        return x, None


class Encoder(nn.Module):
    """L blocks and a last LayerNorm: [B, N, D] -> [B, N, D].

    With `scan` the blocks are one loop over stacked parameters (`encoderblock`, leading axis L),
    which compiles faster; otherwise they are unrolled (`encoderblock_0` ...). The numbers agree.
    """

    depth: int
    num_heads: int
    mlp_dim: int
    dropout: float
    dtype: Any
    scan: bool
    remat: str

    @nn.compact
    def __call__(self, x: jax.Array, keys: jax.Array | None) -> jax.Array:
        block = EncoderBlock
        if policy := REMAT_POLICIES[self.remat]:
            # Inside a scan nothing can be merged with the forward pass, so XLA needs no barrier.
            block = nn.remat(block, policy=policy, prevent_cse=not self.scan)
        arguments = (self.num_heads, self.mlp_dim, self.dropout, self.dtype)
        if self.scan:
            layer_keys = keys
            if keys is not None:
                layer_keys = jax.vmap(fold_keys, (None, 0))(keys, jnp.arange(self.depth))
            scanned = nn.scan(
                block,
                variable_axes={"params": 0, "intermediates": 0},
                split_rngs={"params": True},
                length=self.depth,
            )
            x, _ = scanned(*arguments, name="encoderblock")(x, layer_keys)
        else:
            for i in range(self.depth):
                x, _ = block(*arguments, name=f"encoderblock_{i}")(x, fold_keys(keys, i))
        x = layer_norm("encoder_norm", self.dtype)(x)
        self.sow("intermediates", "encoded", x)
        return x


def layer_norm(name: str, dtype: Any) -> nn.LayerNorm:
    """LayerNorm with the published epsilon; statistics in float32."""
    return nn.LayerNorm(epsilon=1e-6, dtype=dtype, name=name)


def unstack_layers(params: dict, depth: int) -> dict:
    """Parameters of a scanned encoder -> those of the unrolled one."""
    encoder = dict(params["Transformer"])
    stacked = encoder.pop("encoderblock")
    for i in range(depth):
        encoder[f"encoderblock_{i}"] = jax.tree.map(lambda leaf, i=i: leaf[i], stacked)
    return {**params, "Transformer": encoder}


def stack_layers(params: dict, depth: int) -> dict:
    """Parameters of an unrolled encoder -> those of the scanned one."""
    encoder = dict(params["Transformer"])
    blocks = [encoder.pop(f"encoderblock_{i}") for i in range(depth)]
    encoder["encoderblock"] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)
    return {**params, "Transformer": encoder}
