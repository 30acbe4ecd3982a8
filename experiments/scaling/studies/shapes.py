r"""Scaling single dimensions of a ViT, and pooling: Figures 8 and 9 at the scale of `mini`.

python -m experiments.scaling run --study=shapes

Starts from ViT-S/4 of `mini`, with its 50,000 images and few-shot tasks. Scales depth, width, MLP
width and patch one at a time, then all except the patch together. Compares the class token with
global average pooling at two learning rates, as in the paper.
"""

import dataclasses

from experiments.scaling.study import Budget, Grid, Model, Study, load_study, merge

STEPS = 800
BASE = {
    "model.variant": "ViT-nano/4", "model.width": 96, "model.depth": 3, "model.mlp_dim": 192,
    "model.representation_size": 128, "model.dtype": "float32",
}  # fmt: skip
GAP = {"model.pool": "gap"}


def vit(name: str, **sizes: int) -> Model:
    return Model(name, "ViT", BASE | {f"model.{field}": size for field, size in sizes.items()})


def patch(side: int) -> Model:
    return Model(f"patch {side}", "ViT", BASE | {"model.variant": f"ViT-nano/{side}"})


POOLED = (
    vit("ViT-S/4"),
    Model("ViT-S/4 GAP", "ViT", BASE | GAP),
    Model("ViT-S/4 GAP, lr 1e-3", "ViT", BASE | GAP | {"schedule.peak": 1e-3}),
)
SCALED = (
    vit("depth 1", depth=1),
    vit("depth 6", depth=6),
    vit("width 48", width=48),
    vit("MLP 48", mlp_dim=48),
    patch(8),
    vit("all x 1/2", depth=2, width=48, mlp_dim=96),
    vit("MLP 768", mlp_dim=768),
    vit("all x 4/3", depth=4, width=132, mlp_dim=256),
    vit("width 192", width=192),
    patch(2),
)


def get_study(_: str | None = None) -> Study:
    (data, *_) = load_study("mini").grids
    recipe = merge(data.recipe, {"schedule.cooldown": STEPS // 5, "eval_every": STEPS // 8})
    pooled = Grid(recipe, models=POOLED, sets=data.sets[-1:], budgets=(Budget(STEPS),))
    at_the_end = merge(recipe, {"eval_every": None})
    scaled = dataclasses.replace(pooled, recipe=at_the_end, models=SCALED)
    return Study("shapes", (pooled, scaled), select="validation/accuracy", about=__doc__)
