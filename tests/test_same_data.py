"""Data that changed between starts, or that differ between hosts, are an error."""

import dataclasses
import json
import shutil

import pytest
from test_image_folder import fill, write_table
from test_loop import config
from test_sources import picture, png
from test_tars import write_tar

from vit_jax.config import build
from vit_jax.data.fingerprint import differences, fingerprint
from vit_jax.data.pipeline import DataConfig, open_data
from vit_jax.data.sources import open_path, open_source
from vit_jax.data.writer import WriteConfig, write_dataset
from vit_jax.training import loop

FILES = [f"{split}/{'ab'[i % 2]}/{i}.png" for split in ("train", "test") for i in range(6)]


def as_folder(root, files, classes):
    for i, file in enumerate(files):
        split, label, name = file.split("/")
        path = root / "set" / split / classes[label] / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(picture(i)).getvalue())
    return str(root / "set")


def as_table(root, files, classes):
    rows = []
    for file in files:
        split, label, _ = file.split("/")
        rows.append({"path": file, "label": classes[label], "split": split})
    fill(root, *files)
    return write_table(root, "t.jsonl", rows)


def as_tars(root, files, classes):
    for split in ("train", "test"):
        members = {}
        for i, file in enumerate(files):
            if file.startswith(split):
                members[f"{i}.png"] = png(picture(i)).getvalue()
                members[f"{i}.cls"] = classes[file.split("/")[1]].encode()
        root.mkdir(parents=True, exist_ok=True)
        write_tar(root / f"{split}-0.tar", members)
    return str(root)


def as_records(root, files, classes):
    listing = open_path(as_folder(root, files, classes))
    return str(write_dataset(listing, root / "out", "set", None, WriteConfig(shuffle=False)))


@pytest.mark.parametrize("make", [as_folder, as_table, as_tars, as_records])
def test_every_kind_of_source(make, tmp_path):
    """The same data in another folder have the same fingerprint; each change is named."""

    def seen(name, files=FILES, classes=None, split="train"):
        path = make(tmp_path / name, files, classes or {"a": "cat", "b": "dog"})
        return fingerprint(open_source(path, split))

    first = json.loads(json.dumps(seen("first")))
    assert differences(first, seen("again")) == []
    assert "6 examples then, 5 now" in " ".join(differences(first, seen("fewer", FILES[1:])))
    renamed = differences(first, seen("renamed", classes={"a": "zebra", "b": "dog"}))
    assert "classes gone: cat; new: zebra" in renamed
    swapped = differences(first, seen("swapped", classes={"a": "dog", "b": "cat"}))
    assert "images or labels changed" in swapped
    other_images = [*FILES[1:6], FILES[0], *FILES[6:]]
    assert "images or labels changed" in differences(first, seen("moved", other_images))
    part = seen("part", split="train[:4]")
    more = [*FILES[:6], "train/b/9.png", *FILES[6:]]
    if make is not as_folder:  # whose order is that of names, in classes
        assert part["sample"] == seen("longer", more, split="train[:4]")["sample"]


def test_embedded_sets_and_mixtures():
    def mixture(**changes):
        parts = {"one": {"dataset": "digits"}, "two": {"dataset": "strokes/10"}}
        parts["two"].update(changes)
        return fingerprint(open_data(build(DataConfig, {"mixture": parts})))

    assert differences(mixture(), mixture()) == []
    assert differences(mixture(), mixture(split="train[1:]"))[0].endswith("1,001,197 now")
    assert "part 1: images or labels changed" in differences(
        mixture(), mixture(split="train[5:]+train[:5]")
    )
    digits = open_source("digits", "test")
    names = tuple(reversed(digits.class_names))
    found = differences(
        fingerprint(digits), fingerprint(dataclasses.replace(digits, class_names=names))
    )
    assert found == ["classes are in another order"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("trained")
    as_folder(root, FILES, {"a": "cat", "b": "dog"})
    loop.train(prepare(root))
    return root


def prepare(root, **changes):
    dataset = str(root / "set")
    evaluation = {"data": {"dataset": changes.pop("test", dataset), "split": "test"}}
    values = {
        "data": {"dataset": dataset, "preprocess": "resize"},
        "evaluators": {"test": {**evaluation, "batch_size": 8}},
        "batch_size": 8,
        "steps": 2,
        **changes,
    }
    return loop.prepare(config(**values), str(root / "run"))


def add(root):
    shutil.copy(root / "set/train/cat/0.png", root / "set/train/cat/9.png")


def rename(root):
    for split in ("train", "test"):
        (root / "set" / split / "cat").rename(root / "set" / split / "zebra")


def repaint(root):
    (root / "set/test/dog/1.png").write_bytes(png(picture(20)).getvalue())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (add, "train: 6 examples then, 7 now"),
        (rename, "train: classes gone: cat; new: zebra"),
        (repaint, "test: test: images or labels changed"),
    ],
)
def test_a_start_with_other_data_is_refused(trained, tmp_path, change, message):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    values = json.loads((tmp_path / "run" / "config.json").read_text())
    text = json.dumps(values).replace(str(trained), str(tmp_path))
    (tmp_path / "run" / "config.json").write_text(text)
    data = (tmp_path / "run" / "data.json").read_text()
    (tmp_path / "run" / "data.json").write_text(data.replace(str(trained), str(tmp_path)))
    prepare(tmp_path)
    change(tmp_path)
    with pytest.raises(ValueError, match=message):
        prepare(tmp_path)
    (tmp_path / "run" / "data.json").unlink()  # as the run of an earlier version
    if change is not add:
        loop.train(prepare(tmp_path))
        assert (tmp_path / "run" / "data.json").exists()
        prepare(tmp_path)


def test_evaluators_with_other_class_numbers_are_refused(trained, tmp_path):
    other = as_folder(tmp_path, FILES, {"a": "dog", "b": "fox"})
    with pytest.raises(ValueError, match="0 is 'cat' there and 'dog' here"):
        prepare(trained, test=other)
