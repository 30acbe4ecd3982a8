"""VTAB-1k: 19 tasks with 800 training and 200 dev images each (Zhai et al., arXiv 1910.04867).

`vtab/clevr_count` and so on are TFDS datasets with the splits `train`, `dev` and `test` of the
paper's code. As there, some labels are derived from other features. Final results train on
`train+dev`, the "train800val200" of that code.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from vit_jax.config import unknown
from vit_jax.data.array_records import open_array_records
from vit_jax.data.decode import decode_image
from vit_jax.data.listing import Listing
from vit_jax.data.slices import Slice, listed, read_split

PREFIX = "vtab/"


@dataclasses.dataclass(frozen=True)
class Task:
    """A TFDS dataset, its three splits, and how to derive a label that isn't the dataset's own."""

    dataset: str
    train: str
    dev: str
    test: str = "test"
    label: Callable[[Mapping[str, Any]], int] | None = None
    num_classes: int | None = None  # of a derived label
    scale: int = 1  # factor of the pixels


def _closest(depths: np.ndarray, thresholds: Sequence[float]) -> int:
    """Returns the index of the last threshold that the smallest depth exceeds."""
    return int(np.flatnonzero(np.array(thresholds) < np.min(depths)).max())


def _clevr_distance(record: Mapping[str, Any]) -> int:
    depths = np.array(record["objects"]["pixel_coords"])[:, 2]
    return _closest(depths, (0.0, 8.0, 8.5, 9.0, 9.5, 10.0, 100.0))


def _kitti_distance(record: Mapping[str, Any]) -> int:
    """Returns the class of the closest car, van or truck; the last class means there is none."""
    objects = record["objects"]
    vehicles = np.array(objects["type"]) < 3
    depths = np.array(objects["location"]).reshape(-1, 3)[vehicles, 2]
    return _closest(np.append(depths, 1000.0), (-100.0, 8.0, 20.0, 999.0))


def _bucket(feature: str, values: int, buckets: int) -> Callable[[Mapping[str, Any]], int]:
    return lambda record: int(record[feature]) * buckets // values


_CLEVR = ("clevr:3.*.*", "train[:800]", "train[63000:63200]", "validation")
_DSPRITES = ("dsprites:2.*.*", "train[:800]", "train[589824:590024]", "train[663552:]")
_SMALLNORB = ("smallnorb:2.*.*", "train[:800]", "test[:200]", "test[50%:]")
_RETINOPATHY = "diabetic_retinopathy_detection/btgraham-300:3.*.*"
_OWN = ("train[:800]", "validation[:200]")

TASKS: dict[str, Task] = {
    # natural
    "caltech101": Task("caltech101:3.*.*", "train[:800]", "train[2754:2954]"),
    "cifar100": Task("cifar100:3.*.*", "train[:800]", "train[45000:45200]"),
    "dtd": Task("dtd:3.*.*", *_OWN),
    "oxford_flowers102": Task("oxford_flowers102:2.*.*", *_OWN),
    "oxford_iiit_pet": Task("oxford_iiit_pet:3.*.*", "train[:800]", "train[2944:3144]"),
    "sun397": Task("sun397/tfds:4.*.*", *_OWN),
    "svhn": Task("svhn_cropped:3.*.*", "train[:800]", "train[65931:66131]"),
    # specialized
    "diabetic_retinopathy": Task(_RETINOPATHY, *_OWN),
    "eurosat": Task("eurosat/rgb:2.*.*", "train[:800]", "train[16200:16400]", "train[21600:]"),
    "patch_camelyon": Task("patch_camelyon:2.*.*", *_OWN),
    "resisc45": Task("resisc45:3.*.*", "train[:800]", "train[18900:19100]", "train[25200:]"),
    # structured
    "clevr_count": Task(*_CLEVR, lambda record: len(record["objects"]["size"]) - 3, 8),
    "clevr_distance": Task(*_CLEVR, _clevr_distance, 6),
    "dmlab": Task("dmlab:2.*.*", *_OWN),
    "dsprites_location": Task(*_DSPRITES, _bucket("label_x_position", 32, 16), 16, scale=255),
    "dsprites_orientation": Task(*_DSPRITES, _bucket("label_orientation", 40, 16), 16, scale=255),
    "kitti_distance": Task("kitti:3.*.*", *_OWN, "test", _kitti_distance, 4),
    "smallnorb_azimuth": Task(*_SMALLNORB, _bucket("label_azimuth", 18, 18), 18),
    "smallnorb_elevation": Task(*_SMALLNORB, _bucket("label_elevation", 9, 9), 9),
}


@dataclasses.dataclass(frozen=True)
class _Brighter(Sequence):
    """Records whose pixels are multiplied by `scale`."""

    records: Sequence[Mapping[str, Any]]
    scale: int

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.records[index]
        pixels = decode_image(record["image"]) * np.uint8(self.scale)
        return {"image": pixels, "label": record["label"]}

    def listed(self, start: int, stop: int) -> Iterator[bytes]:
        return listed(self.records, start, stop)


def open_vtab(name: str, data_dir: str | None) -> Listing:
    """Opens the splits `train`, `dev` and `test` of a task.

    Raises ValueError for an unknown task, and whatever `open_array_records` raises.
    """
    task = TASKS.get(name.removeprefix(PREFIX))
    if task is None:
        raise unknown("VTAB task", name.removeprefix(PREFIX), TASKS)
    whole = open_array_records(
        task.dataset, data_dir, label=task.label, num_classes=task.num_classes
    )
    sizes = {split: len(records) for split, records in whole.splits.items()}
    parts = {}
    for part in ("train", "dev", "test"):
        records = read_split(
            getattr(task, part), sizes, name, lambda s, a, b: Slice(whole.splits[s], a, b)
        )
        parts[part] = _Brighter(records, task.scale) if task.scale != 1 else records
    return Listing("VTAB-1k task", parts, whole.num_classes, whole.class_names)
