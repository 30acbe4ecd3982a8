r"""Self-supervised pretraining by masked patch prediction (arXiv 2010.11929, appendix B.1.2).

python -m vit_jax.pretrain --config=configs/pretrain/masked.py:ViT-B/16 --workdir=runs/masked

Expected: B/16 fine-tuned on ImageNet at 384 px 79.9 %, 2 points over training from scratch and 4
below supervised pretraining; from 1M steps on JFT, of which 100k give nearly all, and about the
same from ImageNet's own images. Half of the patches are corrupted; of these 80% become the mask
embedding, 10% another patch, 10% stay. Of the appendix: Adam at 2e-4, 10k steps of warm-up, cosine,
batch 4096. Not stated: weight decay (none here), the pooling (the mean: a class token would learn
nothing) and the augmentation (that of the other recipes). Any other recipe does the same with
--config.loss.name=masked_patches.

Planned for v5e:16x16 (the compiler's estimate, libtpu 0.0.42; experiments/benchmarks/results/
plan.md): B/16 1.9 of 15.75 GiB, 19 ms a step, MFU 45 %, 134 chip-hours in all.
"""

import ml_collections

from vit_jax.config import parse_arg, recipe


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """`arg`: [variant][,dataset=imagenet2012][,steps=100_000][,target=mean_color]."""
    arg = parse_arg(
        arg, variant="ViT-B/16", dataset="imagenet2012", steps=100_000, target="mean_color"
    )
    split = "full" if arg.dataset == "imagenet21k" else "train"
    return recipe(
        model={"variant": arg.variant, "pool": "gap"},
        image_size=224,
        data={
            "dataset": arg.dataset,
            "split": f"{split}[:99%]",
            "preprocess": "inception_crop|flip",
        },
        batch_size=4096,
        steps=arg.steps,
        loss={"name": "masked_patches"},
        masked_patches={"target": arg.target},
        schedule={"peak": 2e-4, "warmup": 10_000, "decay": "cosine"},
        optimizer={"name": "adamw", "weight_decay": 0.0},
        checkpoint={"every": 1000, "keep_every": 50_000},
        eval_every=5000,
        evaluators={  # of patches
            "validation": {
                "data": {
                    "dataset": arg.dataset,
                    "split": f"{split}[99%:]",
                    "preprocess": "central_crop(0.875)",
                },
                "batch_size": 4096,
            }
        },
    )
