r"""Trains a classifier on a folder of images.

vit_jax transfer --config=transfer/folder --config.data=/my/images \
    --config.init=augreg:S/16 --workdir=runs/mine

`data` is a folder `class/name.jpg` or `train/class/name.jpg`, a table (.csv, .jsonl) of images, or
the name of another dataset. Fine-tunes as in arXiv 2010.11929 (Table 4 and appendix B.1.1): SGD
with momentum 0.9, batch 512, cosine decay, gradient clipping at 1, a zero-initialised head. The
learning rate is chosen on the dev split, and the final run trains on train and dev. Model and image
size are the checkpoint's; `size=384` is the paper's. The accuracy depends on the images; the report
gives a confidence interval, and what simpler classifiers reach: hand-made features and, with a
checkpoint, a linear probe, which is kept where fine-tuning is no better on dev.

On a CPU (`DEVICES`) steps, batch and trials are few; `--config.workflow.minutes=10` keeps to a
time, anywhere. Where none is named a CPU starts from `embedded`, a small ResNet in this package.

Options for small datasets, from other papers:

    adamw               AdamW, with the learning rate multiplied by 0.75 per block towards the input
    resnet              AdamW with one learning rate for all layers; the default for `embedded`
    scratch             AdamW for random weights; the default for a CPU without a checkpoint
    head=probe          starts with a head fitted to frozen features (arXiv 2202.10054)
    train=attention     trains only attention and head (arXiv 2203.09795); train=head: only the head
    train=lora          trains low-rank adapters of attention, and the head (arXiv 2106.09685), by
                        AdamW; rank=8,alpha=16 are its defaults. They are merged in what is exported
    augment=light       RandAugment(2, 10) and mixup 0.2; medium: (2, 15) and 0.5; strong: (2, 20)
                        and 0.8; levels of AugReg (arXiv 2106.10270)
    patience=3          ends trials after 3 evaluations without improvement on dev; the final run
                        ends at the step that was best in its trial
"""

from types import SimpleNamespace
from typing import Any

import ml_collections

from vit_jax.config import InputError, parse_arg, recipe
from vit_jax.models import names

# Learning rates to try, for batches of 512 and on a CPU for 32; the optimizer.
OPTIMIZERS = {
    "paper": (
        (1e-3, 3e-3, 1e-2, 3e-2),
        (1e-3, 3e-3),
        {"name": "sgd", "momentum_dtype": "bfloat16"},
    ),
    "adamw": (
        (1e-4, 3e-4, 1e-3, 3e-3),
        (1e-4, 3e-4),
        {"name": "adamw", "weight_decay": 0.05, "layer_decay": 0.75},
    ),
    "resnet": ((1e-4, 3e-4, 1e-3, 3e-3), (1e-4,), {"name": "adamw", "weight_decay": 0.05}),
    "scratch": ((3e-3,), (3e-3,), {"name": "adamw", "weight_decay": 0.05}),
}
# By device: which of the rates, what else. Where no model is named, "cpu_embedded" is for the
# embedded checkpoint, "cpu_scratch" for random weights.
DEVICES = {
    "accelerator": (0, "paper", {"batch_size": 512, "steps": 500}),
    "cpu": (1, "paper", {"batch_size": 32, "steps": 100, "model.dtype": "float32"}),
    "cpu_embedded": (
        1,
        "resnet",
        {"batch_size": 32, "steps": 200, "head": "probe", "model.dtype": "float32"},
    ),
    "cpu_scratch": (
        1,
        "scratch",
        {
            "batch_size": 32,
            "steps": 300,
            "image_size": 96,
            "model.variant": "R26x1",
            "model.stages": (1, 1, 1),
            "model.stem_width": 32,
            "model.dtype": "float32",
        },
    ),
}
TRAINED = {
    "all": ((".*", 1.0),),
    "attention": ((names.ATTENTION_LAYERS, 1.0), (names.HEAD, 1.0), (".*", 0.0)),
    "head": ((names.HEAD, 1.0), (".*", 0.0)),
    "lora": ((names.ADAPTERS, 1.0), (names.HEAD, 1.0), (".*", 0.0)),
}
AUGMENT = {  # RandAugment's magnitude, mixup's alpha
    "none": (None, 0.0),
    "light": (10, 0.2),
    "medium": (15, 0.5),
    "strong": (20, 0.8),
}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """`arg`: [paper|adamw|resnet|scratch][,steps=N][,batch=N][,size=SIDE][,flip=False], as above.

    The device says what isn't given.
    """
    arg = parse_arg(
        arg,
        preset="",
        steps=0,
        batch=0,
        size=None,
        flip=True,
        head="",
        train="all",
        rank=0,
        alpha=0.0,
        augment="none",
        patience=None,
    )
    presets = {"": None, **OPTIMIZERS}
    for name, known in (("preset", presets), ("train", TRAINED), ("augment", AUGMENT)):
        if getattr(arg, name) not in known:
            shown = ", ".join(filter(None, known))
            raise InputError(f"{name}={getattr(arg, name)}: expected one of {shown}")
    adapters = {}
    if arg.train == "lora":
        adapters = {"lora_rank": arg.rank or 8, "lora_alpha": arg.alpha or 16.0}
        arg.preset = arg.preset or "adamw"
    elif arg.rank or arg.alpha:
        raise InputError(f"rank={arg.rank}, alpha={arg.alpha}: only with train=lora")
    magnitude, mixup = AUGMENT[arg.augment]
    preprocess = "random_crop(0.857)" + "|flip" * arg.flip
    if magnitude is not None:
        preprocess += f"|randaugment(2, {magnitude})"
    return recipe(
        defaults={device: by_device(device, arg) for device in DEVICES},
        init="",
        **({"head": arg.head} if arg.head else {}),
        **({} if arg.size is None else {"image_size": arg.size}),
        model=adapters,
        data={"dataset": "", "preprocess": preprocess},
        eval_preprocess="resize",
        augmentation={"mixup": mixup},
        schedule={"decay": "cosine"},
        optimizer={"lr_multipliers": TRAINED[arg.train]},
        workflow={
            "split": {"dev_share": 0.1, "test_share": 0.2},
            "fit_memory": True,
            "export": ("npz", "timm", "hugging_face", "onnx"),
            "probe": True,
        },
        early_stopping=arg.patience,
        log_every=20,
        checkpoint={"every": 100},
    )


def by_device(device: str, arg: SimpleNamespace) -> list[tuple[str, Any]]:
    """(dotted field, value) of what is filled in on a device; see `classifier.recipe`."""
    column, preset, fields = DEVICES[device]
    *rates, optimizer = OPTIMIZERS[arg.preset or preset]
    steps = arg.steps or fields["steps"]
    return [
        *{
            **fields,
            "batch_size": arg.batch or fields["batch_size"],
            "steps": steps,
            "eval_every": max(steps // 10, 1),
            "schedule.warmup": steps // 5,
            "schedule.peak": rates[column][0],
            "workflow.sweep.learning_rates": rates[column],
            **{f"optimizer.{name}": value for name, value in optimizer.items()},
        }.items()
    ]
