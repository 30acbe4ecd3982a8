r"""The checkpoint in the package: a small BiT ResNet, pretrained on generated textures.

vit_jax pretrain --config=pretrain/embedded --workdir=runs/embedded

Our own recipe; `python -m experiments.embedded` runs it and writes the package's file. It sees
96,000 images of 100 classes of textures, crops of 30% to 100% of them at 32 px. Ten minutes of one
core. Expect 46% on validation (30% after 500 steps).
"""

import ml_collections

from vit_jax.config import parse_arg, recipe


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """`arg`: [classes=N][,steps=N]."""
    arg = parse_arg(arg, classes=100, steps=1500)
    dataset = f"textures/{arg.classes}"
    return recipe(
        model={
            "variant": "R26x1",
            "stages": (1, 1, 1),
            "stem_width": 64,
            "dtype": "float32",
        },
        seed=0,
        image_size=32,
        data={
            "dataset": dataset,
            "split": "train",
            "preprocess": "inception_crop(0.3)|flip",
            "num_threads": 1,
        },
        batch_size=64,
        steps=arg.steps,
        schedule={"peak": 1e-3, "warmup": arg.steps // 10, "decay": "cosine"},
        optimizer={"name": "adamw", "b2": 0.98, "weight_decay": 1e-2},
        log_every=20,
        checkpoint={"every": 100},
        eval_every=max(arg.steps // 5, 1),
        evaluators={
            "validation": {
                "data": {"dataset": dataset, "split": "validation[:500]", "preprocess": "resize"}
            }
        },
    )
