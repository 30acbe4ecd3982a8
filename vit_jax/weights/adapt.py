"""Fits a checkpoint's parameters to another model, and reports on every tensor.

Parameters here are flat: "/"-joined name -> array.
"""

import dataclasses
import re
from typing import Any

import jax
import numpy as np
from scipy import ndimage

from vit_jax.models.transformer import stack_layers, unstack_layers
from vit_jax.parallel.mesh import path_name


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of every tensor: names, sorted."""

    loaded: tuple[str, ...]
    resized: tuple[str, ...]  # position embeddings, with their shapes
    initialised: tuple[str, ...]  # fresh in the model
    dropped: tuple[str, ...]  # left in the checkpoint

    def __str__(self) -> str:
        lines = [f"loaded {len(self.loaded)} tensors"]
        for kind in ("resized", "initialised", "dropped"):
            if names := getattr(self, kind):
                lines.append(f"{kind} {len(names)}: " + ", ".join(names))
        return "\n".join(lines)


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


def adapt(
    source: dict,
    target: dict,
    *,
    grid: tuple[int, int],
    reinitialize: tuple[str, ...] = ("head/.*",),
    drop: tuple[str, ...] = ("pre_logits/.*",),
) -> tuple[dict, Report]:
    """Takes the parameters of `source` into the tree of `target`, a freshly initialised model.

    Args:
        source: nested dict of arrays, looped or scanned layers.
        target: nested dict of arrays of the model to fill.
        grid: the target's patches (rows, columns), to which position embeddings are resized.
        reinitialize: regexes (full match) of tensors to leave as they are in `target`. The default
            is the paper's fine-tuning (section 3.2): a new head.
        drop: regexes of tensors of `source` that `target` need not have.

    Returns:
        The filled tree and the report. Leaves that were not loaded are `target`'s own.

    Raises:
        ValueError: a tensor has no counterpart, or another shape. Lists all of them, both sides.
    """
    source, target = flatten(_match_layout(source, target)), flatten(target)

    def matches(name, regexes):
        return any(re.fullmatch(regex, name) for regex in regexes)

    filled, loaded, resized, initialised, problems = {}, [], [], [], []
    for name, fresh in target.items():
        filled[name] = fresh
        if matches(name, reinitialize):
            initialised.append(name)
        elif name not in source:
            problems.append(f"  {name} {fresh.shape}: not in the checkpoint")
        elif source[name].shape == fresh.shape:
            filled[name] = source[name]
            loaded.append(name)
        elif name == "pos_embedding" and source[name].shape[2] == fresh.shape[2]:
            filled[name] = resize_position_embedding(source[name], grid)
            resized.append(f"{name} {source[name].shape} -> {fresh.shape}")
        else:
            problems.append(f"  {name}: {source[name].shape} in the checkpoint, {fresh.shape} here")
    dropped = []
    for name in source.keys() - set(loaded) - {r.split()[0] for r in resized}:
        if matches(name, reinitialize) or matches(name, drop):
            dropped.append(name)
        elif name not in target:
            problems.append(f"  {name} {source[name].shape}: in the checkpoint, not in the model")
    if problems:
        raise ValueError(
            "the checkpoint is of another architecture than the model:\n"
            + "\n".join(sorted(problems))
            + "\nUse the architecture of the checkpoint; name tensors to leave out in `drop`, "
            "tensors to start afresh in `reinitialize`."
        )
    report = Report(*(tuple(sorted(x)) for x in (loaded, resized, initialised, dropped)))
    return unflatten(filled), report


def _match_layout(source: dict, target: dict) -> dict:
    """Stacks or unstacks the source's layers as the target has them."""
    has, wants = source.get("Transformer", {}), target.get("Transformer", {})
    if "encoderblock" in has and "encoderblock_0" in wants:
        return unstack_layers(source, len(jax.tree.leaves(has["encoderblock"])[0]))
    if "encoderblock_0" in has and "encoderblock" in wants:
        depth = sum(name.startswith("encoderblock_") for name in has)
        return jax.device_get(stack_layers(source, depth))
    return source


def resize_position_embedding(embedding: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """[1, n * n, D] -> [1, rows * columns, D], bilinear, corner on corner.

    As the published fine-tuning code does (section 3.2 of the paper). ValueError unless the
    embedding is of a square grid.
    """
    _, tokens, width = embedding.shape
    side = round(tokens**0.5)
    if side * side != tokens:
        raise ValueError(f"position embeddings of {tokens} tokens are not of a square grid")
    square = np.asarray(embedding, np.float32).reshape(side, side, width)
    zoom = (grid[0] / side, grid[1] / side, 1)
    return ndimage.zoom(square, zoom, order=1).reshape(1, grid[0] * grid[1], width)
