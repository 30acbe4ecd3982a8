r"""The paper's own pretraining runs on ImageNet and ImageNet-21k (arXiv 2010.11929, Table 3).

python -m vit_jax.pretrain --config=configs/pretrain/paper.py:ViT-B/16 --workdir=runs/b16
python -m vit_jax.pretrain --config=configs/pretrain/paper.py:ViT-L/16,dataset=imagenet21k \
    --workdir=runs/l16 --distributed

Expected, ImageNet validation at 224 px before fine-tuning (the authors, in issue 62 of
google-research/vision_transformer): from ImageNet alone B/32 69.19, B/16 74.79, L/32 66.90,
L/16 72.59 %; upstream on ImageNet-21k B/16 47.88, B/32 44.04, L/16 49.90, L/32 45.42 %.
Of Table 3: batch 4096, Adam (0.9, 0.999), 10k steps of warm-up, 224 px. The loss (sigmoid), the
head's bias and the tanh layer are the authors' answers in issues 2, 34 and 89 there; crops are
big_vision's.
"""

import ml_collections

from vit_jax.config import parse_arg, recipe, unknown

# The tanh layer of the pretraining head is as wide as the model.
WIDTHS = {"ViT-Ti": 192, "ViT-S": 384, "ViT-B": 768, "ViT-L": 1024, "ViT-H": 1280}

DATASETS = {
    "imagenet2012": {
        "epochs": 300.0,
        "train": "train[:99%]",
        "validation": "train[99%:]",
        "test": "validation",
        "schedule": {"peak": 3e-3, "decay": "cosine"},
        "weight_decay": 0.3,
        "clip_norm": 1.0,
        "head_bias": -10.0,
    },
    "imagenet21k": {
        "epochs": 90.0,
        "train": "full[51200:]",
        "validation": "full[25600:51200]",
        "test": "full[:25600]",
        "schedule": {"peak": 1e-3, "decay": "linear", "end": 1e-5},
        "weight_decay": 0.03,
        "clip_norm": None,
        "head_bias": -10.0,
    },
}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """`arg`: [variant][,dataset=imagenet2012|imagenet21k][,epochs=N]."""
    arg = parse_arg(arg, variant="ViT-B/16", dataset="imagenet2012", epochs=0.0)
    if arg.dataset not in DATASETS:
        raise ValueError(f"dataset={arg.dataset}: this recipe is for {' and '.join(DATASETS)}")
    size = arg.variant.split("/")[0]
    if size not in WIDTHS:
        raise unknown("model of this recipe", size, WIDTHS)
    hparams = DATASETS[arg.dataset]
    evaluation = {"dataset": arg.dataset, "preprocess": "central_crop(0.875)"}
    return recipe(
        model={
            "variant": arg.variant,
            "representation_size": WIDTHS[size],
            "dropout": 0.1,
            "head_bias": hparams["head_bias"],
            "scan": True,
        },
        image_size=224,
        data={
            "dataset": arg.dataset,
            "split": hparams["train"],
            "preprocess": "inception_crop|flip",
        },
        batch_size=4096,
        epochs=arg.epochs or hparams["epochs"],
        loss={"name": "sigmoid"},
        schedule={"warmup": 10_000, **hparams["schedule"]},
        optimizer={
            "name": "adamw",
            "weight_decay": hparams["weight_decay"],
            "clip_norm": hparams["clip_norm"],
        },
        checkpoint={"every": 1000, "keep_every": 50_000},
        eval_every=5000,
        classification={
            name: {"data": {**evaluation, "split": hparams[name]}, "batch_size": 4096}
            for name in ("validation", "test")
        },
    )
