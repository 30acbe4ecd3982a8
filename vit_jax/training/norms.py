"""Norms of each layer's gradients, updates and activations."""

from typing import Any

import jax
import jax.numpy as jnp

from vit_jax.models.names import ENCODER_BLOCK, STACKED_BLOCKS, is_stacked
from vit_jax.parallel.mesh import path_name
from vit_jax.training.origins import layer_of


def layer_norms(gradients: Any, updates: Any, squares: Any) -> dict[str, jax.Array]:
    """Returns float32 scalars by kind and layer, the same with scanned and unrolled blocks.

    Args:
      gradients, updates: trees like the parameters.
      squares: the mean squares of the blocks' outputs: see `Model.measures`.

    Returns:
      "gradient LAYER" and "update LAYER", L2 norms over the layer's parameters, and "activation
      LAYER", the root mean square of a block's output. A layer is a block, such as
      "Transformer/encoderblock_3", or a module outside of blocks.
    """
    found = {}
    for kind, tree in (("gradient", gradients), ("update", updates)):
        summed = jax.tree.map(lambda x: jnp.square(x.astype(jnp.float32)), tree)
        found |= {f"{kind} {layer}": square for layer, square in _by_layer(summed).items()}
    found |= {f"activation {layer}": square for layer, square in _by_layer(squares).items()}
    return {name: jnp.sqrt(square) for name, square in found.items()}


def _by_layer(tree: Any) -> dict[str, jax.Array]:
    """Sums a tree of arrays by layer."""
    sums: dict[str, jax.Array] = {}

    def add(name: str, x: jax.Array) -> None:
        layer = layer_of(name)
        sums[layer] = sums.get(layer, 0.0) + x.sum()

    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = path_name(path)
        if not is_stacked(name):
            add(name, leaf)
            continue
        inner = name.removeprefix(STACKED_BLOCKS)
        for i, row in enumerate(leaf.reshape(leaf.shape[0], -1).sum(axis=1)):
            add(ENCODER_BLOCK.format(i) + inner, row)
    return sums
