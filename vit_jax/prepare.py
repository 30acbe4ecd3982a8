"""Writes images as a dataset that training reads quickly and exactly.

vit_jax prepare --input=PATH --output=DATA_DIR --name=my_set

`--input` is an image folder (class/name.jpg, or train/class/name.jpg), a table (.csv, .tsv or
.jsonl with path, label and perhaps split), a folder of IDX files (MNIST, Fashion-MNIST), of
WebDataset tars or of ImageNet's original tars, or the name of a dataset that TFDS downloads and
builds (pip install tensorflow-cpu apache-beam mlcroissant). A run that was killed goes on when it
is started again.

vit_jax prepare --verify=DATA_DIR/my_set/1.0.0
"""

import re
import sys
from pathlib import Path

from absl import flags

from vit_jax.command_line import run
from vit_jax.config import InputError
from vit_jax.data.array_records import build_with_tfds
from vit_jax.data.manifest import MANIFEST, read_manifest, verify
from vit_jax.data.sources import is_path, open_path
from vit_jax.data.tfds_metadata import METADATA
from vit_jax.data.writer import WriteConfig, write_dataset

flags.DEFINE_string("input", None, "A path, or the name of a TFDS dataset.")
flags.DEFINE_string("output", None, "Where TFDS datasets are kept (data_dir in recipes).")
flags.DEFINE_string("name", None, "The dataset's name, by default the input's own.")
flags.DEFINE_string("version", None, "By default 1.0.0, or TFDS's own of a dataset it knows.")
flags.DEFINE_integer("shards", None, "Files a split, by default one for each 128 MiB.")
flags.DEFINE_bool("shuffle", True, "Write in the order of a hash of the files' names.")
flags.DEFINE_integer("max_broken", 0, "Leave out up to so many broken images.")
flags.DEFINE_integer("max_overlap", 0, "Keep up to so many images that are in two splits.")
flags.DEFINE_bool(
    "restart_markers", False, "Let training crops skip most of a JPEG (lossless; needs jpegtran)."
)
flags.DEFINE_integer("threads", None, "Threads that check images, by default one a core.")
flags.DEFINE_string("verify", None, "Only check this prepared dataset against its manifest.")


def main(_) -> None:
    args = flags.FLAGS
    if args.verify:
        _verify(Path(args.verify))
    elif not args.input or not args.output:
        raise InputError("say what to read with --input and where to write with --output")
    elif "://" in args.output:
        raise InputError(f"--output={args.output}: write to a disk and copy the folder then")
    elif is_path(args.input):
        _write(Path(args.input).expanduser().resolve(), Path(args.output).expanduser())
    else:
        print(build_with_tfds(args.input, args.output))


def _write(source: Path, output: Path) -> None:
    args = flags.FLAGS
    stem = source.stem if source.is_file() else source.name
    name = args.name or re.sub(r"[^a-z0-9]+", "_", stem.lower())
    if (source / METADATA).exists():
        raise InputError(
            f"{source} is a dataset of TFDS already. If it isn't in ArrayRecord format: tfds "
            f"convert_format --dataset_version_dir={source} --out_file_format=array_record"
        )
    listing = open_path(str(source))
    splits = ", ".join(f"{len(records)} in {split}" for split, records in listing.splits.items())
    print(f"{source}: {listing.kind}, {listing.num_classes} classes, {splits}", file=sys.stderr)
    config = WriteConfig(
        shards=args.shards,
        shuffle=args.shuffle,
        max_broken=args.max_broken,
        max_overlap=args.max_overlap,
        restart_markers=args.restart_markers,
        threads=args.threads,
    )
    folder = write_dataset(listing, output, name, args.version, config)
    broken = read_manifest(folder)["broken"]
    print(
        f"{folder} is written"
        + (f"; {len(broken)} broken images are left out (see {MANIFEST})" if broken else "")
        + f". Train on it with\n  --config.data.dataset={name} --config.data.data_dir={output}"
    )


def _verify(folder: Path) -> None:
    problems = 0
    for problem in verify(folder):
        print(problem)
        problems += 1
    if problems:
        sys.exit(f"error: {problems} of its files are not as they were written")
    print(f"{folder}: every file is as it was written")


if __name__ == "__main__":
    run(main, "input", "output", required=False)
