r"""Fine-tunes on scikit-learn's handwritten digits: 1,797 images of 8x8, a third held out.

vit_jax transfer --config=transfer/digits --config.init=runs/strokes \
    --workdir=runs/digits

Our own recipe, for the checkpoints of configs/pretrain/formula.py.
"""

import ml_collections

from vit_jax.config import parse_arg, recipe


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """`arg`: [variant][,steps=N]."""
    arg = parse_arg(arg, variant="ViT-nano/8", steps=400)
    return recipe(
        init="",
        model={"variant": arg.variant, "dtype": "float32"},
        image_size=32,
        data={"dataset": "digits", "split": "train", "preprocess": "resize|affine"},
        batch_size=64,
        steps=arg.steps,
        schedule={"peak": 3e-3, "warmup": arg.steps // 10, "decay": "cosine"},
        optimizer={"name": "adamw", "weight_decay": 0.05},
        log_every=20,
        eval_every=50,
        checkpoint={"every": 100},
        evaluators={"test": {"data": {"dataset": "digits", "split": "test"}}},
    )
