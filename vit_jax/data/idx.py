"""Reads IDX files, the format of MNIST and Fashion-MNIST."""

import gzip
import io
import math
import re
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vit_jax.config import InputError
from vit_jax.data.foreign_files import read_file
from vit_jax.data.listing import Listing, split_in
from vit_jax.data.tables import CLASS_NAMES, class_names_beside

MAX_BYTES = 1 << 30  # of an unpacked file
_IMAGES = re.compile(r"(.*)images([-.]idx3[-.]ubyte(?:\.gz)?)")


@dataclass(frozen=True)
class Pixels(Sequence):
    """Images uint8 [N, H, W] and labels uint8 [N] of a pair of IDX files."""

    file: str
    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.images[index], "label": int(self.labels[index])}

    def name(self, index: int) -> str:
        return f"{self.file}:{index}"

    def listed(self, start: int, stop: int) -> Iterator[bytes]:
        yield self.images[start:stop].tobytes()
        yield self.labels[start:stop].tobytes()

    def sizes(self) -> np.ndarray:
        return np.full(len(self), self.images[0].size, np.int64)


def find_idx(folder: Path) -> list[Path]:
    """Returns the IDX files of images in a folder."""
    return sorted(path for path in folder.iterdir() if _IMAGES.fullmatch(path.name))


def read_idx(files: Sequence[Path]) -> Listing:
    """Reads files named as MNIST's: `train-images-idx3-ubyte` beside `train-labels-idx1-ubyte`.

    Both may be gzipped. Files named t10k... are the test split.

    Raises:
      ValueError: a name without a split, an invalid header, a truncated file, or different numbers
        of images and labels.
      FileNotFoundError: the labels are missing.
    """
    splits = {}
    for path in files:
        stem, rest = _IMAGES.fullmatch(path.name).groups()
        split = split_in(stem.replace("t10k", "test"))
        if split is None or split in splits:
            raise InputError(f"{path}: expected one file for train and one for test (or t10k)")
        labels = path.with_name(f"{stem}labels{rest.replace('idx3', 'idx1')}")
        pixels, numbers = _idx_array(path, 3), _idx_array(labels, 1)
        if len(pixels) != len(numbers) or not len(pixels):
            raise InputError(
                f"{path} has {len(pixels)} images, {labels} {len(numbers)} labels: "
                "expected equal numbers, at least 1"
            )
        splits[split] = Pixels(path.name, pixels, numbers)
    names = class_names_beside(files[0])
    num_classes = 1 + max(int(records.labels.max()) for records in splits.values())
    if names and num_classes > len(names):
        raise InputError(
            f"{files[0].parent} has the label {num_classes - 1}: expected less than {len(names)}, "
            f"the number of classes in {CLASS_NAMES}"
        )
    return Listing("IDX files", splits, len(names) if names else num_classes, names)


def _idx_array(path: Path, rank: int) -> np.ndarray:
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}")
    data = _unpacked(read_file(path), path)
    header = 4 + 4 * rank
    if data[:4] != bytes([0, 0, 8, rank]) or len(data) < header:
        raise InputError(
            f"{path} begins with {data[:4]!r}: expected an IDX file of uint8 with {rank} dimensions"
        )
    shape = struct.unpack_from(f">{rank}I", data, 4)
    if len(data) != header + math.prod(shape):
        raise InputError(
            f"{path} has {len(data)} bytes, its header promises {header + math.prod(shape)}: "
            "truncated or damaged"
        )
    if not all(shape[1:]):
        raise InputError(f"{path} has images of {shape[1]} x {shape[2]} pixels: expected some")
    pixels = np.frombuffer(data, np.uint8, offset=header).reshape(shape)
    pixels.flags.writeable = False
    return pixels


def _unpacked(data: bytes, path: Path) -> bytes | bytearray:
    """Decompresses a gzipped file, at most slightly beyond the size in its IDX header."""
    if data[:2] != b"\x1f\x8b":
        return data
    try:
        with gzip.open(io.BytesIO(data)) as file:
            head = file.read(16)
            rank = min(head[3], 3) if len(head) > 3 else 0
            promised = math.prod(struct.unpack_from(f">{rank}I", head.ljust(16, b"\0"), 4))
            if promised > MAX_BYTES:
                raise InputError(f"{path} holds {promised:,} bytes: expected up to {MAX_BYTES:,}")
            # In place: one copy in memory. A byte more than promised shows that the file is longer.
            unpacked, filled = bytearray(4 + 4 * rank + promised + 1), len(head)
            unpacked[:filled] = head
            with memoryview(unpacked) as view:
                while count := file.readinto(view[filled : filled + (1 << 20)]):
                    filled += count
            del unpacked[filled:]
            return unpacked
    except (EOFError, OSError, zlib.error) as error:
        raise InputError(f"{path} is truncated or damaged: {error}") from error
