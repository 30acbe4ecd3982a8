r"""A small version of the paper's three studies, for two CPU cores.

python -m experiments.scaling run --study=mini

Pretraining: `strokes/100`, generated random characters, at 16 px, in subsets of 500, 5,000 and
50,000 images. Models: two ViTs, two ResNets and a hybrid, over a decade of compute per image.
Tasks: few-shot and fine-tuning on scikit-learn's digits and Fashion-MNIST, also from random weights
and from a ViT pretrained without labels. Prepare Fashion-MNIST (Debian's package
dataset-fashion-mnist) once, in its original order, with

python -m vit_jax.prepare --input=/usr/share/datasets/fashion-mnist --output=DATA --name=fashion \
    --noshuffle

and set TFDS_DATA_DIR=DATA.

Runs are in order of importance, so a partial study can be drawn. All but the longest budget with
labels has three seeds.
"""

import dataclasses

from experiments.scaling.study import Budget, Grid, Model, PretrainingSet, Study, Task, merge

CLASSES = 100
BATCH = 64
STEPS = 1600
VIT = {"model.representation_size": 128, "model.dtype": "float32"}
BIT = {"model.dtype": "float32", "model.zero_padded_pool": True}
MODELS = (
    Model("ViT-XS/4", "ViT", VIT | {
        "model.variant": "ViT-nano/4", "model.width": 48, "model.depth": 2, "model.mlp_dim": 96,
    }),
    Model("ViT-S/4", "ViT", VIT | {
        "model.variant": "ViT-nano/4", "model.width": 96, "model.depth": 3, "model.mlp_dim": 192,
    }),
    Model("R5x0.5", "ResNet", BIT | {
        "model.variant": "R26x1", "model.stages": [1], "model.stem_width": 32,
    }),
    Model("R14x0.5", "ResNet", BIT | {
        "model.variant": "R26x1", "model.stages": [2, 2], "model.stem_width": 32,
    }),
    Model("R5+ViT-XS/4", "hybrid", VIT | {
        "model.variant": "R26+ViT-S/32", "model.stages": [1], "model.stem_width": 32,
        "model.width": 48, "model.depth": 2, "model.mlp_dim": 96, "model.num_heads": 3,
    }),
)  # fmt: skip
# Without labels, as configs/pretrain/masked.py; this loss doesn't train a class token.
MASKED = Model("ViT-S/4 masked", "ViT", {
    **MODELS[1].fields, "model.representation_size": None, "model.pool": "gap",
    "loss.name": "masked_patches",
})  # fmt: skip
FASHION = {"dataset": "fashion"}


RECIPE = {
    "image_size": 16,
    "batch_size": BATCH,
    "data": {"dataset": f"strokes/{CLASSES}", "preprocess": "resize", "num_threads": 1},
    "schedule": {"peak": 3e-3, "warmup": 80, "decay": "constant"},
    "optimizer": {"name": "adamw", "b2": 0.98, "weight_decay": 0.03},
    "checkpoint": {"every": 200, "keep_last": 1},
    "log_every": 100,
    "classification": {
        "validation": {
            "data": {"dataset": f"strokes/{CLASSES}", "split": "validation[:1000]"},
            "batch_size": 250,
        }
    },
    "fewshot": {
        "digits": {"data": {"dataset": "digits", "split": "train"}, "test_split": "test",
                   "shots": [5, 10], "l2": 100.0},
        "fashion": {"data": FASHION | {"split": "train[:1000]"}, "test_split": "test[:1000]",
                    "shots": [5, 10], "l2": 100.0},
    },
}  # fmt: skip


def fine_tuning(data: dict, test: dict) -> dict:
    return {
        "image_size": 16,
        "batch_size": 64,
        "data": {"preprocess": "resize", "num_threads": 1, **data},
        "model": {"dtype": "float32"},
        "steps": 150,
        "schedule": {"peak": 1e-3, "warmup": 15, "decay": "cosine"},
        "optimizer": {"name": "adamw", "weight_decay": 0.03},
        "checkpoint": {"every": 150, "keep_last": 1},
        "log_every": 50,
        "classification": {"test": {"data": {**data, **test}, "batch_size": 250}},
    }


TASKS = (
    Task("digits", fine_tuning({"dataset": "digits", "split": "train"}, {"split": "test"})),
    Task("fashion", fine_tuning(FASHION | {"split": "train[:2000]"}, {"split": "test[:1000]"})),
)


NOTHING = PretrainingSet("no pretraining", 0, {})


def subset(examples: int) -> PretrainingSet:
    return PretrainingSet(f"strokes {examples:,}", examples, {"data.split": f"train[:{examples}]"})


def get_study(_: str | None = None) -> Study:
    sets = tuple(map(subset, (500, 5_000, 50_000)))
    data = Grid(
        merge(RECIPE, {"schedule.cooldown": STEPS // 5, "eval_every": STEPS // 4}),
        models=MODELS,
        sets=sets,
        budgets=(Budget(STEPS),),
    )
    compute = Grid(
        RECIPE,
        models=MODELS,
        sets=sets[-1:],
        budgets=tuple(Budget(steps) for steps in (STEPS // 4, STEPS // 2, 2 * STEPS)),
        cooldown=0.2,
    )
    transfer = dataclasses.replace(data, tasks=TASKS)
    masked = dataclasses.replace(transfer, models=(MASKED,), sets=sets[-1:], seeds=(0, 1, 2))
    long = {"schedule.cooldown": 2 * STEPS // 5, "eval_every": STEPS // 2}
    longer = dataclasses.replace(masked, recipe=merge(RECIPE, long), budgets=(Budget(2 * STEPS),))
    scratch = dataclasses.replace(transfer, sets=(NOTHING,), seeds=(0, 1, 2))
    short = dataclasses.replace(compute, budgets=compute.budgets[:2])
    return Study(
        "mini",
        (
            data,
            compute,
            dataclasses.replace(transfer, sets=sets[-1:]),
            dataclasses.replace(transfer, sets=sets[:1]),
            dataclasses.replace(data, seeds=(1,)),
            dataclasses.replace(data, seeds=(2,)),
            masked,
            dataclasses.replace(scratch, models=(MODELS[1], MASKED)),
            dataclasses.replace(transfer, sets=sets[-1:], seeds=(1, 2)),
            dataclasses.replace(transfer, sets=sets[:1], seeds=(1, 2)),
            dataclasses.replace(short, seeds=(1, 2)),
            scratch,
            longer,
            dataclasses.replace(transfer, sets=sets[1:2], seeds=(0, 1, 2)),
        ),
        select="validation/accuracy",
        groups={"characters": ("digits",), "clothes": ("fashion",)},
        about=__doc__,
    )
