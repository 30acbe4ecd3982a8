r"""BiT's pretraining of ResNets with SGD (Kolesnikov et al., arXiv 1912.11370, section 3.3).

vit_jax pretrain --config=pretrain/bit:R50x1 --workdir=runs/r50x1
vit_jax pretrain --config=pretrain/bit:R101x1,dataset=imagenet21k \
    --workdir=runs/r101x1 --distributed
vit_jax pretrain --config=pretrain/bit:R152x2,dataset=my_set \
    --workdir=runs/r152x2 --distributed

ImageNet (BiT-S) and ImageNet-21k (BiT-M): 90 epochs, learning rate times 0.1 at epochs 30, 60, 80.
Other, larger datasets (BiT-L, JFT-300M): 40 epochs, times 0.1 at epochs 10, 23, 30, 37. SGD with
momentum 0.9, batch 4096, learning rate 0.03 per 256 images, 5k warm-up steps, 224 px.

BiT's weight decay of 1e-4 is a term of the loss, which momentum 0.9 multiplies by 10. Ours bypasses
the momentum and is 1e-3, as in big_vision/configs/bit_i1k.py. Gradient clipping at 1 and the
losses (softmax on ImageNet, otherwise sigmoid) are also from there.

Expected: R50x1 76.0 % on ImageNet's validation images (BiT's comparison of norms: GroupNorm and
weight standardisation, batch 4096). Pretrained on ImageNet-21k and fine-tuned on ImageNet: R50x1
80.68 %, R152x2 85.15 % (README of google-research/big_transfer).

Planned for v5e:16x16 (compiler's estimate, libtpu 0.0.42; experiments/benchmarks/results/plan.md):
R50x1 0.8 of 15.75 GiB, 11 ms per step, MFU 17 %, 22 chip-hours in total on ImageNet.
"""

import ml_collections

from vit_jax.config import parse_arg, pretraining_data, recipe

ON_IMAGENET = {"epochs": 90.0, "drops": (30 / 90, 60 / 90, 80 / 90)}
ON_JFT = {"epochs": 40.0, "drops": (10 / 40, 23 / 40, 30 / 40, 37 / 40)}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """`arg`: [variant][,dataset=NAME][,epochs=N]."""
    arg = parse_arg(arg, variant="R50x1", dataset="imagenet2012", epochs=0.0)
    values = ON_IMAGENET if arg.dataset.startswith("imagenet") else ON_JFT
    one_label = arg.dataset == "imagenet2012"
    return recipe(
        model={"variant": arg.variant, "head_bias": 0.0 if one_label else -10.0},
        image_size=224,
        **pretraining_data(arg.dataset),
        batch_size=4096,
        epochs=arg.epochs or values["epochs"],
        loss={"name": "softmax" if one_label else "sigmoid"},
        schedule={
            "peak": 0.03 * 4096 / 256,
            "warmup": 5000,
            "decay": "staircase",
            "drops": values["drops"],
        },
        optimizer={"name": "sgd", "weight_decay": 1e-3, "clip_norm": 1.0},
        checkpoint={"every": 1000, "keep_every": 50_000},
        eval_every=5000,
    )
