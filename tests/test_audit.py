"""The audit before training, and how splits are cut, with folders full of faults."""

import csv
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from vit_jax.classifier import audit
from vit_jax.classifier.audit import look_at
from vit_jax.classifier.splits import SplitConfig, settle_splits
from vit_jax.data.sources import Source, open_source


def paint(path, number):
    """Writes an image that depends on the number alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (6, 4 + number % 3, 3), np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def folder(tmp_path):
    """Three classes of 40, 20 and 3 images."""
    number = 0
    for name, count in (("ant", 40), ("bee", 20), ("cat", 3)):
        for i in range(count):
            paint(tmp_path / "images" / name / f"{i:02}.png", number)
            number += 1
    return tmp_path / "images"


def settle(folder, **config):
    return settle_splits(str(folder), SplitConfig(**config), None, folder.parent / "run" / "data")


def table(folder):
    with (folder.parent / "run" / "data" / "splits.csv").open() as file:
        return {row["path"]: (row["label"], row["split"]) for row in csv.DictReader(file)}


def test_everything_is_noticed(folder):
    shutil.copy(folder / "ant/00.png", folder / "ant/again.png")
    shutil.copy(folder / "ant/01.png", folder / "bee/taken.png")
    (folder / "bee/03.png").write_bytes((folder / "bee/03.png").read_bytes()[:60])
    (folder / "bee/text.png").write_text("this is no image")
    (folder / "bee/notes.txt").write_text("nor is this")
    splits, seen = settle(folder)
    assert seen.class_names == ("ant", "bee", "cat")
    assert {image["file"] for image in seen.broken} == {"bee/03.png", "bee/text.png"}
    text = str(seen)
    assert "bee/03.png" in text and "in several classes, the same to the pixel, 1" in text
    assert "ant/01.png (ant) = bee/taken.png (bee)" in text
    assert "ant/00.png = ant/again.png" in text
    assert "not images by name, or in no class, 1: bee/notes.txt" in text
    assert "classes with fewer than 10 images in train, 1: cat (3)" in text
    assert "imbalanced: 41 images of ant, 3 of cat" in text
    assert seen.sizes == {"width": [4, 5, 6], "height": [6, 6, 6]}

    rows = table(folder)
    assert len(rows) == 64 and not any("03.png" in p and "bee" in p for p in rows)
    part = {path.split("images/")[1]: split for path, (_, split) in rows.items()}
    assert part["ant/00.png"] == part["ant/again.png"]
    assert part["ant/01.png"] == part["bee/taken.png"]
    sizes = {name: sum(seen.counts[name]) for name in ("train", "dev", "test")}
    assert sizes["train"] > sizes["test"] > sizes["dev"] and all(map(min, seen.counts.values()))
    source = open_source(splits.dataset, splits.dev)
    assert len(source) == sizes["dev"] and source.class_names == ("ant", "bee", "cat")
    both = open_source(splits.dataset, f"{splits.train}+{splits.dev}")
    assert len(both) == sizes["train"] + sizes["dev"]


def test_splits_are_seeded_kept_and_watched(folder):
    first = settle(folder)
    before = table(folder)
    assert settle(folder) == first
    with pytest.raises(ValueError, match=r"seed: 0 then, 1 now"):
        settle(folder, seed=1)
    (folder / "bee").rename(folder / "wasp")
    with pytest.raises(ValueError, match="classes gone: bee; new: wasp"):
        settle(folder)
    (folder / "wasp").rename(folder / "bee")
    paint(folder / "ant/new.png", 999)
    with pytest.raises(ValueError, match="images: 63 then, 64 now"):
        settle(folder)
    (folder / "ant/new.png").unlink()
    shutil.rmtree(folder.parent / "run")
    settle(folder)
    assert table(folder) == before
    shutil.rmtree(folder.parent / "run")
    settle(folder, seed=1)
    assert table(folder) != before


def test_splits_that_are_there_are_used(tmp_path):
    for i in range(30):
        paint(tmp_path / f"images/train/{'ab'[i % 2]}/{i}.png", i)
    for i in range(10):
        paint(tmp_path / f"images/test/{'ab'[i % 2]}/{i}.png", 100 + i)
    paint(tmp_path / "images/test/a/same.png", 4)
    _, seen = settle(tmp_path / "images")
    assert [sum(seen.counts[name]) for name in ("train", "dev", "test")] == [28, 2, 11]
    assert "in several splits, so that accuracy is overstated, 1: train" in str(seen)
    assert all(s == "test" for p, (_, s) in table(tmp_path / "images").items() if "/test/" in p)


def test_names_of_folders_survive_the_cut(tmp_path):
    """Also names that have a special meaning in a table, a list or a terminal."""
    names = (" ant", "be\u2028e", "caf\udce9", "7", 'qu"ote', "=1")
    for i in range(12 * len(names)):
        paint(tmp_path / "images/training_set" / names[i % len(names)] / f"{i}\x85.png", i)
    splits, seen = settle(tmp_path / "images")
    source = open_source(splits.dataset, "train+dev+test")
    assert source.class_names == tuple(sorted(names)) and len(source) == 72
    for i in range(len(source)):
        folder = source.name(i).split("/")[-2]
        assert source.class_names[source[i]["label"]] == folder
    assert "classes with fewer than 10 images left in train after the cut, 6:  ant (8)" in str(seen)
    assert settle(tmp_path / "images")[1] == seen


def test_exif_is_spoken_of(folder):
    """Images that a viewer would turn, and damaged EXIF data, are counted and named."""
    image = Image.open(folder / "ant/00.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, data in (
        ("turned", exif.tobytes()),
        ("damaged", exif.tobytes()[:16]),
        ("upright", Image.Exif().tobytes()),
    ):
        image.save(folder / f"ant/{name}.jpg", exif=data)
    text = str(settle(folder)[1])
    assert "data.preprocess likewise), 1: ant/turned.jpg\n" in text + "\n"
    assert "damaged EXIF data, which are ignored, 1: ant/damaged.jpg\n" in text + "\n"


def test_a_split_is_found_by_any_of_its_names(tmp_path):
    rows = [f"{i}.png,{'ab'[i % 2]},{('training', 'val', 'Test')[i % 3]}" for i in range(60)]
    for i in range(60):
        paint(tmp_path / f"{i}.png", i)
    (tmp_path / "t.csv").write_text("path,label,split\n" + "\n".join(rows))
    _, seen = settle_splits(str(tmp_path / "t.csv"), SplitConfig(), None, tmp_path / "data")
    assert [sum(seen.counts[name]) for name in ("train", "dev", "test")] == [20, 20, 20]


def test_other_datasets_are_cut_at_the_end(tmp_path):
    splits, seen = settle_splits("digits", SplitConfig(), None, tmp_path)
    assert (splits.train, splits.dev, splits.test) == ("train[:90%]", "train[90%:]", "test")
    assert [sum(seen.counts[name]) for name in seen.counts] == [1078, 120, 599]
    assert json.loads((tmp_path / "audit.json").read_text())["splits"]["dataset"] == "digits"
    with pytest.raises(ValueError, match="the split to choose on"):
        settle_splits("digits", SplitConfig(train="train[:50%]"), None, tmp_path / "other")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["a/1.png", "a/2.png"], "there is one class, a: expected two or more"),
        (["a/1.png", "a/2.png", "a/3.png", "b/4.png"], "b has 1 images: expected at least 3"),
        (
            ["train/a/1.png", "train/b/2.png", "test/c/3.png"],
            "test has classes that .*train hasn't: c",
        ),
    ],
)
def test_what_cannot_be_trained_on(tmp_path, files, message):
    for i, file in enumerate(files):
        paint(tmp_path / "images" / file, i)
    with pytest.raises(ValueError, match=message):
        settle(tmp_path / "images")
    assert not (tmp_path / "run/data/audit.json").exists()


def test_a_class_of_broken_images_alone(folder):
    for file in (folder / "cat").iterdir():
        file.write_text("nothing")
    with pytest.raises(ValueError, match=r"train has no readable image of cat.*cat/0"):
        settle(folder)


def test_large_sets_are_looked_at_in_part(monkeypatch):
    monkeypatch.setattr(audit, "MOST", 10)
    images = np.random.default_rng(0).integers(0, 256, (25, 2, 2, 3), np.uint8)
    records = [{"image": image, "label": i % 2} for i, image in enumerate(images)]
    seen = look_at({"train": Source(records, 2)})
    assert seen.looked_at == {"train": 10} and "10 of 25 images of train were checked" in str(seen)
