r"""ViT-g/14 and ViT-G/14 of "Scaling Vision Transformers" (Zhai et al., arXiv 2106.04560).

vit_jax pretrain --config=pretrain/scaling_vit:ViT-g/14,dataset=my_set \
    --config.data.data_dir=/mnt/data --workdir=runs/g14 --distributed
vit_jax pretrain --config=pretrain/scaling_vit:ViT-G/14,dataset=my_set \
    --workdir=runs/G14 --distributed

`my_set` is any large labelled dataset, as in jft.py. To cool down earlier, resume from any
checkpoint before the cooldown: --config.resume=CHECKPOINT --config.steps=N.

Expected on JFT-3B: G/14 83.0 % on ImageNet with 5 shots (84.86 with 10), 90.45 fine-tuned.

From section 3: Adafactor without scaling by the parameter and with momentum in bfloat16, learning
rate 8e-4, a reciprocal-square-root schedule (timescale 10k, warm-up 10k, cooldown 50k steps),
weight decay 3 for the head and 0.03 for the body, attention pooling, no class token. Batch, steps,
sigmoid loss, clipping and the head's bias as in
big_vision/configs/proj/scaling_laws/train_vit_g.py.

Planned for v5e:16x16 with --config.model.remat=full (compiler's estimates, libtpu 0.0.42;
experiments/benchmarks/results/plan.md): g/14 with --config.mesh.fsdp=16 4.6 of 15.75 GiB, 830 ms
per step, MFU 63 %, 58,999 chip-hours in total; G/14 with --config.mesh.fsdp=64 5.4 GiB, 1,438 ms,
66 %, 102,278 chip-hours.
"""

import ml_collections

from vit_jax.config import parse_arg, pretraining_data, recipe
from vit_jax.models import names


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """`arg`: [variant][,dataset=NAME][,steps=N]."""
    arg = parse_arg(arg, variant="ViT-g/14", dataset="jft3b", steps=1_000_000)
    return recipe(
        model={"variant": arg.variant, "pool": "map", "head_bias": -10.0, "scan": True},
        image_size=224,
        **pretraining_data(arg.dataset),
        batch_size=16_384,
        steps=arg.steps,
        loss={"name": "sigmoid"},
        schedule={"peak": 8e-4, "decay": "rsqrt", "cooldown": 50_000},
        optimizer={
            "name": "adafactor",
            "momentum_dtype": "bfloat16",
            "weight_decay": 0.03,
            "weight_decay_rules": ((names.HEAD_KERNEL, 100.0), (names.KERNELS, 1.0), (".*", 0.0)),
            "clip_norm": 1.0,
        },
        checkpoint={"every": 1000, "keep_every": 10_000},
        eval_every=10_000,
    )
