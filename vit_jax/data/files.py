"""Image folders, read without preparation; what lies at a path, in general."""

import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

IMAGE_ENDINGS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".avif"),
)
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
_LITTER = ("__MACOSX", "Thumbs.db", "desktop.ini")  # and whatever begins with a dot


@dataclass(frozen=True)
class Listing:
    """What lies at a path: its splits, whose examples are read when asked for.

    Attributes:
      kind: what it is, in words.
      splits: random-access records {"image": encoded bytes or uint8 pixels, "label": an int or a
        tuple of them}, with `name(index)`, the file, for messages, and `sizes()`, bytes int64 [N].
      num_classes, class_names, labels_per_example: as in `sources.Source`.
      left_out: files that lie there and are no images by their names, or in no class.
    """

    kind: str
    splits: Mapping[str, Sequence[Mapping[str, Any]]]
    num_classes: int
    class_names: tuple[str, ...] | None = None
    labels_per_example: int | None = None
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class ImageFiles(Sequence):
    """Image files that are opened one by one.

    Attributes:
      folder: what the paths are relative to.
      paths: of the files.
      labels: of the files: ints, or tuples of them.
    """

    folder: str
    paths: Sequence[str]
    labels: Sequence[int] | Sequence[tuple[int, ...]]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            with open(os.path.join(self.folder, self.paths[index]), "rb") as file:
                return {"image": file.read(), "label": self.labels[index]}
        except OSError as error:
            raise ValueError(f"cannot read it ({error})") from error

    def name(self, index: int) -> str:
        return self.paths[index]

    def sizes(self) -> np.ndarray:
        return np.array([os.path.getsize(os.path.join(self.folder, p)) for p in self.paths])


def read_folder(root: Path) -> Listing:
    """Lists a folder `class/name.jpg`, or `train/class/name.jpg` beside `val`, `test`, ...

    Classes are the folders' names in sorted order, examples are in the order of their paths, images
    may lie in folders inside their class's. Links are followed. Hidden files are passed over; other
    files that are no images by their names are left out with a warning.

    Raises:
      ValueError: a class without images, a class that only an evaluation split has, images outside
        a class, or folders that are neither clearly splits nor clearly classes.
      FileNotFoundError: no images at all, or a link to nothing.
    """
    folders, files = _entries(root)
    if not folders:
        raise FileNotFoundError(
            f"{root} holds no folders: expected images as class/name.jpg or train/class/name.jpg"
        )
    left_out = [str(file.relative_to(root)) for file in files]
    splits = {"train": root}
    if any(_holds_splits(folder) for folder in folders):
        names = [SPLIT_FOLDERS.get(folder.name.lower()) for folder in folders]
        if None in names or len(set(names)) < len(names):
            raise ValueError(
                f"{root} holds {', '.join(folder.name for folder in folders)}: expected either "
                f"classes, or one folder a split ({', '.join(SPLIT_FOLDERS)})"
            )
        splits = dict(zip(names, folders, strict=True))

    found = {split: _classes(folder, root, left_out) for split, folder in splits.items()}
    if left_out:
        logging.warning(
            "%s: %d files are no images by their names or lie outside a class, and are left out: "
            "%s%s",
            *(root, len(left_out), ", ".join(left_out[:5]), ", ..." if len(left_out) > 5 else ""),
        )
    names = sorted(found["train"] if "train" in found else set().union(*found.values()))
    label = {name: i for i, name in enumerate(names)}
    records = {}
    for split in sorted(found, key=("train", "validation", "test").index):
        if strange := sorted(found[split].keys() - label.keys()):
            raise ValueError(
                f"{splits[split]} has classes that {splits['train']} hasn't: {', '.join(strange)}. "
                f"Rename or remove them, or add such images there; known: {', '.join(names[:40])}"
            )
        paths = [path for name in names for path in found[split].get(name, ())]
        labels = [label[name] for name in names for _ in found[split].get(name, ())]
        records[split] = ImageFiles(str(root), paths, labels)
    return Listing("image folder", records, len(names), tuple(names), None, tuple(left_out))


def split_in(name: str) -> str | None:
    """The split that a file's name speaks of: `set-train-0000.tar`, `val/0000.tar`."""
    words = re.split("[^a-z]+", name.lower())
    return next((SPLIT_FOLDERS[word] for word in words if word in SPLIT_FOLDERS), None)


def _holds_splits(folder: Path) -> bool:
    """Whether this is train/ and so on with classes inside, not a class of that name."""
    if folder.name.lower() not in SPLIT_FOLDERS:
        return False
    inside, files = _entries(folder)
    return bool(inside) and not any(map(_is_image, files))


def _classes(folder: Path, root: Path, left_out: list[str]) -> dict[str, list[str]]:
    """{class: paths of its images, relative to root}; other files are added to `left_out`."""
    classes, files = _entries(folder)
    if folder != root:
        left_out += [str(file.relative_to(root)) for file in files]
    if not classes:
        raise ValueError(f"{folder} holds no class folders: expected class/name.jpg")
    found = {}
    for path in classes:
        # One spelling of é, whether the folder was packed on a Mac or on Linux.
        name = unicodedata.normalize("NFC", path.name)
        if name in found:
            raise ValueError(f"{folder} holds two folders named {name!r} in two Unicode spellings")
        images = []
        for file in _walk(path, ()):
            (images if _is_image(file) else left_out).append(str(file.relative_to(root)))
        if not images:
            raise ValueError(
                f"class folder {path} holds no images: expected {' '.join(IMAGE_ENDINGS)} files. "
                "Remove it, or add some"
            )
        found[name] = images
    return found


def _entries(folder: Path) -> tuple[list[Path], list[Path]]:
    """Folders and files inside, sorted, without hidden ones."""
    folders, files = [], []
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda e: e.name):
            if entry.name.startswith(".") or entry.name in _LITTER:
                continue
            if not os.path.exists(entry.path):
                target = os.readlink(entry.path)
                raise FileNotFoundError(f"{entry.path} is a link to {target}, which isn't there")
            (folders if entry.is_dir() else files).append(Path(entry.path))
    return folders, files


def _walk(folder: Path, above: tuple[tuple[int, int], ...]) -> Iterator[Path]:
    """All files inside, in the order of their paths."""
    status = os.stat(folder)
    if (status.st_dev, status.st_ino) in above:
        raise ValueError(f"{folder} is a link to a folder that it lies in")
    above = (*above, (status.st_dev, status.st_ino))
    folders, files = _entries(folder)
    inside = set(folders)
    for path in sorted(folders + files):
        if path in inside:
            yield from _walk(path, above)
        else:
            yield path


def _is_image(file: Path) -> bool:
    return file.name.lower().endswith(IMAGE_ENDINGS)


def find_images(paths: Iterable[str]) -> list[Path]:
    """Files as they are named; of folders all images inside, sorted."""
    found = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = (p for p in sorted(path.rglob("*")) if p.suffix.lower() in IMAGE_ENDINGS)
            found += [p for p in inside if p.is_file() and not p.name.startswith(".")]
        else:
            found.append(path)
    return found
