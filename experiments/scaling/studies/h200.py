r"""ViTs, ResNets and a hybrid on 600 to 600,000 images: about eight minutes of one H200 GPU.

python -m experiments.scaling run --study=h200:rates
python -m experiments.scaling figures --study=h200:rates \
    --output=experiments/scaling/results/h200
python -m experiments.scaling run --study=h200

`python -m experiments.benchmarks.gpu --part=study` does the same with several processes on one GPU,
so that some draw images and compile while others train. Images are `strokes/200` at 32 px, tasks
are scikit-learn's digits, few-shot and fine-tuned. `rates` chooses each model's learning rate on a
proxy: a third of the steps, 60,000 images, the validation loss. Then Figure 4: four sizes of data,
always for one pass over the largest. Then Figure 5: a ninth and a third of these steps.

Compilation takes longer than a short run, so runs share programs: the learning rate and the images
are a program's arguments, and the proxies are as long as one of the budgets. For the same reason
budgets are separate runs, not branches of a trunk, which would be one more program.
experiments/scaling/results/h200/README.md says what is expected, and what would count for and
against.
"""

import dataclasses
from pathlib import Path

from experiments.scaling.study import Budget, Choice, Grid, Model, PretrainingSet, Study, load_study
from experiments.scaling.table import tuned_rate
from vit_jax.config import InputError
from vit_jax.recipes import merge

CLASSES, BATCH, IMAGE_SIZE = 200, 512, 32
SIZES = (600, 6_000, 60_000, 600_000)
STEPS = SIZES[-1] // BATCH
SHORTER = (STEPS // 9, STEPS // 3)
PROXY_STEPS = SHORTER[-1]
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
TUNED = Path(__file__).parent.parent / "results" / "h200" / "rates.csv"
# Layers as a loop compile faster.
VIT = {"model.scan": True}
BIT = {"model.variant": "R26x1", "model.stages": [4, 6], "model.zero_padded_pool": True}
MODELS = (
    Model("ViT-Ti/4", "ViT", VIT | {"model.variant": "ViT-Ti/4"}),
    Model("ViT-S/4", "ViT", VIT | {"model.variant": "ViT-S/4"}),
    Model("R32x2", "ResNet", BIT | {"model.stem_width": 128}),
    Model("R32x4", "ResNet", BIT | {"model.stem_width": 256}),
    Model("R11+ViT-Ti/4", "hybrid", VIT | {
        "model.variant": "R26+ViT-S/32", "model.stages": [3], "model.width": 192,
        "model.mlp_dim": 768, "model.num_heads": 3,
    }),
)  # fmt: skip
# For a rehearsal on a CPU: fields of a model by its family, and of the recipe.
SMALL_VIT = {"model.width": 48, "model.depth": 1, "model.mlp_dim": 48}
SMALL_BIT = {"model.stages": [1], "model.stem_width": 32}
SMALL = {"ViT": SMALL_VIT, "ResNet": SMALL_BIT, "hybrid": SMALL_VIT | SMALL_BIT}
SHORT = {
    "batch_size": 8,
    "schedule.warmup": 1,
    "schedule.cooldown": 1,
    "schedule.peak": 1e-3,
    "eval_every": None,
    "evaluators.validation.data.split": "validation[:16]",
}
SHORT_TRANSFER = {"steps": 3, "schedule.warmup": 1, "classification.test.data.split": "test[:16]"}


def get_study(arg: str | None = None) -> Study:
    """`arg`: "rates" for the proxies, "rehearsal" for a reduced study, None for the study."""
    recipe, task = _recipe(), _digits()
    about = {"select": "validation/accuracy", "about": __doc__}
    if arg == "rates":
        grid = _grid(
            recipe,
            PROXY_STEPS,
            sets=(subset(60_000),),
            seeds=(100,),  # of no other run
            sweep=tuple(Choice(f"strokes {rate:g}", {"schedule.peak": rate}) for rate in RATES),
        )
        return Study("h200_rates", (grid,), **about)
    if arg == "rehearsal":
        grid = Grid(
            merge(recipe, SHORT),
            models=tuple(
                dataclasses.replace(m, fields={**m.fields, **SMALL[m.family]}) for m in MODELS[::2]
            ),
            sets=tuple(map(subset, SIZES[:2])),
            budgets=(Budget(3),),
        )
        shorter = dataclasses.replace(task, recipe=merge(task.recipe, SHORT_TRANSFER))
        transfer = dataclasses.replace(grid, sets=grid.sets[:1], tasks=(shorter,))
        return Study("h200_rehearsal", (grid, transfer), **about)
    if arg is not None:
        raise InputError(f"h200:{arg}: expected h200, h200:rates or h200:rehearsal")
    models = tuple(
        dataclasses.replace(m, fields={**m.fields, "schedule.peak": tuned(m.name)}) for m in MODELS
    )
    sets = tuple(map(subset, reversed(SIZES)))  # drawing the largest takes longest
    data = _grid(merge(recipe, {"eval_every": -(-STEPS // 4)}), STEPS, models=models, sets=sets)
    compute = [_grid(recipe, steps, models=models, sets=sets[:1]) for steps in reversed(SHORTER)]
    transfer = dataclasses.replace(data, tasks=(task,))
    again = [dataclasses.replace(data, seeds=(seed,)) for seed in (1, 2)]
    return Study("h200", (data, *compute, transfer, *again), **about)


def _recipe() -> dict:
    """The recipe of `mini`, larger, without Fashion-MNIST."""
    (first, *_) = load_study("mini").grids
    dataset = f"strokes/{CLASSES}"
    kept = {k: v for k, v in first.recipe.items() if k not in ("classification", "fewshot")}
    return merge(
        kept,
        {
            "image_size": IMAGE_SIZE,
            "batch_size": BATCH,
            # Threads of one process hardly draw faster together. Sets of up to 60,000 images are
            # drawn once a run.
            "data": {
                "dataset": dataset,
                "preprocess": "resize",
                "num_threads": 1,
                "cache_gib": 0.25,
            },
            "schedule.warmup": 50,
            "checkpoint.every": STEPS // 2 + 1,
            "evaluators": {
                "validation": {
                    "protocol": "classification",
                    "data": {"dataset": dataset, "split": "validation[:2000]", "num_threads": 1},
                    "batch_size": 500,
                },
                "digits": {"protocol": "fewshot", **first.recipe["fewshot"]["digits"]},
            },
        },
    )


def _digits():
    """Fine-tuning on digits as in `mini`, at this study's image size."""
    tasks = next(grid.tasks for grid in load_study("mini").grids if grid.tasks)
    (task,) = (task for task in tasks if task.name == "digits")
    fields = {"image_size": IMAGE_SIZE, "model.dtype": "bfloat16"}
    return dataclasses.replace(task, recipe=merge(task.recipe, fields))


def _grid(recipe: dict, steps: int, **fields) -> Grid:
    """Runs of so many steps, with the cooldown in the last fifth."""
    recipe = merge(recipe, {"schedule.cooldown": steps // 5})
    return Grid(recipe, budgets=(Budget(steps),), **{"models": MODELS, **fields})


def subset(examples: int) -> PretrainingSet:
    return PretrainingSet(f"strokes {examples:,}", examples, {"data.split": f"train[:{examples}]"})


def tuned(model: str) -> float:
    """The learning rate that `rates` found best."""
    return tuned_rate(TUNED, "h200", "strokes", model)
