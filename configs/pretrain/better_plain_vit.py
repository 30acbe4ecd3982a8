r"""Better plain ViT baselines for ImageNet-1k (Beyer et al., arXiv 2205.01580).

vit_jax pretrain --config=pretrain/better_plain_vit --workdir=runs/s16
vit_jax pretrain --config=pretrain/better_plain_vit:ViT-S/16,epochs=300 \
    --workdir=runs/s16_300
vit_jax pretrain --config=pretrain/better_plain_vit:half=True --workdir=runs/s16_half

Expected ImageNet validation accuracy at 224 px: 76.5, 78.5, 80.0 % after 90, 150, 300 epochs. The
authors' 90 epochs took 6.5 hours on a TPUv3-8 (section 3). Adam (momentum in bfloat16), learning
rate 1e-3, batch 1024, cosine schedule, 10k warm-up steps, gradient clipping at 1, weight decay 1e-4
(multiplied by the schedule, not by the peak rate), RandAugment (2, 10), mixup 0.2, softmax loss,
global average pooling, fixed 2-D sin-cos positions, a tanh layer in the head; as published in
big_vision/configs/vit_s16_i1k.py.

`half=True` takes 0.4 of the FLOPs, with Muon and growing images (`half_cost` in vit_jax/config.py
has the sources). We haven't trained this at its full size: no accuracy is claimed. A small
comparison is in experiments/efficiency/README.md.

Planned for v5e:4x4 (compiler's estimate, libtpu 0.0.42; experiments/benchmarks/results/plan.md):
S/16 1.6 of 15.75 GiB, 18 ms per step, MFU 48 %, 9 chip-hours in total; with
--config.model.scan=true 1.9 GiB and 27 ms.
"""

import ml_collections

from vit_jax.config import half_cost, parse_arg, pretraining_data, recipe


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """`arg`: [variant][,epochs=N][,half=True]; with `half` the epochs are those of the full run."""
    arg = parse_arg(arg, variant="ViT-S/16", epochs=90.0, half=False)
    values = recipe(
        model={
            "variant": arg.variant,
            "pool": "gap",
            "position": "sincos_2d",
            "representation_size": -1,
        },
        image_size=224,
        **pretraining_data("imagenet2012", "inception_crop|flip|randaugment(2, 10)"),
        augmentation={"mixup": 0.2},
        batch_size=1024,
        epochs=arg.epochs,
        schedule={"peak": 1e-3, "warmup": 10_000, "decay": "cosine"},
        optimizer={
            "name": "adamw",
            "momentum_dtype": "bfloat16",
            "weight_decay": 1e-4,
            "weight_decay_convention": "independent",
            "clip_norm": 1.0,
        },
        checkpoint={"every": 1000, "keep_every": 50_000},
        eval_every=5000,
    )
    return half_cost(values) if arg.half else values
