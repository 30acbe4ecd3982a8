r"""A rehearsal of a large run: 100 steps of the paper's ImageNet-21k recipe on synthetic images.

vit_jax pretrain --config=pretrain/rehearsal:L/16 --workdir=runs/rehearsal --distributed
vit_jax plan --config=pretrain/rehearsal:L/16 --topology=v5e:16x16
vit_jax pretrain --config=pretrain/jft:ViT-H/14 --config.data.dataset=synthetic --config.stop=100 \
    --workdir=runs/rehearsal --distributed

Our own recipe. It needs no data on disk: images are drawn by their index. Model, batch, classes and
optimizer are the paper's, and so are memory and the time of a step; two checkpoints are written and
two evaluations made. Any other recipe is rehearsed by the third command; its evaluators read
synthetic images then, too. What it doesn't show is how fast the real images can be read.

Planned for v5e:16x16: as L/16 on ImageNet-21k in paper.py.
"""

import re

import ml_collections

from vit_jax.config import parse_arg, recipe

CLASSES = 21_843  # of ImageNet-21k


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """`arg`: [variant][,steps=N]. A size alone, L/16, is that of a ViT."""
    arg = parse_arg(arg, variant="ViT-B/16", steps=100)
    is_size = re.fullmatch(r"\w+/\d+", arg.variant)
    variant = f"ViT-{arg.variant}" if is_size else arg.variant
    transformer = {"representation_size": -1, "dropout": 0.1} if "ViT" in variant else {}
    dataset = f"synthetic/{CLASSES}"
    return recipe(
        model={"variant": variant, "head_bias": -10.0, **transformer},
        image_size=224,
        data={"dataset": dataset, "split": "full[51200:]", "preprocess": "inception_crop|flip"},
        batch_size=4096,
        epochs=90.0,
        stop=arg.steps,
        loss={"name": "sigmoid"},
        schedule={"peak": 1e-3, "warmup": 10_000, "decay": "linear", "end": 1e-5},
        optimizer={"name": "adamw", "weight_decay": 0.03, "clip_norm": None},
        checkpoint={"every": max(arg.steps // 2, 1)},
        log_every=10,
        eval_every=max(arg.steps // 2, 1),
        evaluators={
            "validation": {
                "data": {
                    "dataset": dataset,
                    "split": "full[:8192]",
                    "preprocess": "central_crop(0.875)",
                },
                "batch_size": 4096,
            }
        },
    )
