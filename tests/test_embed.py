"""Embeddings of files: the model's features whatever the format, and hostile names as they are."""

import csv
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from processes import commands

from vit_jax.classifier.embeddings import opened_embeddings
from vit_jax.weights.trained import TrainedModel

NAMES = ["=1+1.png", "caf\udce9.png", "bé\u202e.png", "d e.png", "f.png"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for name in NAMES:
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(folder / name)
    (folder / "broken.jpg").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def trained(model, params):
    return TrainedModel(model, params)


@pytest.fixture(scope="module")
def expected(trained, photos):
    pixels = np.stack([trained.preprocess(photos / name) for name in NAMES])
    return dict(zip(NAMES, trained.features(pixels), strict=True))


def embedded(trained, output, files, batch_size=2):
    with opened_embeddings(output) as write:
        return write(trained, files, batch_size)


def check(rows, expected, atol=1e-6):
    assert {os.path.basename(file) for file in rows} == {*expected}
    for file, features in rows.items():
        found = np.asarray(features, np.float32)
        np.testing.assert_allclose(found, expected[os.path.basename(file)], atol=atol)


def test_npz(trained, photos, expected, tmp_path):
    files = sorted(photos.iterdir())
    unreadable = embedded(trained, tmp_path / "new" / "a.npz", files)
    with np.load(tmp_path / "new" / "a.npz") as found:
        assert found["features"].dtype == np.float32
        check(dict(zip(found["files"].tolist(), found["features"], strict=True)), expected)
        assert found["unreadable"].tolist() == [str(photos / "broken.jpg")]
        assert found["errors"].tolist() == [unreadable[0]["error"]]
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a.npz"]


def test_parquet(trained, photos, expected, tmp_path, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr("vit_jax.classifier.embeddings._GROUP", 4)
    for files in (sorted(photos.iterdir()), [photos / "f.png", photos / "broken.jpg"]):
        embedded(trained, tmp_path / "a.parquet", files)
        rows = parquet.read_table(tmp_path / "a.parquet").to_pylist()
        assert [os.fsencode(row["file"]) for row in rows] == [os.fsencode(f) for f in files]
        good = {os.fsdecode(r["file"]): r["features"] for r in rows if r["error"] is None}
        check(good, {file.name: expected[file.name] for file in files if file.suffix == ".png"})
        (bad,) = [row for row in rows if row["features"] is None]
        assert "cannot decode" in bad["error"]
    assert isinstance(rows[0]["file"], str)  # all of them are UTF-8


def test_the_file_is_whole_or_as_it_was(trained, photos, tmp_path, monkeypatch):
    output = tmp_path / "a.csv"
    output.write_text("before")
    with pytest.raises(KeyboardInterrupt), opened_embeddings(output) as write:
        write(trained, [photos / "f.png"], 1)
        raise KeyboardInterrupt
    assert output.read_text() == "before" and [*tmp_path.iterdir()] == [output]
    (tmp_path / "file").touch()
    for path, error, text in (
        ("a.json", ValueError, r"unknown ending .* '.json': .*Known: .csv, .npz, .parquet"),
        ("a", ValueError, "unknown ending"),
        ("file/a.npz", OSError, "file"),
    ):
        with pytest.raises(error, match=text), opened_embeddings(tmp_path / path):
            pytest.fail("opened")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    missing = pytest.raises(ValueError, match="pip install pyarrow")
    with missing, opened_embeddings(tmp_path / "a.parquet"):
        pytest.fail("opened")


def test_command(model, params, photos, expected, tmp_path):
    TrainedModel(model, params).save(tmp_path / "model")
    empty = tmp_path / "empty"
    empty.mkdir()
    checkpoint = f"--checkpoint={tmp_path / 'model'}"
    output = tmp_path / "features.csv"
    cases = [
        ("embed", photos, checkpoint, f"--output={output}", "--batch_size=4"),
        ("embed", photos, checkpoint),
        ("embed", empty, checkpoint, f"--output={tmp_path / 'no.csv'}"),
        ("embed", photos / "broken.jpg", checkpoint, f"--output={tmp_path / 'no.csv'}"),
        ("embed", photos, f"--checkpoint={empty}", f"--output={tmp_path / 'no.csv'}"),
    ]
    done = commands(tmp_path, cases)
    assert [code for code, *_ in done] == [0, 1, 1, 1, 1], done
    assert not any("Traceback" in err for *_, err in done)
    assert "1 of 6 files can't be read" in done[0][2] and "5 embeddings in" in done[0][1]
    said = ("--output is missing", "no images", "no file could be read", "no checkpoint at")
    for text, (*_, err) in zip(said, done[1:], strict=True):
        assert text in err
    assert not Path(tmp_path / "no.csv").exists()
    with output.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        rows = {r.pop("file"): r for r in csv.DictReader(file)}
    assert rows.pop(str(photos / "broken.jpg"))["error"]
    check({f: [v for k, v in row.items() if k != "error"] for f, row in rows.items()}, expected)
