r"""Trains a classifier on a folder of images.

vit_jax transfer --config=transfer/folder --config.data=/my/images \
    --config.init=augreg:S/16 --workdir=runs/mine

`data` is a folder `class/name.jpg` or `train/class/name.jpg`, a table (.csv, .jsonl) of images, or
the name of another dataset. Fine-tunes as in arXiv 2010.11929 (Table 4 and appendix B.1.1): SGD
with momentum 0.9, batch 512, cosine decay, gradient clipping at 1, a zero-initialised head. The
learning rate is chosen on the dev split, and the final run trains on train and dev. Model and image
size are the checkpoint's; `size=384` is the paper's. The accuracy depends on the images; the report
gives a confidence interval.

Options for small datasets, from other papers:

    adamw               AdamW, with the learning rate multiplied by 0.75 per block towards the input
    head=probe          starts with a head fitted to frozen features (arXiv 2202.10054)
    train=attention     trains only attention and head (arXiv 2203.09795); train=head: only the head
    augment=light       RandAugment(2, 10) and mixup 0.2; medium: (2, 15) and 0.5; strong: (2, 20)
                        and 0.8; levels of AugReg (arXiv 2106.10270)
    patience=3          ends trials after 3 evaluations without improvement on dev; the final run
                        ends at the step that was best in its trial
"""

import ml_collections

from vit_jax.config import parse_arg, recipe
from vit_jax.models import names

OPTIMIZERS = {
    "paper": ((1e-3, 3e-3, 1e-2, 3e-2), {"name": "sgd", "momentum_dtype": "bfloat16"}),
    "adamw": ((1e-4, 3e-4, 1e-3, 3e-3), {"weight_decay": 0.05, "layer_decay": 0.75}),
}
TRAINED = {
    "all": ((".*", 1.0),),
    "attention": ((names.ATTENTION_LAYERS, 1.0), (names.HEAD, 1.0), (".*", 0.0)),
    "head": ((names.HEAD, 1.0), (".*", 0.0)),
}
AUGMENT = {  # RandAugment's magnitude, mixup's alpha
    "none": (None, 0.0),
    "light": (10, 0.2),
    "medium": (15, 0.5),
    "strong": (20, 0.8),
}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """`arg`: [paper|adamw][,steps=500][,batch=512][,size=SIDE][,flip=False] and those above."""
    arg = parse_arg(
        arg,
        preset="paper",
        steps=500,
        batch=512,
        size=None,
        flip=True,
        head="zero",
        train="all",
        augment="none",
        patience=None,
    )
    for name, known in (("preset", OPTIMIZERS), ("train", TRAINED), ("augment", AUGMENT)):
        if getattr(arg, name) not in known:
            raise ValueError(f"{name}={getattr(arg, name)}: expected one of {', '.join(known)}")
    learning_rates, optimizer = OPTIMIZERS[arg.preset]
    magnitude, mixup = AUGMENT[arg.augment]
    preprocess = "random_crop(0.857)" + "|flip" * arg.flip
    if magnitude is not None:
        preprocess += f"|randaugment(2, {magnitude})"
    return recipe(
        init="",
        head=arg.head,
        **({} if arg.size is None else {"image_size": arg.size}),
        data={"dataset": "", "preprocess": preprocess},
        eval_preprocess="resize",
        augmentation={"mixup": mixup},
        batch_size=arg.batch,
        steps=arg.steps,
        schedule={"peak": learning_rates[0], "warmup": arg.steps // 5, "decay": "cosine"},
        optimizer={**optimizer, "lr_multipliers": TRAINED[arg.train]},
        workflow={
            "split": {"dev_share": 0.1, "test_share": 0.2},
            "sweep": {"learning_rates": learning_rates},
            "fit_memory": True,
            "export": ("npz", "timm", "hugging_face", "onnx"),
        },
        early_stopping=arg.patience,
        log_every=20,
        eval_every=max(arg.steps // 10, 1),
        checkpoint={"every": 100},
    )
