"""TFDS's split grammar, `train[:10%]+test`, and the records it selects."""

import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from vit_jax.config import InputError, unknown


def parse_split(
    split: str, sizes: Mapping[str, int], dataset: str, unbounded: Sequence[str] = ()
) -> list[tuple[str, int, int]]:
    """Parses TFDS's split grammar: `train[:10%]+test[5:1_000]`.

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
            raise InputError(
                f"cannot read {part!r} in split {split!r}: expected NAME or NAME[START:STOP] with "
                "whole numbers or percentages, such as train[:99%], joined by +"
            )
        name = match[1]
        if name not in sizes:
            name = next((known for known in sizes if known.lower() == name.lower()), name)
        if name not in sizes:
            raise unknown(f"split of {dataset}", name, sizes)
        size = sizes[name]
        start = _boundary(match[2], size, default=0)
        stop = _boundary(match[3], size, default=size)
        if not 0 <= start < stop or (stop > size and name not in unbounded):
            raise InputError(
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
    starts: tuple[int, ...]  # start of each part, then the total length

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index):
        part, index = self._locate(index)
        return part[index]

    def name(self, index):
        return record_name(*self._locate(index))

    def listed(self, start: int, stop: int) -> Iterator[bytes]:
        for part, first in zip(self.parts, self.starts, strict=False):
            yield from listed(part, max(start - first, 0), min(stop - first, len(part)))

    def _locate(self, index):
        part = bisect_right(self.starts, index) - 1
        return self.parts[part], index - self.starts[part]


@dataclass(frozen=True)
class Slice(Sequence):
    """A lazy records[start:stop]."""

    records: Sequence
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, index):
        return self.records[self.start + index]

    def name(self, index):
        return record_name(self.records, self.start + index)

    def listed(self, start: int, stop: int) -> Iterator[bytes]:
        return listed(self.records, self.start + start, self.start + stop)


def read_split(
    split: str,
    sizes: Mapping[str, int],
    dataset: str,
    read: Callable[[str, int, int], Sequence],
    unbounded: Sequence[str] = (),
) -> Sequence:
    """Returns the records of a split; `read(name, start, stop)` reads one slice."""
    parts = tuple(read(*part) for part in parse_split(split, sizes, dataset, unbounded))
    if len(parts) == 1:
        return parts[0]
    return _Concatenated(parts, tuple(accumulate(map(len, parts), initial=0)))


def record_name(records: Sequence, index: int) -> str | None:
    """Returns the name of a record, which is its file; None if the records have no names."""
    return records.name(index) if hasattr(records, "name") else None


def listed(records: Sequence, start: int, stop: int) -> Iterator[bytes]:
    """Yields what is known of records start to stop without reading them, such as file names.

    It doesn't depend on the folder that the files lie in: see `fingerprint`.
    """
    if start < stop and hasattr(records, "listed"):
        yield from records.listed(start, stop)
