r"""Do ViTs overtake ResNets with more data, and what compute do both need? With tuned rates.

python -m experiments.scaling run --study=crossover:rates
python -m experiments.scaling figures --study=crossover:rates \
    --output=experiments/scaling/results/crossover
python -m experiments.scaling run --study=crossover

The models of `mini` on two families of images, `strokes` and `textures` (colour, global structure).
`rates` chooses each model's learning rate on a proxy: 1,200 steps, 30,000 images, the validation
loss. Then 300 to 300,000 images in steps of 10, always for one pass over the largest set; and three
budgets with the same FLOPs for every model. experiments/scaling/results/crossover/README.md says
what is expected, and what would count for and against.
"""

import dataclasses
from pathlib import Path

from experiments.scaling.study import Budget, Choice, Grid, PretrainingSet, Study, load_study, merge
from experiments.scaling.table import tuned_rate
from vit_jax.config import InputError

FAMILIES = ("strokes", "textures")
CLASSES, BATCH = 100, 64
SIZES = (300, 3_000, 30_000, 300_000)
STEPS = SIZES[-1] // BATCH
PROXY_STEPS = 1200
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
SEEDS = (0, 1, 2)
BUDGETS = (2.25e11, 4.5e11, 9e11)  # FLOPs
# Training FLOPs per image at 16 px, by `vit_jax.costs.flops`.
FLOPS = {
    "ViT-XS/4": 4_427_904,
    "ViT-S/4": 24_152_448,
    "R5x0.5": 3_015_936,
    "R14x0.5": 8_253_696,
    "R5+ViT-XS/4": 7_735_680,
}
TUNED = Path(__file__).parent.parent / "results" / "crossover" / "rates.csv"


def get_study(arg: str | None = None) -> Study:
    """`arg`: "rates" for the proxies, None for the study."""
    mini = load_study("mini")
    (first, *_) = mini.grids
    recipe = merge(first.recipe, {"schedule.cooldown": STEPS // 5, "eval_every": STEPS // 4})
    about = {"select": "validation/accuracy", "groups": mini.groups, "about": __doc__}
    if arg == "rates":
        proxy = {"schedule.cooldown": PROXY_STEPS // 5, "eval_every": None, "fewshot": {}}
        grids = [
            Grid(
                of_family(merge(recipe, proxy), family),
                models=first.models,
                sets=(subset(family, 30_000),),
                budgets=(Budget(PROXY_STEPS),),
                seeds=(100,),  # of no other run
                sweep=tuple(Choice(f"{family} {r:g}", {"schedule.peak": r}) for r in RATES),
            )
            for family in FAMILIES
        ]
        return Study("crossover_rates", tuple(grids), **about)
    if arg is not None:
        raise InputError(f"crossover:{arg}: expected crossover or crossover:rates")
    transfers = next(grid.tasks for grid in mini.grids if grid.tasks)
    grids = []
    for family in FAMILIES:
        models = [
            dataclasses.replace(m, fields={**m.fields, "schedule.peak": tuned(family, m.name)})
            for m in first.models
        ]
        grids.append(
            Grid(
                of_family(recipe, family),
                models=tuple(models),
                sets=tuple(subset(family, size) for size in SIZES),
                budgets=(Budget(STEPS),),
                seeds=SEEDS,
                tasks=transfers,
            )
        )
        grids += [
            Grid(
                of_family(merge(recipe, {"eval_every": None}), family),
                models=(model,),
                sets=(subset(family, SIZES[-1]),),
                budgets=tuple(Budget(steps(model.name, flops)) for flops in BUDGETS),
                seeds=SEEDS,
                cooldown=0.2,
            )
            for model in models
        ]
    return Study("crossover", tuple(grids), **about)


def of_family(recipe: dict, family: str) -> dict:
    """The recipe on another family of images."""
    dataset = f"{family}/{CLASSES}"
    names = ("data.dataset", "classification.validation.data.dataset")
    return merge(recipe, dict.fromkeys(names, dataset))


def subset(family: str, examples: int) -> PretrainingSet:
    return PretrainingSet(f"{family} {examples:,}", examples, {"data.split": f"train[:{examples}]"})


def steps(model: str, flops: float) -> int:
    """Steps of a model that take as many FLOPs."""
    return round(flops / (BATCH * FLOPS[model]))


def tuned(family: str, model: str) -> float:
    """The learning rate that `rates` found best."""
    return tuned_rate(TUNED, "crossover", family, model)
