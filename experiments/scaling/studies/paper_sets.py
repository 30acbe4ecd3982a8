"""The paper's first study: larger and larger datasets, tuned regularisation (Table 5, Figure 3).

python -m experiments.scaling cost --study=paper_sets --topology=v3:16x16

Pretrains on ImageNet, ImageNet-21k and JFT-300M, chooses weight decay, dropout and label smoothing
on upstream validation, then fine-tunes at 384 px on five datasets. The paper doesn't state the grid
of the sweep; ours is around Table 3.
"""

import itertools

from experiments.scaling.paper_recipes import fine_tuning, model, pretraining
from experiments.scaling.study import Budget, Choice, Grid, Model, PretrainingSet, Study
from vit_jax.config import parse_arg

MODELS = ("ViT-B/32", "ViT-B/16", "ViT-L/32", "ViT-L/16", "ViT-H/14")
DROPOUTS = (0.0, 0.1)
SMOOTHINGS = (0.0, 1e-4)


def sweep(*weight_decays: float) -> tuple[Choice, ...]:
    return tuple(
        Choice(
            f"decay {decay:g}, dropout {dropout:g}, smoothing {smoothing:g}",
            {
                "optimizer.weight_decay": decay,
                "model.dropout": dropout,
                "loss.label_smoothing": smoothing,
            },
        )
        for decay, dropout, smoothing in itertools.product(weight_decays, DROPOUTS, SMOOTHINGS)
    )


def get_study(arg: str | None = None) -> Study:
    """`arg`: [jft=NAME][,jft_train=SPLIT][,jft_validation=SPLIT], a dataset to replace JFT."""
    arg = parse_arg(arg, jft="jft300m", jft_train="train[50000:]", jft_validation="train[:50000]")
    tasks = fine_tuning()

    def models(trained_as: str) -> tuple[Model, ...]:
        return tuple(model(name, trained_as) for name in MODELS)

    imagenet = Grid(
        pretraining("pretrain/paper:dataset=imagenet2012"),
        models=models("pretrain/paper:{},dataset=imagenet2012")[:-1],  # the paper has no H/14 here
        sets=(PretrainingSet("ImageNet", 1_281_167, {}),),
        budgets=(Budget(epochs=300),),
        sweep=sweep(0.1, 0.3),
        tasks=tasks,
    )
    imagenet21k = Grid(
        pretraining("pretrain/paper:dataset=imagenet21k"),
        models=models("pretrain/paper:{},dataset=imagenet21k"),
        sets=(PretrainingSet("ImageNet-21k", 14_197_122, {}),),
        budgets=(Budget(epochs=90),),
        sweep=sweep(0.03, 0.1),
        tasks=tasks,
    )
    jft = Grid(
        pretraining(
            f"pretrain/jft:dataset={arg.jft}", train=arg.jft_train, validation=arg.jft_validation
        ),
        models=models("pretrain/jft:{}"),
        sets=(PretrainingSet("JFT-300M", 303_000_000, {}),),
        budgets=(Budget(epochs=7), Budget(epochs=14)),
        sweep=sweep(0.03, 0.1),
        tasks=tasks,
        keep=lambda of, _, budget, __: (
            (budget.epochs == 14) == (of.name in ("ViT-L/16", "ViT-H/14"))
        ),
    )
    return Study(
        "paper_sets",
        (imagenet, imagenet21k, jft),
        select="validation/accuracy",
        about=__doc__,
    )
