r"""One of the 19 tasks of VTAB-1k, as in the paper (arXiv 2010.11929, section 4.1 and Table 4).

vit_jax transfer --config=transfer/vtab:cifar100 --config.init=vit:L/16-21k \
    --workdir=runs/vtab_cifar100

All tasks: 2,500 steps on the 1,000 images of `train+dev`, learning rate 0.01, SGD with momentum
0.9, batch 512, cosine decay, gradient clipping at 1, 384 px. Expected (Table 9, ViT-L/16 from
ImageNet-21k): 72.7 on average over the tasks; CIFAR-100 84.1, Caltech-101 90.8 %.
"""

import ml_collections

from vit_jax.config import parse_arg, recipe


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """`arg`: task[,variant=ViT-B/16][,lr=0.01][,size=384]; tasks: vit_jax/data/vtab.py."""
    arg = parse_arg(arg, task="cifar100", variant="ViT-B/16", lr=0.01, size=384)
    dataset = f"vtab/{arg.task}"
    return recipe(
        init="",
        model={"variant": arg.variant},
        image_size=arg.size,
        data={
            "dataset": dataset,
            "split": "train+dev",
            # Structured tasks ask where things are and which way they face: no crop, no flip.
            "preprocess": "resize",
        },
        batch_size=512,
        steps=2500,
        schedule={"peak": arg.lr, "warmup": 200, "decay": "cosine"},
        optimizer={"name": "sgd", "momentum_dtype": "bfloat16"},
        checkpoint={"every": 500},
        eval_every=500,
        evaluators={
            "test": {
                "data": {"dataset": dataset, "split": "test", "preprocess": "resize"},
                "batch_size": 512,
            }
        },
    )
