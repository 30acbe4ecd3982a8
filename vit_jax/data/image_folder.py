"""Reads image folders: `class/name.jpg`, or `train/class/name.jpg` beside other splits."""

import unicodedata
from pathlib import Path

from vit_jax.config import InputError
from vit_jax.data.listing import SPLIT_FOLDERS, ImageFiles, Listing, split_named
from vit_jax.data.walk import IMAGE_ENDINGS, Walker, is_image, shown


def read_folder(root: Path) -> Listing:
    """Lists a folder `class/name.jpg`, or `train/class/name.jpg` beside `val`, `test`, ...

    Classes are the folders' names in sorted order. Examples are in the order of their paths. Images
    may lie in subfolders of their class. Links are followed. Folders are splits if all of them are
    named for one (see `listing.split_named`), or if one that is so named holds folders and no
    images. Hidden files, and files whose names aren't those of images, are left out with a warning.

    Raises:
      ValueError: a class without images, a class that only an evaluation split has, a split without
        classes, folders that are neither clearly splits nor clearly classes, or a single class
        whose images are one folder further down.
      FileNotFoundError: no folders, or a broken link.
    """
    walker = Walker(root)
    folders, files = walker.entries(root)
    if not folders:
        raise FileNotFoundError(
            f"{root} holds no folders: expected images as class/name.jpg or train/class/name.jpg"
        )
    for file in files:
        walker.leave_out(file)
    splits = {"train": root}
    names = [split_named(folder.name) for folder in folders]
    if None not in names or any(map(_holds_classes, folders, names)):
        if None in names or len(set(names)) < len(names):
            raise InputError(
                f"{root} holds {', '.join(folder.name for folder in folders)}: expected either "
                f"classes, or one folder per split ({', '.join(SPLIT_FOLDERS)})"
            )
        splits = dict(zip(names, folders, strict=True))

    found = {split: _classes(folder, walker) for split, folder in splits.items()}
    walker.warn()
    names = sorted(found["train"] if "train" in found else set().union(*found.values()))
    label = {name: i for i, name in enumerate(names)}
    records = {}
    for split in sorted(found, key=("train", "validation", "test").index):
        if strange := sorted(found[split].keys() - label.keys()):
            raise InputError(
                f"{splits[split]} has classes that {splits['train']} hasn't: {', '.join(strange)}. "
                f"Rename or remove them, or add such images there; known: {', '.join(names[:40])}"
            )
        paths = [path for name in names for path in found[split].get(name, ())]
        labels = [label[name] for name in names for _ in found[split].get(name, ())]
        records[split] = ImageFiles(str(root), paths, labels)
    return Listing("image folder", records, len(names), tuple(names), None, walker.left_out)


def _holds_classes(folder: Path, split: str | None) -> bool:
    """Whether a folder is a split with classes inside, not a class named like a split."""
    if split is None:
        return False
    inside, files = Walker(folder).entries(folder)
    return bool(inside) and not any(map(is_image, files))


def _classes(folder: Path, walker: Walker) -> dict[str, list[str]]:
    """Returns {class: paths of its images, relative to the walker's root}."""
    classes, files = walker.entries(folder)
    if folder != walker.root:
        for file in files:
            walker.leave_out(file)
    if not classes:
        raise InputError(
            f"{folder} holds no class folders ({sum(map(is_image, files))} images lie in it): "
            "expected class/name.jpg. Images without labels are for predict: move them elsewhere"
        )
    found = {}
    for path in classes:
        # macOS stores é as two code points: normalizing gives every system the same class names.
        name = unicodedata.normalize("NFC", path.name)
        if name in found:
            raise InputError(f"{folder} holds two folders named {name!r} in two Unicode spellings")
        images = [str(image.relative_to(walker.root)) for image in walker.images(path)]
        if not images:
            raise InputError(
                f"class folder {path} holds no images: expected {' '.join(IMAGE_ENDINGS)} files. "
                "Remove it, or add some"
            )
        found[name] = images
    inside, files = Walker(path).entries(path)
    if len(classes) == 1 and inside and not any(map(is_image, files)):
        raise InputError(
            f"{folder} holds one folder, {path.name}, which holds the folders "
            f"{shown(f.name for f in inside)}: expected two or more classes. Give {path} if these "
            "are the classes or the splits"
        )
    return found
