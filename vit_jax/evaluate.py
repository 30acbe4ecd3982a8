r"""Measures a checkpoint on a dataset; prints the result as JSON.

vit_jax evaluate --checkpoint=runs/digits --dataset=digits
vit_jax evaluate --checkpoint=runs/strokes --dataset=digits --protocol=fewshot \
    --l2=1,32,1024

`classification` measures the model's own head; with several labels (ImageNet-ReaL) any counts as
correct. `fewshot` (least squares), `knn` and `linear` (logistic regression) measure frozen
features. They choose their options on --dev_split, or on a held-out part of --train_split.
"""

import json
import os
from contextlib import ExitStack
from functools import partial

from absl import flags

from vit_jax.command_line import numbers, run
from vit_jax.evaluation.measure import evaluate
from vit_jax.evaluation.registry import list_protocols
from vit_jax.parallel import multihost
from vit_jax.parallel.run_files import as_path, locked_output
from vit_jax.weights.trained import load

flags.DEFINE_string("checkpoint", None, "A run's workdir, or any checkpoint.")
flags.DEFINE_string("dataset", None, "Name, as in a recipe's data.dataset.")
flags.DEFINE_enum("protocol", "classification", list_protocols(), "What to measure.")
flags.DEFINE_string("split", "test", "Split to measure accuracy on.")
flags.DEFINE_string("train_split", "train", "Split to learn from; unused by classification.")
flags.DEFINE_string("dev_split", None, "Split to choose l2 on, or to fit a temperature on.")
flags.DEFINE_string("preprocess", None, "As data.preprocess; by default the model's own.")
flags.DEFINE_string("data_dir", None, "Folder of prepared datasets.")
flags.DEFINE_integer("batch_size", 256, "Images per batch, over all processes.")
flags.DEFINE_enum("loss", "softmax", ["softmax", "sigmoid"], "The loss to report.")
flags.DEFINE_bool("only_present", None, "classification: only the split's own classes count.")
flags.DEFINE_list("shots", None, "fewshot: examples of each class, by default 1,5,10,25.")
flags.DEFINE_integer("seeds", None, "fewshot: draws of the shots to average over, by default 3.")
flags.DEFINE_list("l2", None, "Penalties: 1024 by default (fewshot), 1e-6 to 1e2 (linear).")
flags.DEFINE_list("neighbours", None, "knn: numbers of neighbours, by default 1,10,20.")
flags.DEFINE_bool("random_weights", False, "Measure fresh weights of the same architecture.")
flags.DEFINE_integer("seed", 0, "Seed of --random_weights, and of linear's held-out part.")
flags.DEFINE_string("output", None, "File for the result, in addition to the terminal.")
flags.DEFINE_bool("distributed", False, "Join the other processes of a cluster.")
flags.DEFINE_float("join_seconds", multihost.JOIN_SECONDS, "Time for all processes to join.")

COMMON = ("protocol", "split", "train_split", "dev_split", "preprocess", "data_dir", "batch_size")
COMMON += ("loss",)
OWN = {"only_present": bool, "shots": int, "seeds": int, "l2": float, "neighbours": int}


def main(_) -> None:
    """Prints the result, and writes it to --output."""
    args = flags.FLAGS
    multihost.initialize(args.distributed, args.join_seconds)
    options = {name: args[name].value for name in COMMON}
    given = {name: args[name].value for name in OWN if args[name].value is not None}
    options |= {name: numbers(name, value, OWN[name]) for name, value in given.items()}
    options |= {"seed": args.seed} if args.protocol == "linear" else {}
    with ExitStack() as stack:
        lock = partial(locked_output, as_path(args.output or os.devnull))
        write = multihost.on_main(lambda: stack.enter_context(lock()))
        model = load(args.checkpoint)
        model = model.with_random_weights(args.seed) if args.random_weights else model
        text = json.dumps(evaluate(model, args.dataset, **options).values, indent=2)
        if multihost.is_main():
            print(text)
            write(text + "\n")


if __name__ == "__main__":
    run(main, "checkpoint", "dataset")
