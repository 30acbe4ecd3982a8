"""Finds models of a study that differ in one dimension, for Figures 8 and 9."""

import dataclasses
from collections import Counter
from collections.abc import Iterator

from experiments.scaling.study import Model, Study, flatten, merge
from vit_jax.config import build
from vit_jax.models.variants import ModelConfig, build_model

SIZES = ("model.variant", "model.width", "model.depth", "model.mlp_dim", "model.num_heads")
POOLING = ("model.pool", "schedule.peak")
AXES = {("depth",): "Depth", ("patch",): "Patch size", ("mlp_dim",): "Width MLP",
        ("width",): "Width"}  # fmt: skip


def _vits(study: Study) -> dict[str, tuple[dict, dict]]:
    """Returns sizes and other fields of every ViT, by name."""
    found = {}
    for grid in study.grids:
        for model in grid.models:
            if model.family == "ViT":
                found[model.name] = _sizes(grid.recipe, model), _without(model, SIZES)
    return found


def _sizes(recipe: dict, model: Model) -> dict[str, int]:
    config = merge(recipe, model.fields)
    side = config["image_size"]
    built = build_model(build(ModelConfig, config["model"]), 0, (side, side))
    resolved = dataclasses.asdict(built.config)
    patch = side // built.grid[0]
    return {"patch": patch} | {name: resolved[name] for name in ("depth", "width", "mlp_dim")}


def _without(model: Model, names: tuple[str, ...]) -> dict:
    return {k: v for k, v in flatten(model.fields).items() if k not in names and v is not None}


def scaled_models(study: Study) -> tuple[str, dict[str, str]]:
    """Returns the base model and {scaled model: dimension}; ("", {}) if no two models fit.

    The base is the model from which most others differ in only one of depth, width, MLP width and
    patch. Models that differ in more are "All".
    """
    vits = _vits(study)

    def relatives(base: str) -> Iterator[tuple[str, str]]:
        for name, (sizes, others) in vits.items():
            changed = tuple(k for k, size in sizes.items() if size != vits[base][0][k])
            if changed and others == vits[base][1]:
                yield name, AXES.get(changed, "All")

    families = {base: dict(relatives(base)) for base in vits}
    alone = {base: len(of) - Counter(of.values())["All"] for base, of in families.items()}
    base = max(alone, key=alone.get, default="")
    return (base, families[base]) if base and alone[base] else ("", {})


def pooled_models(study: Study) -> list[str]:
    """Returns models that differ from another one only in pooling and learning rate."""
    models = {m.name: m for grid in study.grids for m in grid.models if m.family != "ResNet"}
    same = {name: _without(model, POOLING) for name, model in models.items()}
    pools = {name: model.fields.get("model.pool", "token") for name, model in models.items()}
    return [a for a in models if any(same[a] == same[b] and pools[a] != pools[b] for b in models)]
