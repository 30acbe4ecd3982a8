"""Image folders: `class/name.jpg`, or `train/class/name.jpg` beside other splits."""

import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from absl import logging

from vit_jax.data.listing import IMAGE_ENDINGS, SPLIT_FOLDERS, ImageFiles, Listing

_LITTER = ("__MACOSX", "Thumbs.db", "desktop.ini")  # and whatever begins with a dot


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
