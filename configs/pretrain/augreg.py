r"""The grid of "How to train your ViT?" (AugReg, Steiner et al., arXiv 2106.10270).

vit_jax pretrain --config=pretrain/augreg:ViT-B/16 --workdir=runs/b16
vit_jax pretrain \
    --config=pretrain/augreg:R26+S/32,augmentation=strong1,regularization=0.1 \
    --workdir=runs/r26 --distributed
vit_jax pretrain --config=pretrain/augreg:ViT-L/16,dataset=imagenet21k \
    --workdir=runs/l16 --distributed

The 28 cells are 7 levels of `augmentation`, `regularization` 0 or 0.1 (dropout and stochastic
depth) and `weight_decay` 0.1 or 0.03. The default `augmentation` is big_vision's for the model
(big_vision/configs/vit_i1k.py, vit_i21k.py), and for hybrids the paper's best cell without
regularization.

Expected (Table 3): ImageNet only, 300 epochs, validation accuracy at 224 px of the best cell: L/16
75.72, B/16 79.84, S/16 79.00, R50+L/32 76.84, R26+S/32 79.61, Ti/16 72.59, B/32 74.42, S/32 72.07,
R+Ti/16 70.13 %. ImageNet-21k, 300 epochs, then fine-tuned on ImageNet at 384 px: L/16 85.59, B/16
85.49, S/16 83.73, R50+L/32 85.99, R26+S/32 83.85, Ti/16 78.22, B/32 83.59, S/32 79.58, R+Ti/16
75.40 %. All models: Adam (momentum in bfloat16), learning rate 1e-3, batch 4096, 10k warm-up steps,
cosine schedule, gradient clipping at 1. Sigmoid loss and the head's bias are big_vision's.

`half=True` takes 0.4 of the FLOPs, with Muon and growing images (`half_cost` in vit_jax/config.py
has the sources). We haven't trained it: no accuracy is claimed.

Planned for v5e:16x16 (compiler's estimate, libtpu 0.0.42; experiments/benchmarks/results/plan.md):
B/16 on ImageNet 1.7 of 15.75 GiB, 18 ms per step, MFU 49 %, 116 chip-hours in total.
"""

import ml_collections

from vit_jax.config import (
    InputError,
    half_cost,
    parse_arg,
    pretraining_data,
    recipe,
    unknown,
)

# Layers and magnitude of RandAugment, and alpha of mixup (the paper's section 3).
AUGMENTATIONS = {
    "none": (0, 0, 0.0),
    "light1": (2, 0, 0.0),  # magnitude 0 isn't weak: see vit_jax/data/randaugment.py
    "light2": (2, 10, 0.2),
    "medium1": (2, 15, 0.2),
    "medium2": (2, 15, 0.5),
    "strong1": (2, 20, 0.5),
    "strong2": (2, 20, 0.8),
}
# Variant -> default on ImageNet, default on ImageNet-21k.
DEFAULTS = {
    "ViT-Ti/16": ("light1", "none"),
    "ViT-S/32": ("medium1", "none"),
    "ViT-S/16": ("medium2", "light1"),
    "ViT-B/32": ("medium2", "light2"),
    "ViT-B/16": ("medium2", "light2"),
    "ViT-L/16": ("medium2", "medium2"),
    "R+Ti/16": ("light1", "none"),
    "R26+S/32": ("medium2", "light1"),
    "R50+L/32": ("medium2", "medium2"),
}
DATASETS = ("imagenet2012", "imagenet21k")


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """`arg`: [variant][,dataset=][,augmentation=][,regularization=][,weight_decay=][,epochs=] ...

    ... [,half=True], where the epochs are those of the full run.
    """
    arg = parse_arg(
        arg,
        variant="ViT-B/16",
        dataset="imagenet2012",
        augmentation="",
        regularization=0.0,
        weight_decay=0.1,
        epochs=300.0,
        half=False,
    )
    if arg.dataset not in DATASETS:
        raise InputError(f"dataset={arg.dataset}: this recipe is for {' and '.join(DATASETS)}")
    if not arg.augmentation:
        if arg.variant not in DEFAULTS:
            raise InputError(
                f"{arg.variant} has no default augmentation: add augmentation=NAME, one of "
                + ", ".join(AUGMENTATIONS)
            )
        arg.augmentation = DEFAULTS[arg.variant][DATASETS.index(arg.dataset)]
    if arg.augmentation not in AUGMENTATIONS:
        raise unknown("augmentation", arg.augmentation, AUGMENTATIONS)
    layers, magnitude, mixup = AUGMENTATIONS[arg.augmentation]
    randaugment = f"|randaugment({layers}, {magnitude})" if layers else ""
    on_imagenet = arg.dataset == "imagenet2012"
    values = recipe(
        model={
            "variant": arg.variant,
            # No hidden layer in the head on ImageNet-21k.
            "representation_size": -1 if on_imagenet else None,
            "dropout": arg.regularization,
            "stochastic_depth": arg.regularization,
            "head_bias": -6.9 if on_imagenet else -10.0,
        },
        image_size=224,
        **pretraining_data(arg.dataset, "inception_crop|flip" + randaugment),
        augmentation={"mixup": mixup},
        batch_size=4096,
        epochs=arg.epochs,
        loss={"name": "sigmoid"},
        schedule={"peak": 1e-3, "warmup": 10_000, "decay": "cosine"},
        optimizer={
            "name": "adamw",
            "momentum_dtype": "bfloat16",
            "weight_decay": arg.weight_decay,
            "clip_norm": 1.0,
        },
        checkpoint={"every": 1000, "keep_every": 50_000},
        eval_every=5000,
    )
    return half_cost(values) if arg.half else values
