"""A study of the paper's three statements that two cores finish in the background.

python -m experiments.scaling run --study=mini

Pretraining on `strokes/200`, embedded random characters, at 16 px; subsets of 500, 5,000 and 50,000
images, two decades. Two ViTs, two ResNets and a hybrid over a decade of compute an image. Few-shot
on scikit-learn's digits and on Fashion-MNIST, and fine-tuning on both. Fashion-MNIST is Debian's
package dataset-fashion-mnist, prepared once with

python -m vit_jax.prepare --source=idx:/usr/share/datasets/fashion-mnist --name=fashion_mnist \
    --output=/tmp/data

The order is that of importance: it may be stopped anywhere, and what there is be drawn.
"""

from experiments.scaling.study import Budget, Grid, Model, PretrainingSet, Study, Task

CLASSES = 200
BATCH = 128
STEPS = 400
VIT = {"model.representation_size": 64, "model.dtype": "float32"}
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
FASHION = {"dataset": "fashion_mnist", "data_dir": "/tmp/data"}


def fewshot(data: dict) -> dict:
    return {"data": data, "test_split": "test[:1000]", "shots": [5, 10], "l2": 100.0}


RECIPE = {
    "image_size": 16,
    "batch_size": BATCH,
    "data": {"dataset": f"strokes/{CLASSES}", "preprocess": "resize", "num_threads": 1},
    "schedule": {"peak": 3e-3, "warmup": 40, "decay": "constant"},
    "optimizer": {"name": "adamw", "b2": 0.98, "weight_decay": 0.03},
    "checkpoint": {"every": 100, "keep_last": 1},
    "log_every": 50,
    "classification": {
        "validation": {
            "data": {"dataset": f"strokes/{CLASSES}", "split": "validation[:1000]"},
            "batch_size": 250,
        }
    },
    "fewshot": {
        "digits": {"data": {"dataset": "digits", "split": "train"}, "test_split": "test",
                   "shots": [5, 10], "l2": 100.0},
        "fashion": fewshot(FASHION | {"split": "train[:1000]"}),
    },
}  # fmt: skip


def subset(examples: int) -> PretrainingSet:
    return PretrainingSet(f"strokes {examples:,}", examples, {"data.split": f"train[:{examples}]"})


def get_study(_: str | None = None) -> Study:
    raise NotImplementedError
