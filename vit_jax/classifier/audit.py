"""Checks a dataset before training, and reports sizes, broken images, duplicates and imbalance."""

import dataclasses
import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from vit_jax.config import InputError
from vit_jax.data.decode import decode_image
from vit_jax.data.jpeg_markers import orientation
from vit_jax.data.sources import Source

MOST = 100_000  # images to check per split; evenly spaced in a larger one
FEW = 10  # with fewer training images, a class's recall is unreliable
IMBALANCED = 10  # ratio of the largest class to the smallest
TURNED = (
    "turned by their EXIF orientation, which is ignored unless the preprocessing begins with "
    "`upright` (--config.eval_preprocess='upright|resize', and data.preprocess likewise)"
)
SHOWN = 10  # names listed in a finding


@dataclasses.dataclass(frozen=True)
class Audit:
    """Results of `look_at`; JSON can hold all fields."""

    class_names: tuple[str, ...]
    counts: dict[str, list[int]]  # split -> images per class, without broken ones
    sizes: dict[str, list[int]]  # "width" and "height" -> least, median, most
    looked_at: dict[str, int]  # split -> number of checked images
    broken: list[dict[str, Any]]  # {"split", "index", "file", "error"}
    duplicates: list[list[dict[str, Any]]]  # same pixels: {"split", "index", "file", "label"}
    findings: list[str]  # problems, the most serious first

    def __str__(self) -> str:
        lines = [
            f"{split}: {sum(counts):,} images of {np.count_nonzero(counts)} classes, "
            f"{min(counts)} to {max(counts)} per class"
            for split, counts in self.counts.items()
        ]
        if self.sizes:
            (w0, w1, w2), (h0, h1, h2) = self.sizes["width"], self.sizes["height"]
            lines.append(f"pixels: {w0} x {h0} to {w2} x {h2}, median {w1} x {h1}")
        return "\n".join([*lines, *(f"note: {finding}" for finding in self.findings)])


def look_at(sources: Mapping[str, Source], threads: int = 8) -> Audit:
    """Decodes the images of every split and compares them.

    Raises ValueError for data that can't be trained on: fewer than two classes, several labels per
    image, or a class without a readable image in the first split, `train`.
    """
    first = next(iter(sources.values()))
    names = first.class_names or tuple(str(i) for i in range(first.num_classes))
    if any(source.labels_per_example is not None for source in sources.values()):
        raise InputError("the images have several labels each: expected one label per image")
    if len(names) < 2:
        raise InputError(
            f"there is one class, {', '.join(names) or 'without a name'}: expected two or more. A "
            "folder of images has one folder per class: class/name.jpg"
        )
    counts = {split: [0] * len(names) for split in sources}
    looked_at, sizes, broken, same = {}, [], [], defaultdict(list)
    exif = defaultdict(list)  # remark on EXIF data -> files
    for split, source in sources.items():
        indices = np.unique(np.linspace(0, len(source) - 1, min(MOST, len(source))).astype(int))
        looked_at[split] = len(indices)
        with ThreadPoolExecutor(threads) as pool:
            for index, seen in zip(indices, pool.map(_Look(source), indices), strict=True):
                place = {"split": split, "index": int(index), "file": source.name(int(index))}
                if isinstance(seen, str):
                    broken.append({**place, "error": seen})
                    continue
                label, size, digest, remark = seen
                if remark:
                    exif[remark].append(place["file"])
                counts[split][label] += 1
                sizes.append(size)
                same[digest].append({**place, "label": label})
    train = next(iter(sources))
    if empty := [name for name, n in zip(names, counts[train], strict=True) if n == 0]:
        raise InputError(
            f"{train} has no readable image of {', '.join(empty[:SHOWN])}: add some, or remove the "
            f"class{_error_of(broken)}"
        )
    height, width = np.array(sizes).T
    audit = Audit(
        class_names=tuple(names),
        counts=counts,
        sizes={
            axis: [int(f(values)) for f in (np.min, np.median, np.max)]
            for axis, values in (("width", width), ("height", height))
        },
        looked_at=looked_at,
        broken=broken,
        duplicates=[group for group in same.values() if len(group) > 1],
        findings=[],
    )
    remarks = [f"{remark}, {len(files)}: {_listed(files)}" for remark, files in exif.items()]
    return dataclasses.replace(audit, findings=[*_findings(audit, sources), *remarks])


@dataclasses.dataclass(frozen=True)
class _Look:
    """Maps an index to (label, (height, width), digest of pixels, EXIF remark), or to an error."""

    source: Source

    def __call__(self, index: int) -> tuple[int, tuple[int, int], bytes, str] | str:
        try:
            record = self.source[int(index)]
            pixels = decode_image(record["image"])
        except ValueError as error:
            return str(error)
        digest = hashlib.blake2b(np.ascontiguousarray(pixels), digest_size=16)
        digest.update(str(pixels.shape).encode())
        return (
            int(record["label"]),
            pixels.shape[:2],
            digest.digest(),
            _exif_remark(record["image"]),
        )


def _exif_remark(image: bytes | np.ndarray) -> str:
    """Returns a remark on an image's EXIF data, or ""."""
    if isinstance(image, np.ndarray):
        return ""
    try:
        return TURNED if orientation(image) > 1 else ""
    except ValueError:
        return "with damaged EXIF data, which are ignored"


def _error_of(broken: list[dict]) -> str:
    return f". {broken[0]['file']}: {broken[0]['error']}" if broken else ""


def _findings(audit: Audit, sources: Mapping[str, Source]):
    """Yields findings, the most serious first."""
    if audit.broken:
        yield (
            f"can't be read and left out, {len(audit.broken)}: "
            + _listed(image["file"] for image in audit.broken)
        )
    conflicts = [g for g in audit.duplicates if len({image["label"] for image in g}) > 1]
    if conflicts:
        pairs = (
            " = ".join(f"{i['file']} ({audit.class_names[i['label']]})" for i in group)
            for group in conflicts
        )
        yield f"in several classes, the same to the pixel, {len(conflicts)}: " + _listed(pairs)
    across = [g for g in audit.duplicates if len({image["split"] for image in g}) > 1]
    if across:
        pairs = (" = ".join(f"{i['split']} {i['file']}" for i in group) for group in across)
        yield (
            f"in several splits, so that accuracy is overstated, {len(across)}: " + _listed(pairs)
        )
    within = len(audit.duplicates) - len(across)
    if within:
        groups = (g for g in audit.duplicates if g not in across)
        files = (" = ".join(i["file"] for i in group) for group in groups)
        yield f"duplicates, {within}: " + _listed(files)
    train, *others = audit.counts
    counts = np.array(audit.counts[train])
    if (few := np.flatnonzero(counts < FEW)).size:
        yield f"classes with fewer than {FEW} images in {train}, {len(few)}: " + _listed(
            f"{audit.class_names[i]} ({counts[i]})" for i in few
        )
    if counts.max() >= IMBALANCED * counts.min():
        most, least = audit.class_names[counts.argmax()], audit.class_names[counts.argmin()]
        yield (
            f"the classes are imbalanced: {counts.max()} images of {most}, {counts.min()} of "
            f"{least}. Look at the recalls, not at the accuracy alone"
        )
    for split in others:
        absent = np.flatnonzero(np.array(audit.counts[split]) == 0)
        if absent.size:
            yield f"{split} has no image of {_listed(audit.class_names[i] for i in absent)}"
    for split, looked_at in audit.looked_at.items():
        if looked_at < len(sources[split]):
            yield f"{looked_at:,} of {len(sources[split]):,} images of {split} were checked"


def few_left(names: Sequence[str], left: Sequence[int], before: Sequence[int]) -> Iterator[str]:
    """Yields a finding if the cut leaves too few training images in classes that had enough."""
    few = [f"{n} ({a})" for n, a, b in zip(names, left, before, strict=True) if a < FEW <= b]
    if few:
        yield f"classes with fewer than {FEW} images left in train after the cut, {len(few)}: " + (
            _listed(few)
        )


def _listed(names) -> str:
    names = list(names)
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" * (len(names) > SHOWN))
