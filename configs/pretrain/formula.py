r"""Small models on a generated, formula-driven dataset: no download, minutes on two CPU cores.

vit_jax pretrain --config=pretrain/formula --workdir=runs/strokes
vit_jax pretrain --config=pretrain/formula:dataset=fractals \
    --workdir=runs/fractals

Our own recipe. The head has the hidden layer of arXiv 2010.11929, section 3.2, whose output is the
few-shot features. Longer pretraining fits the formula's classes better but digits worse. Made for
CPUs: on v5e:2x2 the compiler estimates 0.04 of 15.75 GiB, 0.6 ms per step and 0.9 % MFU.
"""

import ml_collections

from vit_jax.config import parse_arg, recipe


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """`arg`: [variant][,dataset=strokes|fractals][,classes=N][,steps=N]."""
    arg = parse_arg(arg, variant="ViT-nano/8", dataset="strokes", classes=200, steps=1200)
    return recipe(
        model={"variant": arg.variant, "representation_size": 384, "dtype": "float32"},
        image_size=32,
        data={
            "dataset": f"{arg.dataset}/{arg.classes}",
            "split": "train",
            "preprocess": "resize|affine",
            "num_threads": 1,  # numpy on small arrays: more threads don't help
        },
        batch_size=128,
        steps=arg.steps,
        schedule={"peak": 8e-3, "warmup": 3 * arg.steps // 8, "decay": "cosine"},
        optimizer={"name": "adamw", "b2": 0.98, "weight_decay": 1e-4},
        checkpoint={"every": 200},
        eval_every=max(arg.steps // 4, 1),
        evaluators={
            "validation": {
                "data": {
                    "dataset": f"{arg.dataset}/{arg.classes}",
                    "split": "validation[:1000]",
                }
            }
        },
    )
