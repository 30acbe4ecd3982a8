"""Mixtures of datasets, each with a weight."""

import dataclasses
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

from vit_jax.config import InputError, unknown
from vit_jax.data.sources import Source, open_source

LABELS = ("shared", "concatenated")


@dataclasses.dataclass(frozen=True)
class PartConfig:
    """One dataset of a mixture, with its weight.

    Attributes:
      dataset, split, data_dir: see `sources.open_source`.
      weight: its share of the examples that are read, relative to the other parts' weights.
    """

    dataset: str
    split: str = "train"
    data_dir: str | None = None
    weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class Mixture(Source):
    """The concatenated examples of the parts.

    Attributes:
      sizes: number of examples of each part.
      weights: weight of each part.
    """

    sizes: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()

    def part_of(self, index: int) -> range:
        """Returns the index range of the part that holds this example."""
        starts = list(accumulate(self.sizes, initial=0))
        return next(range(a, b) for a, b in pairwise(starts) if a <= index < b)


@dataclasses.dataclass(frozen=True)
class _Parts(Sequence):
    sources: tuple[Source, ...]
    label_offsets: tuple[int, ...]

    def _find(self, index: int) -> tuple[int, int]:
        part = 0
        while index >= len(self.sources[part]):
            index -= len(self.sources[part])
            part += 1
        return part, index

    def __len__(self) -> int:
        return sum(map(len, self.sources))

    def __getitem__(self, index: int) -> dict[str, Any]:
        part, index = self._find(index)
        record = self.sources[part][index]
        label, offset = record["label"], self.label_offsets[part]
        if offset:
            label = [v + offset for v in label] if isinstance(label, Sequence) else label + offset
        return {**record, "label": label}

    def name(self, index: int) -> str:
        part, index = self._find(index)
        return f"part {part}: {self.sources[part].describe(index)}"


def open_mixture(parts: Mapping[str, PartConfig], labels: str) -> Mixture:
    """Opens the parts, in the order of their names.

    Args:
      parts: name -> what to read.
      labels: `shared`: a label means the same class in all parts. They must have the same number of
        classes, and the same class names if they have any. `concatenated`: the classes of each part
        follow those of the parts before it.

    Raises:
      ValueError: a weight that isn't positive, different classes with `shared` labels, or as
        `open_source`.
    """
    if labels not in LABELS:
        raise unknown("way to mix labels", labels, LABELS)
    names = sorted(parts)
    for name in names:
        if not parts[name].weight > 0:
            raise InputError(f"weight {parts[name].weight} of {name}: expected a positive number")
    sources = tuple(
        open_source(p.dataset, p.split, p.data_dir) for p in (parts[name] for name in names)
    )
    first, offsets, num_classes = sources[0], [0] * len(sources), sources[0].num_classes
    if labels == "concatenated":
        *offsets, num_classes = accumulate((s.num_classes for s in sources), initial=0)
    else:
        for name, source in zip(names, sources, strict=True):
            both = (first.class_names, source.class_names)
            if source.num_classes != num_classes or (all(both) and both[0] != both[1]):
                raise InputError(
                    f"{names[0]} has {num_classes} classes, {_shown(first)}, and {name} has "
                    f"{source.num_classes}, {_shown(source)}: expected the same, "
                    "or labels='concatenated'"
                )
    class_names = first.class_names
    if labels == "concatenated":
        known = all(source.class_names for source in sources)
        class_names = tuple(c for source in sources for c in source.class_names) if known else None
        if class_names and len(set(class_names)) < num_classes:
            pairs = zip(names, sources, strict=True)
            class_names = tuple(f"{name}/{c}" for name, source in pairs for c in source.class_names)
    several = [s.labels_per_example for s in sources if s.labels_per_example]
    return Mixture(
        _Parts(sources, tuple(offsets)),
        num_classes,
        class_names,
        max(several) if several else None,
        sizes=tuple(map(len, sources)),
        weights=tuple(parts[name].weight for name in names),
    )


def _shown(source: Source) -> str:
    return ", ".join(source.class_names[:3]) + ", ..." if source.class_names else "without names"
