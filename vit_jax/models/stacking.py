"""Converts parameters between scanned (stacked) and unrolled encoders.

A flat dict maps "/"-joined names to arrays.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.models.names import ENCODER_BLOCK, FAMILIES, STACKED_BLOCKS, is_stacked
from vit_jax.parallel.mesh import path_name


def flatten(tree: Any) -> dict[str, Any]:
    """Flattens a nested dict to {"a/b": leaf}."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def unflatten(flat: dict[str, Any]) -> dict:
    """Inverts `flatten`."""
    tree: dict = {}
    for name, leaf in flat.items():
        *folders, last = name.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = leaf
    return tree


def unstack(flat: dict[str, Any]) -> dict[str, Any]:
    """Splits each stacked tensor of a flat dict into one per layer, under the unrolled names."""
    unstacked = {}
    for name, array in flat.items():
        if is_stacked(name) and array.ndim:
            inner = name.removeprefix(STACKED_BLOCKS)
            for i in range(array.shape[0]):
                unstacked[ENCODER_BLOCK.format(i) + inner] = array[i]
        else:
            unstacked[name] = array
    return unstacked


def stack(flat: dict[str, Any], depth: int) -> dict[str, Any]:
    """Stacks the first `depth` layers of a flat dict, under the scanned names.

    A tensor stays unstacked if a layer lacks it or shapes differ. NumPy arrays stay on the host.
    """
    layers: dict[str, dict[int, str]] = {}  # a block's tensor -> layer -> name
    for name in flat:
        if match := re.match(FAMILIES["ViT"].block, name):
            layers.setdefault(name[match.end() :], {})[int(match[1])] = name
    stacked = dict(flat)
    for inner, numbered in layers.items():
        names = [numbered[i] for i in range(depth) if i in numbered]
        if depth and len(names) == depth and len({flat[name].shape for name in names}) == 1:
            arrays = [stacked.pop(name) for name in names]
            on_host = all(isinstance(array, np.ndarray) for array in arrays)
            stacked[STACKED_BLOCKS + inner] = (np if on_host else jnp).stack(arrays)
    return stacked


def unstack_layers(params: dict) -> dict:
    """Converts nested parameters of a scanned encoder to those of the unrolled one."""
    return unflatten(unstack(flatten(params)))


def stack_layers(params: dict, depth: int) -> dict:
    """Converts nested parameters of an unrolled encoder of `depth` layers to the scanned ones.

    The last layer stays outside the stack, as in `transformer.Encoder`.
    """
    return unflatten(stack(flatten(params), depth - 1))
