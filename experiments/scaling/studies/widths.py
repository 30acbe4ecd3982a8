r"""The best learning rate of a ViT 48 to 768 wide, with the width rule and without it.

python -m experiments.scaling run --study=widths

Trains ViTs of two blocks on `strokes/20` at 16 px, always on the same 3,840 images of a seed. Each
width is trained with seven learning rates a factor of two apart, without a rule ("standard") and
with `optimizer.width_rule="mup"` from width 48. Three heads grow with the width. Prediction, before
the runs: without the rule the best rate falls in proportion to the width, by up to 16 times; with
it, it stays within a factor of two.
"""

import dataclasses

from experiments.scaling.study import Budget, Choice, Grid, Model, PretrainingSet, Study

BASE = 48
WIDTHS = (48, 96, 192, 384, 768)
RATES = tuple(5e-4 * 2**k for k in range(7))
SEEDS = (0, 1, 2)
CLASSES, BATCH, STEPS = 20, 32, 120
RULES = {
    "standard": {},
    "mup": {"optimizer.width_rule": "mup", "optimizer.base_width": BASE},
}
RECIPE = {
    "image_size": 16,
    "batch_size": BATCH,
    "model": {"variant": "ViT-nano/4", "depth": 2, "num_heads": 3, "dtype": "float32"},
    "data": {"dataset": f"strokes/{CLASSES}", "preprocess": "resize", "num_threads": 1},
    "schedule": {"warmup": 12, "decay": "cosine"},
    "optimizer": {"name": "adamw", "b2": 0.98, "weight_decay": 0.0},
    "checkpoint": {"every": STEPS, "keep_last": 1},
    "log_every": STEPS // 4,
    "evaluators": {
        "validation": {
            "data": {"dataset": f"strokes/{CLASSES}", "split": "validation[:1000]"},
            "batch_size": 250,
        }
    },
}


def vit(width: int) -> Model:
    return Model(f"width {width}", "ViT", {"model.width": width, "model.mlp_dim": 4 * width})


def get_study(_: str | None = None) -> Study:
    grid = Grid(
        RECIPE,
        models=tuple(map(vit, WIDTHS)),
        sets=(PretrainingSet("strokes", BATCH * STEPS, {}),),
        budgets=(Budget(STEPS),),
        sweep=tuple(
            Choice(f"{rule} {rate:g}", {"schedule.peak": rate, **fields})
            for rule, fields in RULES.items()
            for rate in RATES
        ),
    )
    grids = tuple(dataclasses.replace(grid, seeds=(seed,)) for seed in SEEDS)
    return Study("widths", grids, select="validation/accuracy", about=__doc__)
