"""The 19 tasks: labels as the benchmark's code derives them, and disjoint splits."""

from collections.abc import Sequence

import numpy as np
import pytest

from vit_jax.data import sources, vtab
from vit_jax.data.listing import Listing
from vit_jax.data.vtab import TASKS


def test_there_are_19():
    assert len(TASKS) == 19
    assert sum(task.label is not None for task in TASKS.values()) == 7


@pytest.mark.parametrize(
    ("types", "depths", "expected"),
    [([0], [1], 0), ([0], [10], 1), ([0], [30], 2), ([4], [30], 3), ([0, 1], [30, 1], 0)],
)
def test_distance_to_the_closest_vehicle(types, depths, expected):
    record = {"objects": {"type": types, "location": [[0, 0, z] for z in depths]}}
    assert TASKS["kitti_distance"].label(record) == expected
    assert TASKS["kitti_distance"].label({"objects": {"type": [], "location": []}}) == 3


def test_other_derived_labels():
    coordinates = [[1, 2, 9.2], [3, 4, 8.7]]
    record = {"objects": {"pixel_coords": coordinates, "size": [0] * 5}}
    assert TASKS["clevr_distance"].label(record) == 2
    assert TASKS["clevr_count"].label(record) == 2
    for name, feature, most in (
        ("dsprites_location", "label_x_position", 31),
        ("dsprites_orientation", "label_orientation", 39),
        ("smallnorb_azimuth", "label_azimuth", 17),
        ("smallnorb_elevation", "label_elevation", 8),
    ):
        task = TASKS[name]
        found = [task.label({feature: value}) for value in range(most + 1)]
        assert found == sorted(found) and (found[0], found[-1]) == (0, task.num_classes - 1)


class Fake(Sequence):
    """Examples that hold their own split and index."""

    def __init__(self, split, size):
        self.split, self.size = split, size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return {"image": np.eye(4, dtype=np.uint8), "label": (self.split, index)}


def test_parts(monkeypatch):
    """800 and 200 examples, none in two splits; dSprites' 0 and 1 become black and white."""
    sizes = {
        **{"cifar100": {"train": 50_000, "test": 10_000}, "dsprites": {"train": 737_280}},
        **{"smallnorb": {"train": 24_300, "test": 24_300}},
        "dtd": {"train": 1_880, "validation": 1_880, "test": 1_880},
    }

    def open_array_records(dataset, data_dir, label=None, num_classes=None):
        splits = {
            split: Fake(split, size) for split, size in sizes[dataset.partition(":")[0]].items()
        }
        return Listing("TFDS dataset", splits, num_classes or 100)

    monkeypatch.setattr(vtab, "open_array_records", open_array_records)
    for name in ("cifar100", "dsprites_location", "smallnorb_azimuth", "dtd"):
        listing = sources.open_listing(f"vtab/{name}")
        assert len(listing.splits["train"]) == 800 and len(listing.splits["dev"]) == 200
        ends = [{part[i]["label"] for i in (0, len(part) - 1)} for part in listing.splits.values()]
        assert len(set.union(*ends)) == 6
    dsprites = sources.open_source("vtab/dsprites_location", "train+dev")
    assert len(dsprites) == 1000 and dsprites.num_classes == 16
    assert set(np.unique(dsprites[999]["image"])) == {0, 255}
    with pytest.raises(ValueError, match="unknown VTAB task 'cifar10': did you mean 'cifar100'"):
        sources.open_source("vtab/cifar10", "train")
