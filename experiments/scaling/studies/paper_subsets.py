"""The paper's second study: random subsets of JFT-300M without regularisation (Figure 4).

python -m experiments.scaling cost --study=paper_subsets --topology=v3:16x16

The same hyperparameters at every size, early stopping on upstream validation, and linear 5-shot
accuracy on ImageNet instead of fine-tuning (section 4.3). The paper doesn't state the training
length per subset; here it is the steps of 7 epochs of the full dataset. Subsets are the split's
first images.
"""

from experiments.scaling.paper_recipes import model, pretraining
from experiments.scaling.study import Budget, Grid, PretrainingSet, Study, merge
from vit_jax.config import parse_arg

MODELS = ("ViT-L/16", "ViT-L/32", "ViT-B/32", "ViT-b/32", "R50x1", "R152x2")
MILLIONS = (9, 30, 90, 300)


def get_study(arg: str | None = None) -> Study:
    """`arg`: [dataset=NAME][,split=NAME][,validation=SPLIT][,steps=N][,unit=N]."""
    arg = parse_arg(
        arg,
        dataset="jft300m",
        split="train",
        validation="train[-50000:]",
        steps=517_800,
        unit=1_000_000,
    )
    imagenet = {"dataset": "imagenet2012", "preprocess": "central_crop(0.875)"}
    fewshot = {
        "protocol": "fewshot",
        "data": {**imagenet, "split": "train[:65000]"},
        "test_split": "validation",
        "shots": [5],
    }
    recipe = pretraining(
        f"pretrain/jft:dataset={arg.dataset}", train=arg.split, validation=arg.validation
    )

    def subset(millions: int) -> PretrainingSet:
        images = millions * arg.unit
        fields = {"data.split": f"{arg.split}[:{images}]"}
        return PretrainingSet(f"{arg.dataset} {images:,}", images, fields)

    grid = Grid(
        merge(recipe, {"evaluators.ImageNet": fewshot}),
        models=tuple(map(model, MODELS)),
        sets=tuple(map(subset, MILLIONS)),
        budgets=(Budget(arg.steps),),
    )
    return Study("paper_subsets", (grid,), select="validation/accuracy", about=__doc__)
