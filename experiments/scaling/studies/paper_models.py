"""The paper's third study: 18 models on JFT-300M, performance against compute (Table 6, Figure 5).

python -m experiments.scaling cost --study=paper_models --topology=v3:16x16
python -m experiments.scaling run --study=paper_models:dataset=my_set/1.0.0

JFT-300M isn't public: `dataset` is any large dataset, `train` and `validation` are its splits.
"""

from experiments.scaling.paper_recipes import fine_tuning, model, pretraining
from experiments.scaling.study import Budget, Grid, PretrainingSet, Study
from vit_jax.config import parse_arg

# Table 6: epochs.
EPOCHS = {
    "ViT-B/32": (7,),
    "ViT-B/16": (7,),
    "ViT-L/32": (7,),
    "ViT-L/16": (7, 14),
    "ViT-H/14": (14,),
    "R50x1": (7,),
    "R50x2": (7,),
    "R101x1": (7,),
    "R152x1": (7,),
    "R152x2": (7, 14),
    "R200x3": (14,),
    "R50x1+ViT-B/32": (7,),
    "R50x1+ViT-B/16": (7,),
    "R50x1+ViT-L/32": (7,),
    "R50x1+ViT-L/16": (7, 14),
}


def get_study(arg: str | None = None) -> Study:
    """`arg`: [dataset=NAME][,train=SPLIT][,validation=SPLIT][,examples=N]."""
    arg = parse_arg(
        arg,
        dataset="jft300m",
        train="train[50000:]",
        validation="train[:50000]",
        examples=303_000_000,
    )
    grid = Grid(
        pretraining(
            f"pretrain/jft:dataset={arg.dataset}", train=arg.train, validation=arg.validation
        ),
        models=tuple(map(model, EPOCHS)),
        sets=(PretrainingSet(arg.dataset, arg.examples, {}),),
        budgets=(Budget(epochs=7), Budget(epochs=14)),
        tasks=fine_tuning(),
        keep=lambda of, _, budget, __: budget.epochs in EPOCHS[of.name],
    )
    return Study("paper_models", (grid,), about=__doc__)
