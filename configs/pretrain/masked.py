r"""Self-supervised pretraining by masked patch prediction (arXiv 2010.11929, appendix B.1.2).

vit_jax pretrain --config=pretrain/masked:ViT-B/16 --workdir=runs/masked

Expected: B/16 fine-tuned on ImageNet at 384 px 79.9 %, 2 points above training from scratch and 4
below supervised pretraining. The paper pretrains 1M steps on JFT; 100k steps, or ImageNet's images,
give nearly the same.

Half of the patches are corrupted: 80% of them become the mask embedding, 10% another patch, 10%
stay. From the appendix: Adam, learning rate 2e-4, 10k warm-up steps, cosine schedule, batch 4096.
Not stated there: weight decay (none here), pooling (the mean: the loss doesn't train a class token)
and augmentation (as in the other recipes). Any other recipe trains on masked patches with
--config.loss.name=masked_patches.

Planned for v5e:16x16 (compiler's estimate, libtpu 0.0.42; experiments/benchmarks/results/plan.md):
B/16 1.9 of 15.75 GiB, 19 ms per step, MFU 45 %, 134 chip-hours in total.
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
        evaluators={  # predict patches
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
