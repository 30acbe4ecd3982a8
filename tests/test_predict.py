"""Labels for files: broken files are listed, batches don't matter, class names are kept."""

import csv
import io
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from processes import command

from vit_jax.classifier import labels
from vit_jax.config import printable
from vit_jax.data.listing import find_images
from vit_jax.weights.trained import TrainedModel

NAMES = ["ant", "bee, wasp", *"cdefghij"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Five images, one of them grey and large, and two files that only look like images."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(4):
        image = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
        image.save(folder / f"{i}.png")
    Image.fromarray(rng.integers(0, 256, (40, 30), np.uint8)).save(folder / "grey.png")
    (folder / "broken.jpg").write_bytes((folder / "0.png").read_bytes()[:100])
    (folder / "text.png").write_text("no image")
    (folder / "notes.txt").write_text("not even by its name")
    return folder


def test_batches_do_not_matter(model, params, folder):
    files = find_images([folder])
    names = ["0.png", "1.png", "2.png", "3.png", "broken.jpg", "grey.png", "text.png"]
    assert [file.name for file in files] == names
    trained = TrainedModel(model, params)
    whole, split = (
        {Path(p.image): p.error or p.probabilities for p in trained.predict(files, batch_size=n)}
        for n in (8, 2)
    )
    assert list(whole) == files
    for file in files:
        if file.name in ("broken.jpg", "text.png"):
            assert "cannot decode" in whole[file] and whole[file] == split[file]
        else:
            np.testing.assert_allclose(whole[file], split[file], atol=1e-6)
    pixels = np.asarray(Image.open(folder / "0.png"))[None]
    expected = jax.nn.softmax(model.apply(params, pixels).logits)[0]
    np.testing.assert_allclose(whole[folder / "0.png"], expected, atol=1e-5)


def test_command(model, params, folder, tmp_path):
    """JSON, CSV and the table say the same; a missing file is listed, too."""
    description = {**model.description, "class_names": NAMES, "preprocess": "resize"}
    TrainedModel.from_description(params, description).save(tmp_path / "model")
    arguments = ("predict", f"--model={tmp_path / 'model'}", folder, tmp_path / "missing.png")
    code, out, err = command(*arguments, "--format=json", "--top=2")
    assert code == 0, err
    found = json.loads(out)
    labels = {row["file"]: row["labels"] for row in found["images"]}
    assert len(labels) == 5 and all(len(row) == 2 for row in labels.values())
    assert {name for row in labels.values() for name, _ in row} <= {*NAMES}
    assert len(found["unreadable"]) == 3 and "3 of 8 files can't be read" in err
    assert "missing.png" in err and "Traceback" not in err

    output = tmp_path / "new" / "labels.csv"
    code, _, err = command(*arguments, "--format=csv", f"--output={output}", "--batch_size=3")
    assert code == 0, err
    rows = {row["file"]: row for row in csv.DictReader(output.open())}
    for file, [(name, probability), *_] in labels.items():
        assert rows[file]["label"] == name
        assert float(rows[file]["probability"]) == pytest.approx(probability, abs=1e-5)
    assert rows[str(folder / "broken.jpg")]["error"] and len(rows) == 8


def test_names_are_text(tmp_path):
    """Names of files and classes are neither formulas nor escape codes, and none is lost."""
    files = ["caf\udce9.png", "b\x1b[1m.png", "c\u202ed.png", "-d.png"]
    rows = [{"file": file, "labels": [["=1+1", 0.5], ["\x1b[31mred", 0.2]]} for file in files]
    rows.append({"file": "@e", "error": "broken"})

    written = {}
    for kind, writer in labels.WRITERS.items():
        with labels.opened_output(tmp_path / kind / "labels") as write:
            for text in writer(iter(rows), [Path(row["file"]) for row in rows], 2):
                write(text)
                assert not set(printable(text)) & {"\x1b", "\u202e", "\udce9"}
        written[kind] = (tmp_path / kind / "labels").read_bytes().decode(errors="surrogateescape")
    found = list(csv.DictReader(io.StringIO(written["csv"])))
    assert [row["file"] for row in found] == [*files[:3], "'-d.png", "'@e"]
    assert found[0]["label"] == "'=1+1" and found[0]["label_2"] == "\x1b[31mred"
    assert found[4]["error"] == "broken" and not found[4]["label"]
    found = json.loads(written["json"])
    assert [*found["images"], *found["unreadable"]] == rows
    assert "b\\u001b[1m.png  =1+1  50.0%  \\u001b[31mred  20.0%\n" in written["table"]


def test_nothing_to_read(tmp_path):
    code, _, err = command("predict", f"--model={tmp_path}", tmp_path)
    assert code == 1 and "no images: name files" in err
