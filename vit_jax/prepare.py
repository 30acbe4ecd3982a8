"""Writes images as an ArrayRecord dataset, which training reads fast.

vit_jax prepare --input=PATH --output=DATA_DIR --name=my_set

`--input` is an image folder (class/name.jpg, or train/class/name.jpg), a table (.csv, .tsv or
.jsonl with path, label and optionally split), a folder of IDX files (MNIST, Fashion-MNIST), of
WebDataset tars or of ImageNet's original tars, or the name of a dataset that TFDS downloads and
builds (pip install tensorflow-cpu apache-beam mlcroissant). A killed run resumes when started
again.

vit_jax prepare --verify=DATA_DIR/my_set/1.0.0
"""

import sys
from pathlib import Path

from absl import flags

from vit_jax.command_line import run
from vit_jax.config import InputError
from vit_jax.data.manifest import verify
from vit_jax.data.preparation import prepare
from vit_jax.data.walk import check_mounted

flags.DEFINE_string("input", None, "A path, or the name of a TFDS dataset.")
flags.DEFINE_string("output", None, "Folder of prepared datasets (data_dir in recipes).")
flags.DEFINE_string("name", None, "The dataset's name, by default the input's own.")
flags.DEFINE_string("version", None, "The version, by default 1.0.0 or TFDS's own.")
flags.DEFINE_integer("shards", None, "Files per split, by default one per 128 MiB.")
flags.DEFINE_bool("shuffle", True, "Write in the order of a hash of the files' names.")
flags.DEFINE_integer("max_broken", 0, "Number of broken images that may be left out.")
flags.DEFINE_integer("max_overlap", 0, "Number of images that may be in two splits.")
flags.DEFINE_bool("restart_markers", False, "Let crops skip most of a JPEG (needs jpegtran).")
flags.DEFINE_integer("threads", None, "Threads that check images, by default one per core.")
flags.DEFINE_string("verify", None, "Only check this prepared dataset against its manifest.")


OPTIONS = ("name", "version", "shards", "shuffle", "max_broken", "max_overlap")
OPTIONS += ("restart_markers", "threads")


def main(_) -> None:
    """Prepares --input, or verifies --verify, and prints the result."""
    args = flags.FLAGS
    if args.verify:
        check_mounted(args.verify)
        problems = []
        for problem in verify(Path(args.verify)):
            print(problem, flush=True)  # immediately, since terabytes take long
            problems.append(problem)
        if problems:
            sys.exit(f"error: {len(problems)} of its files are not as they were written")
        print(f"{args.verify}: every file is as it was written")
    elif not args.input or not args.output:
        raise InputError("say what to read with --input and where to write with --output")
    else:
        options = {name: args[name].value for name in OPTIONS}
        print(prepare(args.input, args.output, **options))


if __name__ == "__main__":
    run(main, "input", "output", required=False)
