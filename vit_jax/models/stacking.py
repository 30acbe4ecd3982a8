"""Stacks and unstacks the layers of a scanned encoder, in flat dicts and in nested ones.

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
    """A nested dict -> {"a/b": leaf}."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def unflatten(flat: dict[str, Any]) -> dict:
    """{"a/b": leaf} -> a nested dict."""
    tree: dict = {}
    for name, leaf in flat.items():
        *folders, last = name.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = leaf
    return tree


def unstack(flat: dict[str, Any]) -> dict[str, Any]:
    """Replaces each stacked tensor by one tensor per layer, as the unrolled encoder names them."""
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
    """Stacks the first `depth` layers, as the scanned encoder names them.

    A tensor that a layer lacks, or has in another shape, keeps its names. NumPy arrays stay NumPy
    arrays.
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
    """Nested parameters of a scanned encoder -> those of the unrolled one."""
    return unflatten(unstack(flatten(params)))


def stack_layers(params: dict, depth: int) -> dict:
    """Nested parameters of an unrolled encoder of `depth` layers -> those of the scanned one.

    The last layer stays outside of the stack, as in `transformer.Encoder`.
    """
    return unflatten(stack(flatten(params), depth - 1))
