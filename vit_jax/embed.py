r"""Writes embeddings of image files: the input of a checkpoint's head.

vit_jax embed ./photos --output=features.parquet
vit_jax embed ./photos more/a.jpg --checkpoint=runs/birds --output=features.npz

The checkpoint is a run's workdir or anything `convert` reads, by default augreg:S/16, which is
downloaded once. A folder means all images inside. Files that can't be read are skipped and listed
at the end. The output's ending selects the format: .parquet (columns file, features, error; pip
install pyarrow), .npz (arrays features [N, D], files, unreadable, errors) or .csv. The output
appears once it is complete.
"""

import dataclasses

from absl import flags

from vit_jax.classifier.embeddings import opened_embeddings
from vit_jax.classifier.labels import report_unreadable
from vit_jax.command_line import run
from vit_jax.config import InputError
from vit_jax.data.listing import find_images
from vit_jax.weights.trained import load

flags.DEFINE_string("checkpoint", "augreg:S/16", "A run's workdir, or any checkpoint.")
flags.DEFINE_alias("model", "checkpoint")  # the name in `predict`
flags.DEFINE_string("output", None, "File to write to: .parquet, .npz or .csv.")
flags.DEFINE_integer("batch_size", 32, "Images per batch.", lower_bound=1)
flags.DEFINE_string(
    "preprocess", None, "As in a recipe's data.preprocess; by default as in the model's evaluation."
)


def main(arguments: list[str]) -> None:
    """Embeds images, writes the embeddings, and reports unreadable files."""
    args = flags.FLAGS
    if not args.output:
        raise InputError("--output is missing: name a file that ends with .parquet, .npz or .csv")
    files = find_images(arguments[1:])
    if not files:
        raise InputError("no images: name files, or folders with images")
    with opened_embeddings(args.output) as write:
        model = load(args.checkpoint)
        preprocessing = args.preprocess or model.preprocessing
        model = dataclasses.replace(model, preprocessing=preprocessing)
        unreadable = write(model, files, args.batch_size)
        report_unreadable(unreadable, len(files))
    print(f"{len(files) - len(unreadable)} embeddings in {args.output}")


if __name__ == "__main__":
    run(main, rest="IMAGE ...")
