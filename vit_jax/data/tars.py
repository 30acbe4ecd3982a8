"""Reads tars without unpacking them: WebDataset's, and ImageNet's as image-net.org ships them.

A tar's headers are read once. After that, every image is one read at a known offset. Compressed
tars have no such offsets and are rejected.
"""

import itertools
import json
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from absl import logging

from vit_jax.config import InputError
from vit_jax.data.foreign_files import MAX_BYTES, check_regular
from vit_jax.data.listing import Listing, split_in
from vit_jax.data.tables import class_names_beside, number_labels
from vit_jax.data.walk import IMAGE_ENDINGS, Walker

MAX_LABEL_BYTES = 1 << 20
SYNSET = re.compile(r"(n\d{8})\.tar")
_RULE = (
    "Files form a sample if they follow each other (tar --sort=name) and have the same name up to "
    "its first dot, so names must hold no other dots"
)
_Member = tuple[str, int, int]  # name, offset in the file, size


@dataclass(frozen=True)
class TarImages(Sequence):
    """Images inside tars.

    Attributes:
      tars: paths of the tars.
      names: bytes [N], the images' own names.
      tar: int64 [N], index of the tar that holds the image.
      offset, size: int64 [N], of the image in its tar, in bytes.
      labels: ints, or tuples of them.
    """

    tars: Sequence[str]
    names: np.ndarray
    tar: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    labels: Sequence[int] | Sequence[tuple[int, ...]]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        label = self.labels[index]
        if self.size[index] > MAX_BYTES:
            raise InputError(f"it has {self.size[index]:,} bytes: expected up to {MAX_BYTES:,}")
        with open(self.tars[self.tar[index]], "rb") as file:
            data = os.pread(file.fileno(), int(self.size[index]), int(self.offset[index]))
        if len(data) < self.size[index]:
            raise InputError(f"{file.name} ends inside it: truncated since its headers were read")
        return {"image": data, "label": label if isinstance(label, tuple) else int(label)}

    def name(self, index: int) -> str:
        tar = os.path.basename(self.tars[self.tar[index]])
        return f"{tar}:{self.names[index].decode(errors='replace')}"

    def listed(self, start: int, stop: int) -> Iterator[bytes]:
        yield b"\n".join(self.names[start:stop].tolist())
        yield self.size[start:stop].tobytes()
        yield json.dumps(list(self.labels[start:stop])).encode()

    def sizes(self) -> np.ndarray:
        return self.size


def find_tars(folder: Path) -> list[Path]:
    """Returns the tars in a folder, or in its subfolders (train/, val/, ...) if it has none itself.

    Returns [] if images lie in its subfolders: it is then an image folder.
    """
    tars = sorted(folder.glob("*.tar")) or sorted(folder.glob("*/*.tar"))
    walker = Walker(folder)
    folders, _ = walker.entries(folder) if tars else ([], [])
    return [] if any(True for inside in folders for _ in walker.images(inside)) else tars


def read_tars(tars: Sequence[Path]) -> Listing:
    """Lists the images in tars. The tars' names tell their kind:

    - `ILSVRC2012_img_train.tar` and `ILSVRC2012_img_val.tar`: ImageNet-1k as image-net.org ships
      it. Validation labels and class numbers are TFDS's.
    - `n01440764.tar` and so on, one per class, or one tar of such tars: ImageNet-21k. All images
      form the split `full`. The classes are those present, in the order of their names.
    - Others: WebDataset. Files with the same stem (up to the first dot) form a sample: an image and
      its label, which is a `.cls` (a number or a name) or `label` or `labels` in a `.json`. The
      tars' names or folders tell the splits (`train-0000.tar`, `val/0000.tar`), by default train.
      Classes are as in `tables.read_table`.

    Raises:
      ValueError: a tar is truncated, damaged or compressed; names are of different kinds; or a
        sample lacks its image or label, or has a label out of range.
    """
    for tar in tars:
        check_regular(tar)
    names = {tar.name for tar in tars}
    if any(name.startswith("ILSVRC2012_img_") for name in names):
        return _imagenet_1k(tars)
    if len(tars) == 1:
        with open(tars[0], "rb") as file:
            inner = list(_members(file))
        if inner and all(SYNSET.fullmatch(os.path.basename(name)) for name, _, _ in inner):
            return _imagenet_21k([(tars[0], name, offset) for name, offset, _ in inner])
    if any(map(SYNSET.fullmatch, names)):
        return _imagenet_21k([(tar, tar.name, 0) for tar in tars])
    return _web_dataset(tars)


def _imagenet_1k(tars: Sequence[Path]) -> Listing:
    import tensorflow_datasets as tfds

    metadata = Path(tfds.__file__).parent / "datasets" / "imagenet2012"
    names = tuple((metadata / "labels.txt").read_text().split())
    splits = {}
    for tar in sorted(tars):
        if tar.name == "ILSVRC2012_img_train.tar":
            with open(tar, "rb") as file:
                inner = [(tar, name, offset) for name, offset, _ in _members(file)]
            splits["train"] = _class_tars(inner, names)
        elif tar.name == "ILSVRC2012_img_val.tar":
            synsets = (metadata / "validation_labels.txt").read_text().split()
            with open(tar, "rb") as file:
                members = _images(_members(file), tar)
            labels = [names.index(_validation_synset(tar, m[0], synsets)) for m in members]
            images = _Packed()
            images.add(tar, members, labels)
            splits["validation"] = images.records()
        else:
            logging.warning("%s is left out: expected the tar of train or val", tar)
    return Listing("ImageNet-1k's tars", splits, len(names), names)


def _validation_synset(tar: Path, name: str, synsets: Sequence[str]) -> str:
    match = re.fullmatch(r"(?:.*/)?ILSVRC2012_val_(\d{8})\.JPEG", name)
    if not match or not 1 <= int(match[1]) <= len(synsets):
        raise InputError(
            f"{tar} holds {name}: expected ILSVRC2012_val_00000001.JPEG to {len(synsets):08d}"
        )
    return synsets[int(match[1]) - 1]


def _imagenet_21k(tars: Sequence[tuple[Path, str, int]]) -> Listing:
    names = tuple(sorted(_synset(*tar) for tar in tars))
    records = _class_tars(tars, names)
    return Listing("one tar a class of ImageNet", {"full": records}, len(names), names)


def _synset(path: Path, name: str, offset: int) -> str:
    match = SYNSET.fullmatch(os.path.basename(name))
    if not match:
        where = f"{path}:{name}" if offset else path
        raise InputError(f"{where}: expected one tar per class, such as n01440764.tar")
    return match[1]


def _class_tars(tars: Sequence[tuple[Path, str, int]], names: tuple[str, ...]) -> TarImages:
    """Reads one tar per class, given as (file, the tar's name, its offset in the file)."""
    number = {name: i for i, name in enumerate(names)}
    images = _Packed()
    for tar in sorted(tars, key=lambda tar: _synset(*tar)):
        (path, name, offset), synset = tar, _synset(*tar)
        if synset not in number:
            raise InputError(f"{path}:{name}: {synset} is not one of the {len(names)} classes")
        with open(path, "rb") as file:
            members = _images(_members(file, offset), path)
        if not members:
            raise InputError(f"{path}:{name} holds no images")
        images.add(path, members, [number[synset]] * len(members))
    return images.records()


def _web_dataset(tars: Sequence[Path]) -> Listing:
    root = tars[0].parent if len({tar.parent for tar in tars}) == 1 else tars[0].parent.parent
    splits = {tar: split_in(str(tar.relative_to(root))) for tar in tars}
    if set(splits.values()) == {None}:
        splits = dict.fromkeys(tars, "train")
    members: dict[Path, list[_Member]] = {}
    labels, places = [], []
    for tar in tars:
        if splits[tar] is None:
            raise InputError(
                f"{tar}: expected a split in its name, as others have one (train, val or test)"
            )
        members[tar] = []
        with open(tar, "rb") as file:
            for key, sample in _samples(_members(file), tar):
                place = f"{tar}:{key}"
                found = [ending for ending in sample if f".{ending}" in IMAGE_ENDINGS]
                if len(found) != 1:
                    raise InputError(
                        f"{place} has {', '.join(sample)}: expected one image. {_RULE}"
                    )
                members[tar].append((f"{key}.{found[0]}", *sample[found[0]]))
                labels.append(_sample_labels(file, sample, place))
                places.append(place)
    if not labels:
        raise InputError(f"{', '.join(map(str, tars[:3]))}: no samples inside")
    numbers, classes = number_labels(labels, places, class_names_beside(tars[0]))
    numbers = iter(numbers)
    images: dict[str, _Packed] = {}
    for tar in tars:
        own = [next(numbers) for _ in members[tar]]
        images.setdefault(splits[tar], _Packed()).add(tar, members[tar], own)
    records = {split: packed.records() for split, packed in images.items()}
    return Listing("WebDataset tars", records, *classes)


def _samples(
    members: Iterator[_Member], tar: Path
) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    """Yields (stem, {ending: (offset, size)}) for consecutive files with the same stem.

    Raises ValueError if two of them have the same ending: one would be lost.
    """

    def stem(member: _Member) -> str:
        folder, _, name = member[0].rpartition("/")
        return f"{folder}/{name.partition('.')[0]}" if folder else name.partition(".")[0]

    visible = (m for m in members if not os.path.basename(m[0]).startswith("."))
    for key, group in itertools.groupby(visible, stem):
        sample = {}
        for name, *place in group:
            ending = name[len(key) + 1 :].lower()
            if ending in sample:
                raise InputError(f"{tar}:{key} has two files .{ending}: expected one. {_RULE}")
            sample[ending] = place
        yield key, sample


def _sample_labels(
    file: BinaryIO, sample: dict[str, tuple[int, int]], place: str
) -> str | int | list:
    """Returns a label, or a list of them for a multi-label set."""

    def text(ending: str) -> str:
        offset, size = sample[ending]
        if size > MAX_LABEL_BYTES:
            raise InputError(f"{place}: its .{ending} has {size:,} bytes: expected a label")
        return os.pread(file.fileno(), size, offset).decode("utf-8-sig").strip()

    if "cls" in sample:
        try:
            return text("cls")
        except UnicodeDecodeError as error:
            raise InputError(f"{place}: its .cls is not UTF-8 text: {error}") from error
    try:
        values = json.loads(text("json")) if "json" in sample else {}
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place}: its .json is malformed: {error}") from error
    if not isinstance(values, dict) or ("label" in values) == ("labels" in values):
        raise InputError(
            f"{place} has {', '.join(sample)}: expected a .cls, or a .json with `label` or "
            f"`labels`. {_RULE}"
        )
    if "labels" in values and not isinstance(values["labels"], list):
        raise InputError(f"{place}: labels {values['labels']!r}: expected a list")
    return values.get("label", values.get("labels"))


class _Packed:
    """Collects members of tars for `TarImages`."""

    def __init__(self):
        self._tars, self._parts, self._labels = [], [], []

    def add(self, tar: Path, members: Sequence[_Member], labels: Sequence) -> None:
        if str(tar) not in self._tars:
            self._tars.append(str(tar))
        names, offsets, sizes = zip(*members, strict=True)
        encoded = np.array([name.encode(errors="surrogateescape") for name in names])
        index = np.full(len(names), self._tars.index(str(tar)), np.int64)
        self._parts.append((encoded, index, np.array(offsets), np.array(sizes)))
        self._labels.extend(labels)

    def records(self) -> TarImages:
        columns = [np.concatenate(column) for column in zip(*self._parts, strict=True)]
        return TarImages(self._tars, *columns, self._labels)


def _images(members: Iterator[_Member], tar: Path) -> list[_Member]:
    """Returns the members with an image's file name, sorted; leaves out others with a warning."""
    images, others = [], []
    for member in members:
        name = os.path.basename(member[0])
        if not name.startswith("."):
            (images if name.lower().endswith(IMAGE_ENDINGS) else others).append(member)
    if others:
        logging.warning(
            "%s: %d files are not images by name and are left out, such as %s",
            *(tar, len(others), others[0][0]),
        )
    return sorted(images)


def _members(file: BinaryIO, start: int = 0) -> Iterator[_Member]:
    """Yields (name, offset, size) of the files in the tar that begins at `start`."""
    length = os.fstat(file.fileno()).st_size
    file.seek(start)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.isfile():
                    if member.issparse() or member.offset_data + member.size > length:
                        raise InputError(f"{file.name} ends inside {member.name}: it is truncated")
                    yield member.name, member.offset_data, member.size
                elif not member.isdir():
                    raise InputError(
                        f"{file.name} holds the link or device {member.name}: expected files"
                    )
                tar.members = []  # tarfile would keep all of them for look-ups by name
            end = tar.offset
    except tarfile.TarError as error:
        raise InputError(
            f"{file.name} is not a whole tar ({error}): "
            "if it is compressed, unpack it to a .tar first"
        ) from error
    if os.pread(file.fileno(), 512, end) != bytes(512):
        raise InputError(f"{file.name} lacks the end mark of a tar: it is truncated")
    if start == 0 and length - end > 1 << 20:  # tars are padded to 10 KiB
        raise InputError(f"{file.name} has {length - end} bytes after its end mark: joined tars?")
