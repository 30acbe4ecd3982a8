"""Prepared datasets: what is written, killed and resumed, verified, and read by plain TFDS."""

import gzip
import json
import logging
import struct
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from processes import command
from test_image_folder import contents, fill, write_table
from test_sources import picture, png

from vit_jax.data import writer
from vit_jax.data.array_records import build_with_tfds
from vit_jax.data.decode import decode_image
from vit_jax.data.manifest import read_manifest, verify
from vit_jax.data.sources import open_path, open_source
from vit_jax.data.writer import WriteConfig, write_dataset

FOLDER = [f"train/{'ab'[i % 2]}/{i}.png" for i in range(10)] + ["test/a/10.png", "test/b/11.png"]


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_folder_is_read_back_by_us_and_by_tfds(tmp_path):
    path = fill(tmp_path / "in", *FOLDER)
    folder = write_dataset(open_path(path), tmp_path, "my_set", None, WriteConfig(shards=3))
    assert folder == tmp_path / "my_set" / "1.0.0"
    for split in ("train", "test"):
        expected, source = open_source(path, split), open_source("my_set", split, str(tmp_path))
        assert source.class_names == ("a", "b")
        assert sorted(contents(source)) == sorted(contents(expected))
        theirs = tfds.data_source("my_set", split=split, data_dir=str(tmp_path), download=False)
        for record, ours in zip(theirs, source, strict=True):
            np.testing.assert_array_equal(record["image"], decode_image(ours["image"]))
            assert record["label"] == ours["label"]
            file = record["file_name"].decode()
            assert (tmp_path / "in" / file).read_bytes() == ours["image"]
        assert source.describe(len(source) - 1).endswith(f", {file})")
    order = contents(open_source("my_set", "train", str(tmp_path)))
    assert order != contents(open_source(path, "train"))  # shuffled
    config = WriteConfig(shards=2, shuffle=False)
    write_dataset(open_path(path), tmp_path, "in_order", "2.1.0", config)
    unshuffled = open_source("in_order:2.1.0", "train", str(tmp_path))
    assert contents(unshuffled) == contents(open_source(path, "train"))


def test_multi_label(tmp_path):
    fill(tmp_path, "0.png", "1.png", "2.png")
    labels = [["b"], ["a", "c"], []]
    rows = [{"path": f"{i}.png", "labels": ls} for i, ls in enumerate(labels)]
    table = open_path(write_table(tmp_path, "t.jsonl", rows))
    write_dataset(table, tmp_path, "tags", None, WriteConfig(shuffle=False))
    source = open_source("tags", "train", str(tmp_path))
    assert source.class_names == ("a", "b", "c")
    assert [list(source[i]["label"]) for i in range(3)] == [[1], [0, 2], []]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("moment", ["checksum", "rename", "journal", "metadata", "manifest"])
def test_killed_at_any_moment_ends_with_the_same_bytes(tmp_path, monkeypatch, moment):
    listing = open_path(fill(tmp_path / "in", *FOLDER))
    config = WriteConfig(shards=3, threads=2)
    whole = write_dataset(listing, tmp_path / "whole", "x", None, config)

    def kill_at(call, owner, name):
        """Raises at call number `call` of the function."""
        original, calls = getattr(owner, name), iter(range(1, 100))

        def function(*args, **kwargs):
            if next(calls) == call:
                if moment == "journal":  # half a line was written
                    args[0]._file.write(b'{"file": "x-train')
                    args[0]._file.flush()
                raise Killed
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, function)

    targets = {
        "checksum": (2, writer, "file_sha256"),
        "rename": (4, writer.Path, "rename"),
        "journal": (3, writer.Journal, "_append"),
        "metadata": (1, writer, "_write_metadata"),
        "manifest": (6, writer.Path, "rename"),  # five shards, then the folder
    }
    kill_at(*targets[moment])
    with pytest.raises(Killed):
        write_dataset(listing, tmp_path / "killed", "x", None, config)
    monkeypatch.undo()
    assert not (tmp_path / "killed" / "x" / "1.0.0").exists()
    again = []
    write = writer._write_shard
    monkeypatch.setattr(writer, "_write_shard", lambda *a: (again.append(a[0].file), write(*a))[1])
    killed = write_dataset(listing, tmp_path / "killed", "x", None, config)
    assert len(again) == {"checksum": 4, "rename": 2, "journal": 4}.get(moment, 0)
    assert bytes_of(killed) == bytes_of(whole)
    assert list(verify(killed)) == []
    write_dataset(listing, tmp_path / "killed", "x", None, config)  # nothing is left to do
    assert len(again) <= 4


def test_another_input_does_not_mix_in(tmp_path, monkeypatch):
    path = fill(tmp_path / "in", *FOLDER)
    with monkeypatch.context() as patch:
        patch.delattr(writer, "_write_metadata")
        with pytest.raises(NameError):
            write_dataset(open_path(path), tmp_path, "x", None, WriteConfig())
    with pytest.raises(ValueError, match=r"begun from another input .*shards.*remove the folder"):
        write_dataset(open_path(path), tmp_path, "x", None, WriteConfig(shards=2))
    with (
        writer.Journal(tmp_path / "x" / "incomplete.1.0.0", read_plan(tmp_path)),
        pytest.raises(OSError, match="another process is writing"),
    ):
        write_dataset(open_path(path), tmp_path, "x", None, WriteConfig())
    write_dataset(open_path(path), tmp_path, "x", None, WriteConfig())
    fill(tmp_path / "in", "train/a/x.png")
    with pytest.raises(ValueError, match=r"1.0.0 is there already, and differs: splits"):
        write_dataset(open_path(path), tmp_path, "x", None, WriteConfig())


def read_plan(tmp_path):
    journal = tmp_path / "x" / "incomplete.1.0.0" / "journal.jsonl"
    return json.loads(journal.read_text().splitlines()[0])


def test_broken_images_are_reported(tmp_path, caplog):
    path = fill(tmp_path / "in", *FOLDER)
    (tmp_path / "in" / FOLDER[3]).write_bytes(b"")
    (tmp_path / "in" / FOLDER[7]).write_bytes(b"no image")
    for limit in (0, 1):
        with pytest.raises(ValueError, match=r"train/b/[37].png: (.|\n)*--max_broken=N"):
            write_dataset(open_path(path), tmp_path, "x", None, WriteConfig(max_broken=limit))
    with caplog.at_level(logging.WARNING):
        folder = write_dataset(open_path(path), tmp_path, "x", None, WriteConfig(max_broken=2))
    assert "left out train/b/3.png" in caplog.text and "left out train/b/7.png" in caplog.text
    report = {entry["file"]: entry["reason"] for entry in read_manifest(folder)["broken"]}
    assert report.keys() == {"train/b/3.png", "train/b/7.png"}
    assert "0 bytes" in report["train/b/3.png"] and "no image" in report["train/b/7.png"]
    assert len(open_source("x", "train", str(tmp_path))) == 8
    for file in (10, 11):
        (tmp_path / "in" / FOLDER[file]).write_bytes(b"")
    with pytest.raises(ValueError, match="no image of test can be read"):
        write_dataset(open_path(path), tmp_path, "y", None, WriteConfig(max_broken=9))


def test_splits_that_overlap_are_reported(tmp_path, caplog):
    path = fill(tmp_path / "in", *FOLDER)
    copy = (tmp_path / "in" / FOLDER[4]).read_bytes()
    (tmp_path / "in" / "test" / "b" / "copy.png").write_bytes(copy)
    (tmp_path / "in" / FOLDER[0]).write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"1 images are in two splits, such as .*test/b/copy.png"):
        write_dataset(open_path(path), tmp_path, "x", None, WriteConfig(max_broken=1))
    with caplog.at_level(logging.WARNING):
        config = WriteConfig(max_broken=1, max_overlap=1)
        folder = write_dataset(open_path(path), tmp_path, "x", None, config)
    assert read_manifest(folder)["overlaps"] == [
        {
            "splits": ["train", "test"],
            "images": 1,
            "named": [{"train": "train/a/4.png", "test": "test/b/copy.png"}],
        }
    ]
    assert "1 images are both in train and in test" in caplog.text


def test_verify_names_what_changed(tmp_path):
    listing = open_path(fill(tmp_path / "in", *FOLDER))
    folder = write_dataset(listing, tmp_path, "x", None, WriteConfig())
    (folder / "features.json").unlink()
    shard = folder / "x-train.array_record-00000-of-00001"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    (folder / "new").touch()
    problems = "\n".join(verify(folder))
    assert problems.count("\n") == 2
    for text in ("features.json is missing", "new is not in", f"{shard} has changed: sha256"):
        assert text in problems
    with pytest.raises(FileNotFoundError, match=r"holds no manifest.json"):
        list(verify(tmp_path))


@pytest.mark.parametrize(
    ("name", "version", "message"),
    [
        ("My set", None, "name 'My set': expected lower-case letters"),
        ("x", "1", "version '1': expected three numbers"),
        ("cifar10", None, "TFDS has a dataset cifar10 of its own"),
    ],
)
def test_names(tmp_path, name, version, message):
    listing = open_path(fill(tmp_path / "in", *FOLDER))
    with pytest.raises(ValueError, match=message):
        write_dataset(listing, tmp_path, name, version, WriteConfig())
    assert not (tmp_path / name).exists()


def test_a_tfds_dataset_is_built_as_array_record(tmp_path):
    class Registered(tfds.core.GeneratorBasedBuilder):
        """Needs no download."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "image": tfds.features.Image(),
                "label": tfds.features.ClassLabel(num_classes=2),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(4):
                yield i, {"image": png(picture(i)), "label": i % 2}

    build_with_tfds("registered", str(tmp_path))
    assert len(open_source("registered", "train", str(tmp_path))) == 4
    with pytest.raises(ValueError, match=r"TFDS knows no such dataset. For a path, write ./regis"):
        build_with_tfds("regis", str(tmp_path))
    with pytest.raises(ValueError, match="imagenet2012 must be fetched by hand"):
        build_with_tfds("imagenet2012", str(tmp_path))


def idx(values):
    header = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
    return header + values.astype(np.uint8).tobytes()


def write_idx(folder, compress=lambda data: data, ending=""):
    """Writes 20 training and 10 test images of 6 x 5 pixels."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    arrays = {}
    for prefix, n in (("train", 20), ("t10k", 10)):
        arrays[prefix] = rng.integers(256, size=(n, 6, 5)), np.arange(n) % 10
        for kind, values in zip(("images-idx3", "labels-idx1"), arrays[prefix], strict=True):
            file = folder / f"{prefix}-{kind}-ubyte{ending}"
            file.write_bytes(compress(idx(values)))
    return arrays


def test_idx_files_are_read_straight(tmp_path):
    arrays = write_idx(tmp_path / "in")
    read = open_source(f"{tmp_path}/in", "test[3:]")
    np.testing.assert_array_equal(read[0]["image"], arrays["t10k"][0][3])
    assert (read[0]["label"], read.num_classes) == (3, 10)
    assert read.describe(0) == "example 0 (t10k-images-idx3-ubyte:3)"


def test_fashion_mnist_by_the_command(tmp_path):
    """Prepares IDX files under TFDS's name of the dataset, so that tfds.builder(name) finds it."""
    arrays = write_idx(tmp_path / "fashion-mnist", gzip.compress, ".gz")
    arguments = (f"--input={tmp_path}/fashion-mnist", f"--output={tmp_path}")
    code, out, err = command("prepare", *arguments)
    assert code == 0, err
    assert f"{tmp_path}/fashion_mnist/3.0.1 is written" in out
    assert "IDX files, 10 classes" in err and "30/30" in err
    for split, prefix in (("train", "train"), ("test", "t10k")):
        theirs = tfds.builder("fashion_mnist", data_dir=str(tmp_path)).as_data_source(split=split)
        found = {record["image"].tobytes(): record["label"] for record in theirs}
        images, labels = arrays[prefix]
        assert found == {
            i.astype(np.uint8).tobytes(): n for i, n in zip(images, labels, strict=True)
        }
    ours = open_source("fashion_mnist", "train", str(tmp_path))
    assert len(ours) == 20 and decode_image(ours[0]["image"]).shape == (6, 5, 3)


DEBIAN = Path("/usr/share/datasets/fashion-mnist")


@pytest.mark.slow
@pytest.mark.skipif(not DEBIAN.exists(), reason="apt-get install dataset-fashion-mnist")
def test_all_of_fashion_mnist(tmp_path):
    write_dataset(open_path(str(DEBIAN)), tmp_path, "fashion_mnist", None, WriteConfig())
    for split, prefix, size in (("train", "train", 60_000), ("test", "t10k", 10_000)):
        arrays = []
        for kind, header in (("images-idx3", 16), ("labels-idx1", 8)):
            with gzip.open(DEBIAN / f"{prefix}-{kind}-ubyte.gz") as file:
                arrays.append(np.frombuffer(file.read(), np.uint8, offset=header))
        expected = zip(arrays[0].reshape(-1, 28 * 28), arrays[1], strict=True)
        theirs = tfds.data_source("fashion_mnist", split=split, data_dir=tmp_path, download=False)
        assert len(theirs) == size
        found = sorted((record["image"].tobytes(), record["label"]) for record in theirs)
        assert found == sorted((image.tobytes(), label) for image, label in expected)


def test_bad_idx_files(tmp_path):
    write_idx(tmp_path / "in")
    images, labels = (tmp_path / "in" / f"train-{k}-ubyte" for k in ("images-idx3", "labels-idx1"))
    whole = images.read_bytes()
    for data, message in (
        (whole[:-1], "has 615 bytes, its header promises 616"),
        (gzip.compress(whole)[:-20], "truncated or damaged"),
        (b"", "expected an IDX file of uint8 with 3 dimensions"),
        (labels.read_bytes(), "expected an IDX file of uint8 with 3 dimensions"),
        (idx(np.zeros((20, 0, 5))), "has images of 0 x 5 pixels"),
        (gzip.compress(whole[:16] + bytes(1 << 24)), "has 617 bytes|has 633 bytes"),
        (gzip.compress(whole[:4] + b"\xff" * 12), "expected up to"),
        (idx(np.zeros((3, 6, 5))), "has 3 images, .* 20 labels"),
    ):
        images.write_bytes(data)
        with pytest.raises(ValueError, match=message):
            open_source(f"{tmp_path}/in", "train")
    images.write_bytes(whole)
    (tmp_path / "in" / "classes.txt").write_text("a\nb\n")
    with pytest.raises(ValueError, match=r"has the label 9: expected less than 2"):
        open_source(f"{tmp_path}/in", "train")
    labels.unlink()
    with pytest.raises(FileNotFoundError, match="train-labels-idx1-ubyte"):
        open_source(f"{tmp_path}/in", "train")
