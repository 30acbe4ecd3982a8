r"""From a folder of images to a classifier: one command, an afternoon at most.

python -m vit_jax.transfer --config=configs/transfer/folder.py --config.data=/my/images \
    --config.init=augreg:S/16 --workdir=runs/mine

`data` is a folder `class/name.jpg` or `train/class/name.jpg`, a table (.csv, .jsonl) of images, or
any other dataset's name. The paper's fine-tuning (arXiv 2010.11929, Table 4 and appendix B.1.1)
with its steps for small datasets: SGD with momentum 0.9, batch 512, cosine decay, gradients clipped
at 1, a zero-initialised head, the learning rate chosen on the dev split, the final run on train and
dev. The model and its image size are the checkpoint's; `size=384` is the paper's. What is expected
depends on the images: the report has an interval.

What small data wants in practice, our own choice of published means:

    adamw               AdamW, and a learning rate that falls by 0.75 from block to block downwards
    head=probe          a head that was fitted to the frozen features first (arXiv 2202.10054)
    train=attention     all but attention and head frozen (arXiv 2203.09795); train=head: all but it
    augment=light       RandAugment(2, 10) and mixup 0.2; medium: (2, 15) and 0.5; strong: (2, 20)
                        and 0.8, as AugReg's levels (arXiv 2106.10270)
    patience=3          trials end after 3 evaluations without a better one on dev; the final run
                        ends at the step that was best there
"""

import ml_collections

from vit_jax.config import parse_arg, recipe

OPTIMIZERS = {
    "paper": ((1e-3, 3e-3, 1e-2, 3e-2), {"name": "sgd", "momentum_dtype": "bfloat16"}),
    "adamw": ((1e-4, 3e-4, 1e-3, 3e-3), {"weight_decay": 0.05, "layer_decay": 0.75}),
}
TRAINED = {
    "all": ((".*", 1.0),),
    "attention": ((".*MultiHeadDotProductAttention.*", 1.0), ("head/.*", 1.0), (".*", 0.0)),
    "head": (("head/.*", 1.0), (".*", 0.0)),
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
