r"""The paper's fine-tuning (arXiv 2010.11929, Table 4 and appendix B.1.1).

vit_jax transfer --config=transfer/paper:cifar10 --config.init=runs/b16 \
    --workdir=runs/cifar10

`sweep=True` chooses the learning rate on the part that the paper holds out (1% of the training
images of ImageNet, 2% of CIFAR, 10% of Pets and Flowers), then trains on all images. Table 2's runs
are `variant=ViT-L/16,size=512,ema=0.9999` and `variant=ViT-H/14,size=518,ema=0.9999`: Polyak
averaging at a higher resolution.

From Table 4: SGD with momentum 0.9, batch 512, cosine decay, no weight decay, gradient clipping at
1, 384 px; learning rates 0.003, 0.01, 0.03, 0.06 for ImageNet and 0.001, 0.003, 0.01, 0.03 for the
others. Warm-up and half-precision momentum are from the released code.

Expected from ImageNet-21k, B/16 (Table 5):
CIFAR-10 98.95, CIFAR-100 91.67, ImageNet 83.97, Flowers 99.38, Pets 94.43 %.
"""

import ml_collections

from vit_jax.config import InputError, parse_arg, recipe

# Training split without the dev part, dev part, test split, steps, warm-up. Flowers' own validation
# split is as large as its training split: its dev part is a tenth of both.
DATASETS = {
    "cifar10": ("train[:98%]", "train[98%:]", "test", 10_000, 500),
    "cifar100": ("train[:98%]", "train[98%:]", "test", 10_000, 500),
    "imagenet2012": ("train[:99%]", "train[99%:]", "validation", 20_000, 500),
    "oxford_iiit_pet": ("train[:90%]", "train[90%:]", "test", 500, 100),
    "oxford_flowers102": ("train+validation[:80%]", "validation[80%:]", "test", 500, 100),
}
LEARNING_RATES = (1e-3, 3e-3, 1e-2, 3e-2)


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """`arg`: dataset[,variant=ViT-B/16][,lr=0.03][,size=384][,ema=0.9999][,sweep=True]."""
    arg = parse_arg(
        arg, dataset="cifar10", variant="ViT-B/16", lr=0.03, size=384, ema=None, sweep=False
    )
    if arg.dataset not in DATASETS:
        raise InputError(f"dataset={arg.dataset}: this recipe is for {', '.join(DATASETS)}")
    train, dev, test, steps, warmup = DATASETS[arg.dataset]
    rates = (3e-3, 1e-2, 3e-2, 6e-2) if arg.dataset == "imagenet2012" else LEARNING_RATES
    workflow = {
        "split": {"train": train, "dev": dev, "test": test},
        "sweep": {"learning_rates": rates},
    }
    return recipe(
        init="",
        model={"variant": arg.variant},
        image_size=arg.size,
        data={
            "dataset": arg.dataset,
            "split": f"{train}+{dev}",
            "preprocess": "random_crop(0.857)|flip",
        },
        batch_size=512,
        steps=steps,
        ema_decay=arg.ema,
        schedule={"peak": arg.lr, "warmup": warmup, "decay": "cosine"},
        optimizer={"name": "sgd", "momentum_dtype": "bfloat16"},
        workflow=workflow if arg.sweep else None,
        checkpoint={"every": 500},
        eval_every=500,
        evaluators={
            "test": {
                "data": {"dataset": arg.dataset, "split": test, "preprocess": "resize"},
                "batch_size": 512,
            }
        },
    )
