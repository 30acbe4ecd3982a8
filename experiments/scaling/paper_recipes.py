"""The recipes of Tables 3 and 4 of arXiv 2010.11929, as fields of a study's grid."""

from collections.abc import Mapping
from typing import Any

from experiments.scaling.study import Choice, Fields, Model, Task, merge

# Table 3: base learning rates on JFT-300M with Adam, also for ResNets.
JFT_RATES = {
    "ViT-b/32": 8e-4,  # not in the table; as B
    "ViT-B/32": 8e-4,
    "ViT-B/16": 8e-4,
    "ViT-L/32": 6e-4,
    "ViT-L/16": 4e-4,
    "ViT-H/14": 3e-4,
    "R50x1": 1e-3,
    "R50x2": 1e-3,
    "R101x1": 8e-4,
    "R152x1": 6e-4,
    "R152x2": 6e-4,
    "R200x3": 6e-4,  # not in the table; as R152
    "R50x1+ViT-B/32": 8e-4,
    "R50x1+ViT-B/16": 8e-4,
    "R50x1+ViT-L/32": 2e-4,
    "R50x1+ViT-L/16": 4e-4,
}
WIDTHS = {"b": 384, "B": 768, "L": 1024, "H": 1280}


def family(variant: str) -> str:
    """Returns the family of a variant: ViT, ResNet or hybrid."""
    if "+" in variant:
        return "hybrid"
    return "ViT" if variant.startswith("ViT") else "ResNet"


def model(variant: str, fields: Fields) -> Model:
    """Returns a model of the paper, with the tanh layer of its pretraining head."""
    kind = family(variant)
    own: dict[str, Any] = {"model.variant": variant}
    if kind != "ResNet":
        size = variant.rpartition("-")[2].partition("/")[0]
        own |= {"model.representation_size": WIDTHS[size], "model.scan": True}
    return Model(variant, kind, own | dict(fields))


def pretraining(dataset: str, train: str, validation: str, **fields: Any) -> dict[str, Any]:
    """Returns the common fields of Table 3, with sigmoid loss as in the released configs."""
    recipe = {
        "image_size": 224,
        "batch_size": 4096,
        "model": {"head_bias": -10.0},
        "data": {"dataset": dataset, "split": train, "preprocess": "inception_crop|flip"},
        "loss": {"name": "sigmoid"},
        "schedule": {"warmup": 10_000, "decay": "linear"},
        "optimizer": {"name": "adamw", "weight_decay": 0.1, "clip_norm": None},
        "checkpoint": {"every": 1000},
        "eval_every": 10_000,
        "classification": {
            "validation": {
                "data": {
                    "dataset": dataset,
                    "split": validation,
                    "preprocess": "central_crop(0.875)",
                },
                "batch_size": 4096,
            }
        },
    }
    return merge(recipe, fields)


# Table 4 and appendix B.1.1: dataset, training split without dev, dev split, test split, steps,
# warm-up, learning rates.
_SMALL = (0.001, 0.003, 0.01, 0.03)
_TABLE_4 = (
    ("ImageNet", "imagenet2012", "train[:99%]", "train[99%:]", "validation", 20_000, 500,
     (0.003, 0.01, 0.03, 0.06)),
    ("CIFAR-10", "cifar10", "train[:98%]", "train[98%:]", "test", 10_000, 500, _SMALL),
    ("CIFAR-100", "cifar100", "train[:98%]", "train[98%:]", "test", 10_000, 500, _SMALL),
    ("Pets", "oxford_iiit_pet", "train[:90%]", "train[90%:]", "test", 500, 100, _SMALL),
    ("Flowers", "oxford_flowers102", "train+validation[:90%]", "validation[90%:]", "test", 500, 100,
     _SMALL),
)  # fmt: skip
TASK_NAMES = tuple(row[0] for row in _TABLE_4)


def fine_tuning(*names: str) -> tuple[Task, ...]:
    """Returns tasks at 384 px, with the learning rate chosen on dev.

    The paper trains again on train and dev with the chosen rate. Here the chosen run itself is
    reported, to save that second run.
    """
    return tuple(_task(*row) for row in _TABLE_4 if row[0] in names)


def _task(
    name: str, dataset: str, train: str, dev: str, test: str, steps: int, warmup: int, rates: tuple
) -> Task:
    def evaluation(split: str) -> Mapping[str, Any]:
        data = {"dataset": dataset, "split": split, "preprocess": "resize"}
        return {"data": data, "batch_size": 512}

    recipe = {
        "image_size": 384,
        "batch_size": 512,
        "steps": steps,
        "data": {"dataset": dataset, "split": train, "preprocess": "random_crop(0.857)|flip"},
        "schedule": {"warmup": warmup, "decay": "cosine"},
        "optimizer": {"name": "sgd", "momentum_dtype": "bfloat16"},
        "checkpoint": {"every": 500},
        "classification": {"validation": evaluation(dev), "test": evaluation(test)},
    }
    if name == "ImageNet":
        labels = {"dataset": "imagenet2012_real", "split": "validation", "preprocess": "resize"}
        recipe["classification"]["real"] = {"data": labels, "batch_size": 512}
    sweep = tuple(Choice(f"lr {rate:g}", {"schedule.peak": rate}) for rate in rates)
    return Task(name, recipe, sweep, _image_size)


def _image_size(of: Model) -> Fields:
    return {"image_size": 378} if of.name.endswith("/14") else {}  # 384 isn't a multiple of 14
