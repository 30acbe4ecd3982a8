"""Name -> random-access source of examples. TensorFlow is never imported."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vit_jax.config import InputError
from vit_jax.data.array_records import ArrayRecords, open_array_records
from vit_jax.data.formula import Fractals, Strokes
from vit_jax.data.idx import find_idx, read_idx
from vit_jax.data.image_folder import read_folder
from vit_jax.data.listing import Listing
from vit_jax.data.slices import Slice, parse_split, read_split, record_name
from vit_jax.data.tables import TABLES, read_table
from vit_jax.data.tars import find_tars, read_tars
from vit_jax.data.tfds_metadata import METADATA
from vit_jax.data.vtab import PREFIX, open_vtab
from vit_jax.parallel.run_files import as_path

FORMULAS = {"strokes": Strokes, "fractals": Fractals}
FORMULA_SIZES = {"train": 1_000_000, "validation": 10_000}
VALIDATION_FIRST = 1 << 60  # index of the first validation example: out of any train split's reach


@dataclass(frozen=True)
class Source:
    """Random-access examples.

    Attributes:
      records: records[i] holds "image" (encoded bytes, or uint8 [H, W], [H, W, 1] or [H, W, 3])
        and "label" (an int, or a sequence of them for a multi-label set). It raises ValueError for
        a record that cannot be read, and may have `name(i)`: i's file.
      num_classes: labels are in [0, num_classes).
      class_names: a name for each class, where they are known.
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
        """The number of examples with each label, int [C]; reads every example."""
        labels = [np.atleast_1d(self[i]["label"]) for i in range(len(self))]
        return np.bincount(np.concatenate(labels).astype(int), minlength=self.num_classes)

    def describe(self, index: int) -> str:
        """What messages call an example: `example 3 (cat/a.jpg)`."""
        name = record_name(self.records, index)
        return f"example {index} ({name})" if name else f"example {index}"

    def name(self, index: int) -> str:
        """An example's file, or its number where it has none."""
        return record_name(self.records, index) or str(index)


def open_source(name: str, split: str, data_dir: str | None = None) -> Source:
    """Opens a dataset's split.

    Args:
      name: `digits` (scikit-learn's 8 x 8 digits; every third example is test), `strokes/200` or
        `fractals/1000` (formula-driven, the number of classes after the slash, 1000 by default;
        `train` is 1,000,000 examples, but `train[:5_000_000_000]` works too), a dataset that
        TFDS prepared in ArrayRecord format (`cifar10`, `cifar10:3.0.2`, `my_set/config`), or a
        path, see `is_path`: a folder of such a dataset's files, or what `open_path` reads.
      split: as in TFDS: `train`, `train[:99%]`, `train[51200:]`, `train[:10]+test[-10%:]`.
      data_dir: TFDS's folder of prepared datasets; by default TFDS's own default.

    Raises:
      ValueError: an unknown dataset or split, a malformed or empty slice, or features that are not
        those of image classification; a shard that is truncated.
      FileNotFoundError: a TFDS dataset that is not prepared, or not as ArrayRecord, or lacks a
        shard; nothing is at the path.
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
    """All splits of a dataset that isn't drawn by formula; raises as `open_source`."""
    if name == "digits":
        return _digits()
    check_mounted(data_dir or "")
    if name.startswith(PREFIX):
        return open_vtab(name, data_dir)
    if is_path(name) and not (as_path(name).expanduser() / METADATA).exists():
        return open_path(name)
    check_mounted(name)
    return open_array_records(name, data_dir, ("digits", *FORMULAS))


def is_path(name: str) -> bool:
    """Whether a dataset's name is a path: it begins with `/`, `.`, `~` or `gs://`, or is there.

    What we or TFDS call by name stays a name: `digits`, `strokes`, and beside the working directory
    the folder of a prepared dataset, `cifar10/3.0.2/`.
    """
    if name.startswith(("/", ".", "~")) or "://" in name:
        return True
    if name == "digits" or name.partition("/")[0] in FORMULAS or not Path(name).exists():
        return False
    return not any(Path(name).glob(f"*/{METADATA}"))


def check_mounted(folder: str) -> None:
    """ValueError for a folder in a bucket, whose files a disk's readers can't read."""
    if "://" in folder:
        bucket, _, below = folder.partition("://")[2].partition("/")
        raise InputError(
            f"{folder}: images and prepared datasets are read from a folder: mount the bucket, "
            f"mkdir /mnt/{bucket} && gcsfuse --implicit-dirs -o ro {bucket} /mnt/{bucket}, and "
            f"name /mnt/{bucket}/{below}"
        )


def open_path(path: str) -> Listing:
    """Lists what lies at a path: images in a folder, a table of them, IDX files or tars.

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
    formula, num_classes = FORMULAS[match[1]], int(match[2] or 1000)
    first = {"train": 0, "validation": VALIDATION_FIRST}

    def read(part: str, start: int, stop: int) -> Sequence:
        if stop > VALIDATION_FIRST:
            raise InputError(f"split {split!r} of {name}: expected to end by {VALIDATION_FIRST}")
        return formula(stop - start, num_classes=num_classes, first=first[part] + start)

    records = read_split(split, FORMULA_SIZES, name, read, unbounded=["train"])
    return Source(records, num_classes)
