r"""The paper's pretraining on ImageNet and ImageNet-21k (arXiv 2010.11929, Table 3).

vit_jax pretrain --config=pretrain/paper:ViT-B/16 --workdir=runs/b16
vit_jax pretrain --config=pretrain/paper:ViT-L/16,dataset=imagenet21k \
    --workdir=runs/l16 --distributed
vit_jax pretrain --config=pretrain/paper:R50+ViT-B/16,dataset=imagenet21k \
    --workdir=runs/r50b16 --distributed

Expected validation accuracy at 224 px before fine-tuning (authors' reply in issue 62 of
google-research/vision_transformer): on ImageNet B/32 69.19, B/16 74.79, L/32 66.90, L/16 72.59 %;
on ImageNet-21k B/16 47.88, B/32 44.04, L/16 49.90, L/32 45.42 %.

From Table 3: batch 4096, Adam (0.9, 0.999), 10k warm-up steps, 224 px. Sigmoid loss, the head's
bias and the tanh layer are from the authors' replies in issues 2, 34 and 89; crops are from
big_vision. Hybrids are trained like their ViTs (section 4.1). JFT is in jft.py. For preparing
ImageNet-21k see experiments/launch/README.md.

`half=True` takes 0.4 of the FLOPs, with Muon and growing images (`half_cost` in vit_jax/config.py
has the sources). We haven't trained it: no accuracy is claimed.

Planned for v5e:16x16 (compiler's estimates, libtpu 0.0.42; experiments/benchmarks/results/plan.md):
B/16 on ImageNet 1.9 of 15.75 GiB, 19 ms per step, MFU 45 %, 125 chip-hours in total; with
--config.model.scan=true 2.3 GiB and 29 ms. L/16 on ImageNet-21k with --config.mesh.fsdp=16 2.9 GiB,
52 ms, 58 %, 1,138 chip-hours; without it 6.0 GiB and 61 ms.
"""

import ml_collections

from vit_jax.config import InputError, half_cost, parse_arg, pretraining_data, recipe

DATASETS = {
    "imagenet2012": {
        "epochs": 300.0,
        "schedule": {"peak": 3e-3, "decay": "cosine"},
        "optimizer": {"weight_decay": 0.3, "clip_norm": 1.0},
    },
    "imagenet21k": {
        "epochs": 90.0,
        "schedule": {"peak": 1e-3, "decay": "linear", "end": 1e-5},
        "optimizer": {"weight_decay": 0.03, "clip_norm": None},
    },
}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """`arg`: [variant][,dataset=imagenet2012|imagenet21k][,epochs=N][,half=True].

    With `half` the epochs are those of the full run.
    """
    arg = parse_arg(arg, variant="ViT-B/16", dataset="imagenet2012", epochs=0.0, half=False)
    if arg.dataset not in DATASETS:
        raise InputError(f"dataset={arg.dataset}: this recipe is for {' and '.join(DATASETS)}")
    values = DATASETS[arg.dataset]
    values = recipe(
        model={
            "variant": arg.variant,
            "representation_size": -1,
            "dropout": 0.1,
            "head_bias": -10.0,
        },
        image_size=224,
        **pretraining_data(arg.dataset),
        batch_size=4096,
        epochs=arg.epochs or values["epochs"],
        loss={"name": "sigmoid"},
        schedule={"warmup": 10_000, **values["schedule"]},
        optimizer={"name": "adamw", **values["optimizer"]},
        checkpoint={"every": 1000, "keep_every": 50_000},
        eval_every=5000,
    )
    return half_cost(values) if arg.half else values
