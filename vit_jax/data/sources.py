"""Opens datasets by name, as random-access sources of examples. TensorFlow is never imported."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vit_jax.config import InputError
from vit_jax.data.array_records import ArrayRecords, open_array_records
from vit_jax.data.formula import Fractals, Strokes, Synthetic
from vit_jax.data.idx import find_idx, read_idx
from vit_jax.data.image_folder import read_folder
from vit_jax.data.listing import Listing
from vit_jax.data.slices import Slice, parse_split, read_split, record_name
from vit_jax.data.tables import TABLES, read_table
from vit_jax.data.tars import find_tars, read_tars
from vit_jax.data.textures import Textures
from vit_jax.data.tfds_metadata import METADATA
from vit_jax.data.vtab import PREFIX, open_vtab
from vit_jax.data.walk import check_mounted
from vit_jax.parallel.run_files import as_path

VALIDATION_FIRST = 1 << 60  # index of the first validation example, beyond any train split
# Splits of the datasets that are drawn: nominal size, index of the first example.
_DRAWN = {"train": (1_000_000, 0), "validation": (10_000, VALIDATION_FIRST)}
# As large as ImageNet-21k, so that the warm-up of any recipe fits.
_STAND_IN = {
    "train": (14_197_122, 0),
    "full": (14_197_122, 0),
    "validation": (50_000, VALIDATION_FIRST),
    "test": (100_000, 2 * VALIDATION_FIRST),
}
FORMULAS = {
    "strokes": (Strokes, _DRAWN),
    "fractals": (Fractals, _DRAWN),
    "textures": (Textures, _DRAWN),
    "synthetic": (Synthetic, _STAND_IN),
}


@dataclass(frozen=True)
class Source:
    """Random-access examples.

    Attributes:
      records: records[i] holds "image" (encoded bytes, or uint8 [H, W], [H, W, 1] or [H, W, 3])
        and "label" (an int, or a sequence of them for a multi-label set). It raises ValueError for
        a record that cannot be read. It may have `name(i)`, which returns the file of record i.
      num_classes: labels are in [0, num_classes).
      class_names: a name for each class, if they are known.
      labels_per_example: None for one label; for a multi-label set the most an example may have.
    """

    records: Sequence[Mapping[str, Any]]
    num_classes: int
    class_names: tuple[str, ...] | None = None
    labels_per_example: int | None = None

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        record = self.records[index]
        return {"image": record["image"], "label": record["label"]}

    def class_counts(self) -> np.ndarray:
        """Counts the examples with each label, int [C]; reads every example."""
        labels = [np.atleast_1d(self[i]["label"]) for i in range(len(self))]
        return np.bincount(np.concatenate(labels).astype(int), minlength=self.num_classes)

    def describe(self, index: int) -> str:
        """Describes an example for messages: `example 3 (cat/a.jpg)`."""
        name = record_name(self.records, index)
        return f"example {index} ({name})" if name else f"example {index}"

    def name(self, index: int) -> str:
        """Returns an example's file, or its index if it has none."""
        return record_name(self.records, index) or str(index)


def open_source(name: str, split: str, data_dir: str | None = None) -> Source:
    """Opens a dataset's split.

    Args:
      name: one of
        - `digits`: scikit-learn's 8 x 8 digits; every third example is test;
        - `strokes/200`, `fractals/1000`, `textures/100`: formula-driven, with the number of classes
          after the slash, 1000 by default. `train` is 1,000,000 examples, but larger slices such as
          `train[:5_000_000_000]` work too;
        - `synthetic/1000`: the same for rehearsals, images of 256 px in the splits of ImageNet and
          ImageNet-21k;
        - `vtab/clevr_count` and other tasks of VTAB-1k, see `vtab`;
        - `cifar10`, `cifar10:3.0.2`, `my_set/config`: prepared by TFDS in ArrayRecord format;
        - a path (see `is_path`) of such a dataset's folder, or of what `open_path` reads.
      split: as in TFDS: `train`, `train[:99%]`, `train[51200:]`, `train[:10]+test[-10%:]`.
      data_dir: folder of prepared TFDS datasets; by default TFDS's own default.

    Raises:
      ValueError: an unknown dataset or split, a malformed or empty slice, features other than those
        of image classification, or a truncated shard.
      FileNotFoundError: a TFDS dataset that is not prepared, not in ArrayRecord format, or lacks a
        shard; or nothing is at the path.
    """
    if name.partition("/")[0] in FORMULAS:
        return _open_formula(name, split)
    listing = open_listing(name, data_dir)
    sizes = {s: len(records) for s, records in listing.splits.items()}
    parts = parse_split(split, sizes, name)
    for records in {s: listing.splits[s] for s, _, _ in parts}.values():
        if isinstance(records, ArrayRecords):
            records.check()
    records = read_split(split, sizes, name, lambda s, a, b: Slice(listing.splits[s], a, b))
    return Source(records, listing.num_classes, listing.class_names, listing.labels_per_example)


def open_listing(name: str, data_dir: str | None = None) -> Listing:
    """Opens all splits of a dataset that isn't formula-driven; raises as `open_source`."""
    if name == "digits":
        return _digits()
    if (data_dir or "").startswith("gs://"):
        as_path(data_dir)  # its package is installed
    else:
        check_mounted(data_dir or "")
    if name.startswith(PREFIX):
        return open_vtab(name, data_dir)
    if is_path(name) and not (as_path(name).expanduser() / METADATA).exists():
        return open_path(name)
    return open_array_records(name, data_dir, ("digits", *FORMULAS))


def is_path(name: str) -> bool:
    """Whether a dataset's name is a path: it begins with `/`, `.`, `~` or `gs://`, or exists.

    Names of embedded and of TFDS datasets are never paths: `digits`, `strokes`, and `cifar10` even
    if the working directory holds the prepared dataset `cifar10/3.0.2/`.
    """
    if name.startswith(("/", ".", "~")) or "://" in name:
        return True
    if name == "digits" or name.partition("/")[0] in FORMULAS or not Path(name).exists():
        return False
    return not any(Path(name).glob(f"*/{METADATA}"))


def open_path(path: str) -> Listing:
    """Lists the dataset at a path: a folder of images, a table of them, IDX files or tars.

    Raises:
      FileNotFoundError: nothing is there, or no images.
      ValueError: the dataset is inconsistent: see `image_folder.read_folder`,
        `tables.read_table`, `idx.read_idx` and `tars.read_tars`.
    """
    found = as_path(path).expanduser()
    if found.is_dir():
        check_mounted(path)
        if idx := find_idx(found):
            return read_idx(idx)
        if tars := find_tars(found):
            return read_tars(tars)
        return read_folder(found)
    if not found.exists():
        raise FileNotFoundError(f"there is no {path}")
    if found.suffix.lower() in TABLES:
        return read_table(found)
    if found.suffix.lower() == ".tar":
        return read_tars([found])
    raise InputError(
        f"{path} is a file: expected a folder, a table ({', '.join(TABLES)}) or a .tar"
    )


def _digits() -> Listing:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    splits = {"train": [], "test": []}
    for i, (image, label) in enumerate(zip(images, digits.target, strict=True)):
        splits["test" if i % 3 == 2 else "train"].append({"image": image, "label": int(label)})
    return Listing("digits", splits, 10, tuple("0123456789"))


def _open_formula(name: str, split: str) -> Source:
    match = re.fullmatch(r"(\w+)(?:/([1-9][0-9]*))?", name)
    if not match:
        raise InputError(f"dataset {name!r}: expected the number of classes after the slash")
    (formula, splits), num_classes = FORMULAS[match[1]], int(match[2] or 1000)

    def read(part: str, start: int, stop: int) -> Sequence:
        if stop > VALIDATION_FIRST:
            raise InputError(f"split {split!r} of {name}: expected to end by {VALIDATION_FIRST}")
        return formula(stop - start, num_classes=num_classes, first=splits[part][1] + start)

    sizes = {part: size for part, (size, _) in splits.items()}
    records = read_split(split, sizes, name, read, unbounded=["train", "full"])
    return Source(records, num_classes)
