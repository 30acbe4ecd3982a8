"""LoRA, low-rank adaptation (arXiv 2106.09685): adapters of frozen matrices, and their merging.

A kernel W [I, O] beside lora_a [I, R] and lora_b [R, O] computes as W + A B * alpha / R does. With
`ModelConfig.lora_rank` the four matrices of each attention have adapters; a checkpoint of a run has
them too, and a trained model has merged kernels.
"""

import dataclasses
from typing import Any

import numpy as np

from vit_jax.models.names import STACKED_BLOCKS
from vit_jax.models.options import Description
from vit_jax.models.stacking import flatten, unflatten
from vit_jax.models.variants import Model, build_model

_A, _B, _KERNEL = "/lora_a", "/lora_b", "/kernel"


def merge(params: dict, description: dict[str, Any]) -> tuple[dict, dict[str, Any]]:
    """Returns parameters with merged adapters, and their description; without adapters, the same.

    Args:
      params: nested parameters, scanned or not.
      description: `Model.description` or more.
    """
    config = Description.read(description).model
    if not (rank := config.lora_rank):
        return params, description
    flat = flatten(params)
    for name in [name for name in flat if name.endswith(_A)]:
        module = name.removesuffix(_A)
        a, b = (np.asarray(flat.pop(module + end), np.float64) for end in (_A, _B))
        kernel = np.asarray(flat[module + _KERNEL])
        if module.startswith(STACKED_BLOCKS):
            change = np.stack([np.tensordot(*layer, 1) for layer in zip(a, b, strict=True)])
        else:
            change = np.tensordot(a, b, 1)
        merged = kernel + change * (config.lora_alpha / rank)
        flat[module + _KERNEL] = merged.astype(kernel.dtype)
    return unflatten(flat), {**description, "model": {**description["model"], "lora_rank": 0}}


def merged_model(model: Model) -> Model:
    """The network without adapters: what merged parameters are for."""
    if not model.config.lora_rank:
        return model
    config = dataclasses.replace(model.config, lora_rank=0)
    return build_model(config, model.num_classes, model.image_size)
