r"""From a folder of images to a classifier: one command, an afternoon at most.

python -m vit_jax.transfer --config=configs/transfer/folder.py --config.data=/my/images \
    --config.init=augreg:S/16 --workdir=runs/mine

`data` is a folder `class/name.jpg` or `train/class/name.jpg`, a table (.csv, .jsonl) of images, or
any other dataset's name. The paper's fine-tuning (arXiv 2010.11929, Table 4 and appendix B.1.1)
with its steps for small datasets: SGD with momentum 0.9, batch 512, cosine decay, gradients clipped
at 1, a zero-initialised head, the learning rate chosen on the dev split, the final run on train and
dev. The model and its image size are the checkpoint's; `size=384` is the paper's. What is expected
depends on the images: the report has an interval.

`preset=adamw` is what smaller batches and fewer images want in practice.
"""

import ml_collections

from vit_jax.config import parse_arg, recipe

PRESETS = {
    "paper": {
        "learning_rates": (1e-3, 3e-3, 1e-2, 3e-2),
        "optimizer": {"name": "sgd", "momentum_dtype": "bfloat16"},
    },
    "adamw": {
        "learning_rates": (1e-4, 3e-4, 1e-3, 3e-3),
        "optimizer": {"name": "adamw", "weight_decay": 0.05},
    },
}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """`arg`: [preset][,steps=500][,batch=512][,size=SIDE][,flip=False]."""
    arg = parse_arg(arg, preset="paper", steps=500, batch=512, size=None, flip=True)
    if arg.preset not in PRESETS:
        raise ValueError(f"preset={arg.preset}: expected one of {', '.join(PRESETS)}")
    preset = PRESETS[arg.preset]
    return recipe(
        init="",
        **({} if arg.size is None else {"image_size": arg.size}),
        data={
            "dataset": "",
            "preprocess": "random_crop(0.857)" + "|flip" * arg.flip,
        },
        eval_preprocess="resize",
        batch_size=arg.batch,
        steps=arg.steps,
        schedule={
            "peak": preset["learning_rates"][0],
            "warmup": arg.steps // 5,
            "decay": "cosine",
        },
        optimizer=preset["optimizer"],
        sweep={"learning_rates": preset["learning_rates"]},
        split={"dev_share": 0.1, "test_share": 0.2},
        fit_memory=True,
        export=("npz", "timm", "hugging_face", "onnx"),
        log_every=20,
        eval_every=max(arg.steps // 5, 1),
        checkpoint={"every": 100},
    )
