r"""Measures a checkpoint on a dataset; prints the result as JSON.

vit_jax evaluate --checkpoint=runs/digits --dataset=digits
vit_jax evaluate --checkpoint=runs/strokes --dataset=digits --protocol=fewshot \
    --l2=1,32,1024
vit_jax evaluate --checkpoint=runs/strokes --dataset=digits --protocol=linear

Protocols: `classification` measures the model's own head. It follows the rules of ImageNet-ReaL for
images with several labels (--dataset=imagenet2012_real) and, with --only_present, of ImageNet-A and
-R. The others measure frozen features: `fewshot` least squares, `knn` nearest neighbours, `linear`
logistic regression. They choose their options on --dev_split, or on a held-out part of
--train_split.
"""

import json

from absl import flags

from vit_jax.command_line import numbers, run
from vit_jax.evaluation.measure import evaluate
from vit_jax.evaluation.registry import list_protocols
from vit_jax.parallel import multihost
from vit_jax.parallel.run_files import as_path, written_locally
from vit_jax.weights.trained import load

flags.DEFINE_string("checkpoint", None, "A run's workdir, or any checkpoint.")
flags.DEFINE_string("dataset", None, "Name, as in a recipe's data.dataset.")
flags.DEFINE_enum("protocol", "classification", list_protocols(), "What is measured.")
flags.DEFINE_string("split", "test", "Split on which accuracy is measured.")
flags.DEFINE_string("train_split", "train", "Split to learn from, unless the head is measured.")
flags.DEFINE_string("dev_split", None, "Split to choose l2 on, or to fit a temperature on.")
flags.DEFINE_string("preprocess", None, "As data.preprocess; by default the model's own.")
flags.DEFINE_string("data_dir", None, "Folder of prepared datasets.")
flags.DEFINE_integer("batch_size", 256, "Images at a time, over all processes.")
flags.DEFINE_enum("loss", "softmax", ["softmax", "sigmoid"], "The loss to report.")
flags.DEFINE_bool("only_present", None, "classification: only the split's own classes count.")
flags.DEFINE_list("shots", None, "fewshot: examples of each class, by default 1,5,10,25.")
flags.DEFINE_integer("seeds", None, "fewshot: draws of the shots to average over, by default 3.")
flags.DEFINE_list("l2", None, "Penalties: 1024 by default (fewshot), 1e-6 to 1e2 (linear).")
flags.DEFINE_list("neighbours", None, "knn: numbers of neighbours, by default 1,10,20.")
flags.DEFINE_bool("random_weights", False, "Measure fresh weights of the same architecture.")
flags.DEFINE_integer("seed", 0, "Of --random_weights, and of linear's held-out part.")
flags.DEFINE_string("output", None, "File for the result, as well as the terminal.")
flags.DEFINE_bool("distributed", False, "Join the other processes of a cluster.")

ALL = ("protocol", "split", "train_split", "dev_split", "preprocess", "data_dir", "batch_size")
OWN = {"only_present": bool, "shots": int, "seeds": int, "l2": float, "neighbours": int}


def main(_) -> None:
    """Prints the result, and writes it to --output."""
    args = flags.FLAGS
    multihost.initialize(args.distributed)
    output = args.output and as_path(args.output)
    given = {name: args[name].value for name in OWN if args[name].value is not None}
    options = {name: numbers(name, v, OWN[name]) for name, v in given.items()}
    if args.protocol == "linear":
        options["seed"] = args.seed
    model = load(args.checkpoint)
    model = model.with_random_weights(args.seed) if args.random_weights else model
    common = {name: args[name].value for name in (*ALL, "loss")}
    found = evaluate(model, args.dataset, **common, **options)
    text = json.dumps(found.values, indent=2)
    if multihost.is_main():
        print(text)
        if output:
            with written_locally(output) as file:
                file.write_text(text + "\n")


if __name__ == "__main__":
    run(main, "checkpoint", "dataset")
