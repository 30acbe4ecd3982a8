r"""BiT's HyperRule (Kolesnikov et al., arXiv 1912.11370, section 3.3), without tuning.

vit_jax transfer --config=transfer/bit_hyperrule:20000 \
    --config.data=/my/images --config.init=BiT-M-R50x1.npz --workdir=runs/bit

For ResNets. The argument is the number of training images:

- under 20,000: 500 steps;
- under 500,000: 10,000 steps, mixup 0.1;
- otherwise: 20,000 steps, mixup 0.1.

SGD with momentum 0.9, learning rate 0.003, batch 512, linear warm-up, rate times 0.1 after 30, 60
and 90% of the steps (40, 60, 80% of 500), no weight decay. Images are resized to 512 pixels and
cropped to 480; with `small=True`, for images under 96 x 96, to 160 and 128. Random flips; use
`flip=False` for tasks where orientation matters.

Expected from ImageNet-21k, R50x1: CIFAR-10 97.3, ImageNet 80.7 %.
"""

import ml_collections

from vit_jax.config import parse_arg, recipe


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """`arg`: [images][,small=False][,flip=True]."""
    arg = parse_arg(arg, images=10_000, small=False, flip=True)
    if arg.images < 20_000:
        steps, warmup, drops = 500, 100, (0.4, 0.6, 0.8)
    elif arg.images < 500_000:
        steps, warmup, drops = 10_000, 500, (0.3, 0.6, 0.9)
    else:
        steps, warmup, drops = 20_000, 500, (0.3, 0.6, 0.9)
    crop, enlarged = (128, 160) if arg.small else (480, 512)
    return recipe(
        init="",
        image_size=crop,
        data={
            "dataset": "",
            "preprocess": f"random_crop({crop / enlarged})" + "|flip" * arg.flip,
        },
        eval_preprocess="resize",
        augmentation={"mixup": 0.1 if arg.images >= 20_000 else 0.0},
        batch_size=512,
        steps=steps,
        schedule={"peak": 3e-3, "warmup": warmup, "decay": "staircase", "drops": drops},
        optimizer={"name": "sgd", "clip_norm": None},
        workflow={"fit_memory": True, "export": ("npz", "bit", "timm")},
        eval_every=max(steps // 10, 1),
        checkpoint={"every": 500},
    )
