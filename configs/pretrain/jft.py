r"""The paper's pretraining on JFT-300M (arXiv 2010.11929, Table 3), on any large labelled dataset.

vit_jax pretrain --config=pretrain/jft:ViT-B/16,dataset=my_set \
    --config.data.data_dir=/mnt/data --workdir=runs/b16 --distributed
vit_jax pretrain --config=pretrain/jft:ViT-L/16,dataset=my_set,epochs=14 \
    --workdir=runs/l16 --distributed
vit_jax pretrain --config=pretrain/jft:R50+ViT-L/32,dataset=my_set \
    --workdir=runs/r50l32 --distributed

`my_set` is a TFDS dataset in ArrayRecord format with `image` and one or several labels per image
(JFT has 1.26). Its first 51,200 images are held out. JFT itself is not public.

Expected ImageNet accuracy after JFT-300M and fine-tuning at 384 px (Table 6): B/32 80.73,
B/16 84.15, L/32 84.37, L/16 86.30 (14 epochs: 87.12), H/14 88.08; R50x1 77.54, R50x2 82.12,
R101x1 80.67, R152x1 81.88, R152x2 84.97; R50+B/32 84.90, R50+B/16 85.58, R50+L/32 85.68,
R50+L/16 86.60 %.
All models: Adam (0.9, 0.999), batch 4096, 10k warm-up steps, linear decay, weight decay 0.1, no
dropout, 224 px. Sigmoid loss and the head's bias as for ImageNet-21k (big_vision). Section 4.1
trains hybrids like their ViTs, but Table 3 gives R50+ViT-L/32 a third of ViT-L/32's learning rate;
this recipe follows the table. ResNets pretrained with SGD are in bit.py.

Planned for v5e:16x16 (compiler's estimates, libtpu 0.0.42; experiments/benchmarks/results/plan.md):
H/14 11.9 of 15.75 GiB, 140 ms per step, MFU 58 %, 10,280 chip-hours in total; with
--config.mesh.fsdp=16 5.8 GiB, 122 ms, 67 %, 8,964. R50+B/16 3.0 GiB, 27 ms, 38 %, 1,005 chip-hours.

The TPUv3-core-days of the paper's Table 2 (2.5k, 0.68k, 0.23k), at the MFU that they imply:

vit_jax plan --config=pretrain/jft:ViT-H/14,epochs=14 --topology=v3:16x16 \
    --config.model.remat=full --mfu=0.32
vit_jax plan --config=pretrain/jft:ViT-L/16,epochs=14 --topology=v3:16x16 \
    --mfu=0.43
vit_jax plan --config=pretrain/paper:ViT-L/16,dataset=imagenet21k \
    --topology=v3:2x2 --config.accumulation=16 --config.model.remat=full --mfu=0.39
"""

import ml_collections

from vit_jax.config import parse_arg, pretraining_data, recipe, unknown

# Learning rate and epochs of Table 3. R200x3 is only in Table 6 and has the values of R152;
# ViT-b/32, half as wide, is only in Figure 4 and has those of B.
RATES = {
    "ViT-b/32": (8e-4, 7),
    "ViT-B/32": (8e-4, 7),
    "ViT-B/16": (8e-4, 7),
    "ViT-L/32": (6e-4, 7),
    "ViT-L/16": (4e-4, 7),
    "ViT-H/14": (3e-4, 14),
    "R50x1": (1e-3, 7),
    "R50x2": (1e-3, 7),
    "R101x1": (8e-4, 7),
    "R152x1": (6e-4, 7),
    "R152x2": (6e-4, 7),
    "R200x3": (6e-4, 14),
    "R50+ViT-B/32": (8e-4, 7),
    "R50+ViT-B/16": (8e-4, 7),
    "R50+ViT-L/32": (2e-4, 7),
    "R50+ViT-L/16": (4e-4, 7),
}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """`arg`: [variant][,dataset=NAME][,epochs=N]."""
    arg = parse_arg(arg, variant="ViT-B/16", dataset="jft300m", epochs=0.0)
    if arg.variant not in RATES:
        raise unknown("model of this recipe", arg.variant, RATES)
    peak, epochs = RATES[arg.variant]
    transformer = {"representation_size": -1} if "ViT" in arg.variant else {}
    return recipe(
        model={"variant": arg.variant, "head_bias": -10.0, **transformer},
        image_size=224,
        **pretraining_data(arg.dataset),
        batch_size=4096,
        epochs=arg.epochs or float(epochs),
        loss={"name": "sigmoid"},
        schedule={"peak": peak, "warmup": 10_000, "decay": "linear"},
        optimizer={"name": "adamw", "weight_decay": 0.1, "clip_norm": None},
        checkpoint={"every": 1000, "keep_every": 50_000},
        eval_every=10_000,
    )
