"""The splits and examples of a dataset on disk, and the names that denote splits."""

import dataclasses
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vit_jax.data.foreign_files import read_file
from vit_jax.data.walk import Walker, check_mounted

SPLIT_FOLDERS = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}


@dataclass(frozen=True)
class Listing:
    """A dataset's splits. Examples are read when they are indexed.

    Attributes:
      kind: the dataset's format, in words.
      splits: split name -> random-access records {"image": encoded bytes or uint8 pixels, "label":
        an int or a tuple of ints}. Records have the methods `name(index)`, which returns the
        example's file for messages, and `sizes()`, which returns the images' sizes in bytes, int64
        [N]. They may have `listed`, see `slices.listed`.
      num_classes, class_names, labels_per_example: as in `sources.Source`.
      left_out: reason -> files that were left out.
    """

    kind: str
    splits: Mapping[str, Sequence[Mapping[str, Any]]]
    num_classes: int
    class_names: tuple[str, ...] | None = None
    labels_per_example: int | None = None
    left_out: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class ImageFiles(Sequence):
    """Records of a split whose images are separate files.

    Attributes:
      folder: the folder that `paths` are relative to.
      paths: one path per example.
      labels: one int, or one tuple of ints, per example.
    """

    folder: str
    paths: Sequence[str]
    labels: Sequence[int] | Sequence[tuple[int, ...]]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        data = read_file(os.path.join(self.folder, self.paths[index]))
        return {"image": data, "label": self.labels[index]}

    def name(self, index: int) -> str:
        return self.paths[index]

    def listed(self, start: int, stop: int) -> Iterator[bytes]:
        yield "\n".join(self.paths[start:stop]).encode(errors="surrogateescape")
        yield json.dumps(self.labels[start:stop]).encode()

    def sizes(self) -> np.ndarray:
        return np.array([os.path.getsize(os.path.join(self.folder, p)) for p in self.paths])


def split_in(name: str) -> str | None:
    """Returns the split that a file name contains: `set-train-0000.tar`, `val/0000.tar`."""
    words = re.split("[^a-z]+", name.lower())
    return next((SPLIT_FOLDERS[word] for word in words if word in SPLIT_FOLDERS), None)


def split_named(name: str) -> str | None:
    """Returns the split that a folder's name denotes: `Train`, `training_set`, `test2017`.

    Returns None if the name contains another word.
    """
    words = (
        re.sub("(set|data|images?|imgs?)$", "", w) for w in re.findall(r"[^\W\d_]+", name.lower())
    )
    words = [word for word in words if word not in ("", "split", "folder")]
    return SPLIT_FOLDERS.get(words[0]) if len(words) == 1 else None


def find_images(paths: Iterable[str | os.PathLike]) -> list[Path]:
    """Returns the given files and all images in the given folders; warns of other files there.

    Raises FileNotFoundError if none of the paths exists, ValueError for one in a bucket.
    """
    found = []
    for name in (names := list(paths)):
        check_mounted(os.fspath(name))
        path = Path(name)
        if path.is_dir():
            walker = Walker(path)
            found += walker.images(path)
            walker.warn()
        else:
            found.append(path)
    if names and not any(map(os.path.exists, names)):
        raise FileNotFoundError(f"there is no {' and no '.join(map(os.fspath, names))}")
    return found
