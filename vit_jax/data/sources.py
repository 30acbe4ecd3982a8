"""Name -> random-access source of examples. TensorFlow is never imported."""

import re
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from vit_jax.config import unknown
from vit_jax.data.files import Listing, read_folder
from vit_jax.data.formula import Fractals, Strokes
from vit_jax.data.idx import find_idx, read_idx
from vit_jax.data.tables import TABLES, read_table
from vit_jax.data.tars import find_tars, read_tars

FORMULAS = {"strokes": Strokes, "fractals": Fractals}
FORMULA_SIZES = {"train": 1_000_000, "validation": 10_000}
VALIDATION_FIRST = 1 << 60  # index of the first validation example: out of any train split's reach
LABEL_FEATURES = ("label", "labels", "real_label")  # the last is imagenet2012_real's
MAX_LABELS = 32  # of one example of a multi-label set


@dataclass(frozen=True)
class Source:
    """Random-access examples.

    Attributes:
      records: records[i] holds "image" (encoded bytes, or uint8 [H, W], [H, W, 1] or [H, W, 3])
        and `label_feature` (an int, or a sequence of them for a multi-label set). It raises
        ValueError for a record that cannot be read, and may have `name(i)`: i's file.
      num_classes: labels are in [0, num_classes).
      class_names: a name for each class, where they are known.
      labels_per_example: None for one label; for a multi-label set the most an example may have.
      label_feature: the records' name for the label.
    """

    records: Sequence[Mapping[str, Any]]
    num_classes: int
    class_names: tuple[str, ...] | None = None
    labels_per_example: int | None = None
    label_feature: str = "label"

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        record = self.records[index]
        return {"image": record["image"], "label": record[self.label_feature]}

    def describe(self, index: int) -> str:
        """What messages call an example: `example 3 (cat/a.jpg)`."""
        name = _name(self.records, index)
        return f"example {index} ({name})" if name else f"example {index}"


def _name(records: Sequence, index: int) -> str | None:
    return records.name(index) if hasattr(records, "name") else None


def open_source(name: str, split: str, data_dir: str | None = None) -> Source:
    """Opens a dataset's split.

    Args:
      name: `digits` (scikit-learn's 8 x 8 digits; every third example is test), `strokes/200` or
        `fractals/1000` (formula-driven, the number of classes after the slash, 1000 by default;
        `train` is 1,000,000 examples, but `train[:5_000_000_000]` works too), a dataset that
        TFDS prepared in ArrayRecord format (`cifar10`, `cifar10:3.0.2`, `my_set/config`), or a
        path, which begins with `/`, `.` or `~`: see `open_path`.
      split: as in TFDS: `train`, `train[:99%]`, `train[51200:]`, `train[:10]+test[-10%:]`.
      data_dir: TFDS's folder of prepared datasets; by default TFDS's own default.

    Raises:
      ValueError: an unknown dataset or split, a malformed or empty slice, or features that are not
        those of image classification.
      FileNotFoundError: a TFDS dataset that is not prepared, or not as ArrayRecord.
    """
    if name == "digits":
        return _open_digits(split)
    if name.partition("/")[0] in FORMULAS:
        return _open_formula(name, split)
    if is_path(name):
        listing = open_path(name)
        sizes = {s: len(records) for s, records in listing.splits.items()}
        records = _read_split(split, sizes, name, lambda s, a, b: _Part(listing.splits[s], a, b))
        return Source(records, listing.num_classes, listing.class_names, listing.labels_per_example)
    return _open_tfds(name, split, data_dir)


def is_path(name: str) -> bool:
    """Whether a dataset's name is a path: it begins with `/`, `.` or `~`."""
    return name.startswith(("/", ".", "~"))


def open_path(path: str) -> Listing:
    """Lists what lies at a path: images in a folder, a table of them, IDX files or tars.

    Raises:
      FileNotFoundError: nothing is there, or no images.
      ValueError: what is there isn't consistent: see `files.read_folder`, `tables.read_table`,
        `idx.read_idx` and `tars.read_tars`.
    """
    found = Path(path).expanduser()
    if found.is_dir():
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
    raise ValueError(
        f"{path} is a file: expected a folder, a table ({', '.join(TABLES)}) or a .tar"
    )


def parse_split(
    split: str, sizes: Mapping[str, int], dataset: str, unbounded: Sequence[str] = ()
) -> list[tuple[str, int, int]]:
    """Reads TFDS's split grammar: `train[:10%]+test[5:1_000]`.

    Args:
      split: split names, each with an optional [start:stop] of whole numbers or percentages;
        negative ones count from the end.
      sizes: the number of examples of each split.
      dataset: its name, for error messages.
      unbounded: splits in which `stop` may exceed the size.

    Returns:
      (split name, start, stop) for each part.

    Raises:
      ValueError: a malformed, empty or too long slice, or an unknown split.
    """
    parts = []
    for part in split.split("+"):
        bound = r"(-?\d[\d_]*%?)?"
        match = re.fullmatch(rf"\s*([\w-]+)(?:\[{bound}:{bound}\])?\s*", part)
        if not match:
            raise ValueError(
                f"cannot read {part!r} in split {split!r}: expected NAME or NAME[START:STOP] with "
                "whole numbers or percentages, such as train[:99%], joined by +"
            )
        name = match[1]
        if name not in sizes:
            raise unknown(f"split of {dataset}", name, sizes)
        size = sizes[name]
        start = _boundary(match[2], size, default=0)
        stop = _boundary(match[3], size, default=size)
        if not 0 <= start < stop or (stop > size and name not in unbounded):
            raise ValueError(
                f"split {part!r} of {dataset} means examples {start} to {stop}: "
                f"expected a range that is not empty, within {name}'s {size} examples"
            )
        parts.append((name, start, stop))
    return parts


def _boundary(text: str | None, size: int, default: int) -> int:
    if not text:
        return default
    number = int(text.rstrip("%"))
    if text.endswith("%"):
        number = round(number * size / 100)  # as TFDS rounds
    return number + size if text.startswith("-") else number


@dataclass(frozen=True)
class _Concatenated(Sequence):
    parts: tuple[Sequence, ...]
    starts: tuple[int, ...]  # of the parts, and the end

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index):
        part, index = self._locate(index)
        return part[index]

    def name(self, index):
        return _name(*self._locate(index))

    def _locate(self, index):
        part = bisect_right(self.starts, index) - 1
        return self.parts[part], index - self.starts[part]


@dataclass(frozen=True)
class _Part(Sequence):
    """records[start:stop], lazily."""

    records: Sequence
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, index):
        return self.records[self.start + index]

    def name(self, index):
        return _name(self.records, self.start + index)


def _read_split(
    split: str,
    sizes: Mapping[str, int],
    dataset: str,
    read: Callable[[str, int, int], Sequence],
    unbounded: Sequence[str] = (),
) -> Sequence:
    """The records of a split, given how to read one slice."""
    parts = tuple(read(*part) for part in parse_split(split, sizes, dataset, unbounded))
    if len(parts) == 1:
        return parts[0]
    return _Concatenated(parts, tuple(accumulate(map(len, parts), initial=0)))


def _open_digits(split: str) -> Source:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    splits = {"train": [], "test": []}
    for i, (image, label) in enumerate(zip(images, digits.target, strict=True)):
        splits["test" if i % 3 == 2 else "train"].append({"image": image, "label": int(label)})
    sizes = {name: len(records) for name, records in splits.items()}
    records = _read_split(split, sizes, "digits", lambda name, a, b: splits[name][a:b])
    return Source(records, 10, tuple("0123456789"))


def _open_formula(name: str, split: str) -> Source:
    match = re.fullmatch(r"(\w+)(?:/([1-9][0-9]*))?", name)
    if not match:
        raise ValueError(f"dataset {name!r}: expected the number of classes after the slash")
    formula, num_classes = FORMULAS[match[1]], int(match[2] or 1000)
    first = {"train": 0, "validation": VALIDATION_FIRST}

    def read(part: str, start: int, stop: int) -> Sequence:
        if stop > VALIDATION_FIRST:
            raise ValueError(f"split {split!r} of {name}: expected to end by {VALIDATION_FIRST}")
        return formula(stop - start, num_classes=num_classes, first=first[part] + start)

    records = _read_split(split, FORMULA_SIZES, name, read, unbounded=["train"])
    return Source(records, num_classes)


def _open_tfds(name: str, split: str, data_dir: str | None) -> Source:
    import tensorflow_datasets as tfds  # half a second, which the embedded sets need not wait for

    builder = _tfds_builder(name, data_dir)
    features = builder.info.features
    label_feature = next((f for f in LABEL_FEATURES if f in features), None)
    if "image" not in features or label_feature is None:
        raise ValueError(
            f"{name} has the features {', '.join(sorted(features))}: "
            f"expected `image` and one of {', '.join(LABEL_FEATURES)}"
        )
    classes, labels_per_example = features[label_feature], None
    if isinstance(classes, tfds.features.Sequence):
        classes = classes.feature
        labels_per_example = MAX_LABELS
    if not isinstance(classes, tfds.features.ClassLabel):
        raise ValueError(
            f"{name}'s feature `{label_feature}` is {classes}: expected a ClassLabel or a Sequence "
            "of ClassLabel, which states the number of classes"
        )
    # Decoding is ours: parallel, and only of what is used.
    images = [f for f, feature in features.items() if isinstance(feature, tfds.features.Image)]
    decoders = {f: tfds.decode.SkipDecoding() for f in images}
    sizes = {s: info.num_examples for s, info in builder.info.splits.items()}

    def read(part: str, start: int, stop: int) -> Sequence:
        return builder.as_data_source(split=f"{part}[{start}:{stop}]", decoders=decoders)

    records = _read_split(split, sizes, name, read)
    names = tuple(classes.names)
    return Source(records, classes.num_classes, names, labels_per_example, label_feature)


def _tfds_builder(name: str, data_dir: str | None):
    """The builder of a dataset that is prepared in ArrayRecord format."""
    import tensorflow_datasets as tfds
    from etils import epath

    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except tfds.core.registered.DatasetNotFoundError as error:
        root = epath.Path(data_dir or tfds.core.constants.DATA_DIR).expanduser()
        found = [path.name for path in root.iterdir()] if root.exists() else []
        registered = tfds.list_builders(with_community_datasets=False)
        error_with_names = unknown("dataset", name, {"digits", *FORMULAS, *found, *registered})
        if Path(name).exists():
            raise ValueError(f"{error_with_names}. For the path, write ./{name}") from error
        raise error_with_names from error
    except AssertionError as error:  # a version that TFDS cannot build
        raise ValueError(f"cannot open {name}: {error}") from error
    folder = builder.data_dir
    if not builder.info.splits:
        command = f"tfds build {name} --file_format=array_record"
        command += f" --data_dir={data_dir}" if data_dir else ""
        manual = builder.MANUAL_DOWNLOAD_INSTRUCTIONS
        if manual:
            command += (
                f" --manual_dir=DIR\nDIR is where you put what must be fetched by hand: {manual}"
            )
        raise FileNotFoundError(
            f"{name} is not prepared: {folder} holds no dataset. Prepare it with\n"
            f"  pip install 'vit_jax[prepare]'\n  {command}"
        )
    formats = {file_format.value for file_format in builder.info.available_file_formats()}
    if "array_record" not in formats:
        raise FileNotFoundError(
            f"{folder} holds {', '.join(sorted(formats))} files, expected array_record. "
            f"Convert them with\n  pip install 'vit_jax[prepare]'\n"
            f"  tfds convert_format --dataset_version_dir={folder} --out_file_format=array_record"
        )
    return builder
