"""The paper's recipes (arXiv 2010.11929, Tables 3 and 4) as parts of a study, from `configs/`."""

from typing import Any

from experiments.scaling.study import Choice, Fields, Model, Task, merge
from vit_jax.recipes import recipe

TASKS = {
    "ImageNet": "imagenet2012",
    "CIFAR-10": "cifar10",
    "CIFAR-100": "cifar100",
    "Pets": "oxford_iiit_pet",
    "Flowers": "oxford_flowers102",
}


def family(variant: str) -> str:
    """Returns the family of a variant: ViT, ResNet or hybrid."""
    if "+" in variant:
        return "hybrid"
    return "ViT" if variant.startswith("ViT") else "ResNet"


def model(name: str, trained_as: str = "pretrain/jft:{}") -> Model:
    """Returns a model of the paper, with the model fields and learning rate of a recipe."""
    config = recipe(trained_as.format(name.replace("R50x1+", "R50+")))
    fields = {f"model.{field}": value for field, value in config.model.items()}
    return Model(name, family(name), fields | {"schedule.peak": config.schedule.peak})


def pretraining(name: str, **splits: str) -> dict[str, Any]:
    """Returns a recipe without the fields of a model and its length, which a grid sets.

    Args:
      name: a recipe with its argument, such as "pretrain/jft:dataset=my_set".
      **splits: `train` or an evaluator's name -> split that replaces the recipe's.
    """
    config = recipe(name).to_dict()
    del config["model"], config["epochs"], config["schedule"]["peak"]
    places = {
        "data.split" if part == "train" else f"evaluators.{part}.data.split": split
        for part, split in splits.items()
    }
    return merge(config, places)


def fine_tuning() -> tuple[Task, ...]:
    """Returns the five tasks at 384 px, with the learning rate chosen on dev.

    The paper trains again on train and dev with the chosen rate. Here the chosen run itself is
    reported, to save that second run.
    """
    return tuple(_task(name, dataset) for name, dataset in TASKS.items())


def _task(name: str, dataset: str) -> Task:
    config = recipe(f"transfer/paper:{dataset},sweep=True").to_dict()
    workflow, test = config.pop("workflow"), config["evaluators"]["test"]
    fields = {
        "data.split": workflow["split"]["train"],
        "evaluators.validation": merge(test, {"data.split": workflow["split"]["dev"]}),
        "eval_every": None,
    }
    if name == "ImageNet":
        real = {"data.dataset": "imagenet2012_real", "data.split": "validation"}
        fields["evaluators.real"] = merge(test, real)
    rates = workflow["sweep"]["learning_rates"]
    sweep = tuple(Choice(f"lr {rate:g}", {"schedule.peak": rate}) for rate in rates)
    return Task(name, merge(config, fields), sweep, _image_size)


def _image_size(of: Model) -> Fields:
    return {"image_size": 378} if of.name.endswith("/14") else {}  # 384 isn't a multiple of 14
