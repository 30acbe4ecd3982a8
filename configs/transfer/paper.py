r"""The paper's fine-tuning (arXiv 2010.11929, Table 4 and appendix B.1.1).

python -m vit_jax.transfer --config=configs/transfer/paper.py:cifar10 --config.init=runs/b16 \
    --workdir=runs/cifar10

Of Table 4: SGD with momentum 0.9, batch 512, cosine decay, no weight decay, gradients clipped at 1,
384 px, and the base learning rate to be chosen on a held-out part of the training split:
0.003, 0.01, 0.03, 0.06 for ImageNet, 0.001, 0.003, 0.01, 0.03 for the others. Warm-up and the
half-precision momentum are the released code's. Expected from ImageNet-21k, B/16 (Table 5):
CIFAR-10 98.95, CIFAR-100 91.67, ImageNet 83.97, Flowers 99.38, Pets 94.43 %.
"""

import ml_collections

from vit_jax.config import parse_arg, recipe

# Training split, test split, steps, warm-up.
DATASETS = {
    "cifar10": ("train", "test", 10_000, 500),
    "cifar100": ("train", "test", 10_000, 500),
    "imagenet2012": ("train", "validation", 20_000, 500),
    "oxford_iiit_pet": ("train", "test", 500, 100),
    "oxford_flowers102": ("train+validation", "test", 500, 100),
}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """`arg`: dataset[,variant=ViT-B/16][,lr=0.03][,size=384]."""
    arg = parse_arg(arg, dataset="cifar10", variant="ViT-B/16", lr=0.03, size=384)
    if arg.dataset not in DATASETS:
        raise ValueError(f"dataset={arg.dataset}: this recipe is for {', '.join(DATASETS)}")
    train, test, steps, warmup = DATASETS[arg.dataset]
    return recipe(
        init="",
        model={"variant": arg.variant},
        image_size=arg.size,
        data={
            "dataset": arg.dataset,
            "split": train,
            "preprocess": "random_crop(0.857)|flip",
        },
        batch_size=512,
        steps=steps,
        schedule={"peak": arg.lr, "warmup": warmup, "decay": "cosine"},
        optimizer={"name": "sgd", "momentum_dtype": "bfloat16"},
        checkpoint={"every": 500},
        eval_every=500,
        classification={
            "test": {
                "data": {"dataset": arg.dataset, "split": test, "preprocess": "resize"},
                "batch_size": 512,
            }
        },
    )
