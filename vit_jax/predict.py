r"""Labels image files with a checkpoint's own head.

vit_jax predict runs/birds photos/*.jpg
vit_jax predict runs/birds --format=csv --output=labels.csv photos/

MODEL (--model) is a run's workdir or any checkpoint that `convert` reads. A folder means all images
inside. Files that can't be read are skipped and listed at the end. Labels are written while they
are computed. In CSV, names that a spreadsheet would read as formulas are prefixed with '.
"""

import dataclasses

from absl import flags

from vit_jax.classifier.labels import WRITERS, report_unreadable, write_labels
from vit_jax.command_line import run
from vit_jax.config import InputError
from vit_jax.data.listing import find_images
from vit_jax.weights.trained import load

flags.DEFINE_string("model", None, "A run's workdir, or any checkpoint.")
flags.DEFINE_enum("format", "table", list(WRITERS), "How to write labels.")
flags.DEFINE_string("output", None, "File to write to instead of the terminal.")
flags.DEFINE_integer("top", 3, "Labels per image, the most probable first.", lower_bound=1)
flags.DEFINE_float(
    "temperature", None, "Divides the logits; by default the one that was fitted on dev images."
)
flags.DEFINE_integer("batch_size", 32, "Images per batch.", lower_bound=1)
flags.DEFINE_string(
    "preprocess", None, "As in a recipe's data.preprocess; by default as in the model's evaluation."
)


def main(arguments: list[str]) -> None:
    """Labels images, writes the labels, and reports unreadable files."""
    args = flags.FLAGS
    if args.temperature is not None and args.temperature <= 0:
        raise InputError(f"--temperature={args.temperature}: expected a number above 0")
    files = find_images(arguments[1:])
    if not files:
        raise InputError("no images: name files, or folders with images")
    model = load(args.model)
    model = dataclasses.replace(
        model,
        temperature=args.temperature or model.temperature,
        preprocessing=args.preprocess or model.preprocessing,
    )
    options = {"top": args.top, "batch_size": args.batch_size}
    unreadable = write_labels(model, files, args.format, args.output, **options)
    report_unreadable(unreadable, len(files))


if __name__ == "__main__":
    run(main, "model", rest="IMAGE ...")
