"""Image folders and tables of images, read straight."""

import json
import logging
import os
import pickle

import pytest
from test_sources import picture, png

from vit_jax.data import tables
from vit_jax.data.decode import decode_image
from vit_jax.data.foreign_files import read_file
from vit_jax.data.listing import find_images
from vit_jax.data.pipeline import DataConfig, eval_batches
from vit_jax.data.sources import open_source


def fill(root, *names):
    """Writes image i as the i-th file."""
    for i, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(picture(i)).getvalue())
    return str(root)


def contents(source):
    """Returns (class name, number of the picture) of each example."""
    numbers = {picture(i).tobytes(): i for i in range(30)}
    return [
        (
            source.class_names[record["label"]],
            numbers[decode_image(record["image"]).tobytes()],
        )
        for record in (source[i] for i in range(len(source)))
    ]


def test_classes_and_paths_are_sorted(tmp_path):
    path = fill(tmp_path, "dog/b.PNG", "dog/a.png", "cat/x/1.png", "cat/m.png", "cat/z.png")
    source = open_source(path, "train")
    assert contents(source) == [("cat", 3), ("cat", 2), ("cat", 4), ("dog", 1), ("dog", 0)]
    assert source.describe(1) == "example 1 (cat/x/1.png)"
    assert source.num_classes == 2 and source.labels_per_example is None
    joined = open_source(path, "train[3:]+train[:40%]")
    assert contents(joined) == [("dog", 1), ("dog", 0), ("cat", 3), ("cat", 2)]
    assert joined.describe(2) == "example 2 (cat/m.png)"
    assert contents(pickle.loads(pickle.dumps(joined))) == contents(joined)


@pytest.mark.parametrize("folder", ["val", "valid", "validation", "dev"])
def test_splits(tmp_path, folder):
    path = fill(tmp_path, "train/a/0.png", "train/b/1.png", f"{folder}/b/2.png", "Test/a/3.png")
    assert contents(open_source(path, "train")) == [("a", 0), ("b", 1)]
    assert contents(open_source(path, "validation")) == [("b", 2)]  # class b is 1 here too
    assert contents(open_source(path, "test")) == [("a", 3)]
    with pytest.raises(ValueError, match=r"unknown split.*Known: .*validation"):
        open_source(path, "val")


def test_a_class_may_have_the_name_of_a_split(tmp_path):
    path = fill(tmp_path, "train/0.png", "tram/1.png")
    assert contents(open_source(path, "train")) == [("train", 0), ("tram", 1)]


def test_litter_links_and_names_of_any_script(tmp_path, caplog, monkeypatch):
    names = ("Katze/Größe 1.png", "犬/写真.png", "犬/.hidden.png", ".git/x.png", "__MACOSX/y.png")
    path = fill(tmp_path / "set", *names)
    for name in ("readme.txt", "犬/Thumbs.db", "犬/notes.md", "犬/.DS_Store"):
        (tmp_path / "set" / name).write_text("no image")
    fill(tmp_path / "elsewhere", "2.png", "deeper/3.png")
    (tmp_path / "set" / "linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    with caplog.at_level(logging.WARNING):
        source = open_source(path, "train")
    assert contents(source) == [
        ("Katze", 0),
        ("linked", 0),
        ("linked", 1),
        ("犬", 1),
    ]
    assert "2 files are not images" in caplog.text
    assert "readme.txt, 犬/notes.md" in caplog.text
    monkeypatch.chdir(tmp_path)
    assert contents(open_source("./set", "train")) == contents(source)
    assert contents(open_source("set", "train")) == contents(source)  # it exists: it is a path


@pytest.mark.parametrize(
    ("train", "test"),
    [("training_set", "test_set"), ("TRAIN", "Test"), ("train2017", "test-images"), ("t", "u")],
)
def test_names_of_splits(tmp_path, train, test):
    path = fill(tmp_path, f"{train}/a/0.png", f"{train}/b/1.png", f"{test}/b/2.png")
    if train == "t":
        assert open_source(path, "train").class_names == ("t", "u")
    else:
        assert contents(open_source(path, "train")) == [("a", 0), ("b", 1)]
        assert contents(open_source(path, "test")) == [("b", 2)]


def test_what_is_passed_over_is_counted_by_reason(tmp_path, caplog):
    litter = (".DS_Store", "._1.jpg", "@eaDir/1.png/t.jpg", ".ipynb_checkpoints/1.png")
    path = fill(tmp_path, "a/1.png", "b/2.png", *(f"a/{name}" for name in litter))
    for name in ("a/x.HEIC", "a/y.nef", "$RECYCLE.BIN/3.jpg", "b/old.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    os.mkfifo(tmp_path / "a/pipe.png")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "b/linked.png").symlink_to(tmp_path / "pipe")
    with caplog.at_level(logging.WARNING):
        source = open_source(path, "train")
        listed = find_images([tmp_path])
    assert contents(source) == [("a", 0), ("b", 1)]
    assert [str(file.relative_to(tmp_path)) for file in listed] == ["a/1.png", "b/2.png"]
    for text in (
        "5 files are hidden or system files",
        "1 files are HEIC photographs, which aren't read (convert",
        "1 files are cameras' raw files",
        "3 files are pipes, sockets or devices: pipe, a/pipe.png, b/linked.png",
        "1 files are not images by name, or in no class: b/old.tar",
    ):
        assert text in caplog.text
    with pytest.raises(ValueError, match=r"pipe.png is a named pipe: expected a file"):
        read_file(tmp_path / "a/pipe.png")


def test_one_spelling_of_a_class(tmp_path):
    path = fill(tmp_path, "train/café/0.png", "test/cafe\u0301/1.png")  # as Linux and as a Mac
    assert contents(open_source(path, "test")) == [("café", 1)]
    with pytest.raises(ValueError, match="two Unicode spellings"):
        open_source(fill(tmp_path, "train/cafe\u0301/2.png"), "test")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "holds no folders: expected images as class/name.jpg"),
        (["a.png"], "holds no folders: expected images as class/name.jpg"),
        (["a/0.png", "b/readme.txt"], "/b holds no images: expected .jpg"),
        (["train/a/0.png", "val/b/1.png"], "val has classes that .*/train hasn't: b"),
        (["train/a/0.png", "extra/b/1.png"], "expected either classes, or one folder per split"),
        (["val/a/0.png", "dev/a/1.png"], "one folder per split"),
        (["train/a/0.png", "val/1.png"], "val holds no class folders"),
        (["train/0.png", "test/1.png"], r"test holds no class folders \(1 images lie in it\)"),
        (["set/a/0.png", "set/b/1.png"], "holds one folder, set, which holds the folders a, b"),
        (["train/x/a/0.png", "train/x/b/1.png"], "train holds one folder, x"),
        (["a/0.png", "b\n/1.png"], "line break in its name: rename it"),
    ],
)
def test_folders_that_are_no_datasets(tmp_path, names, message):
    path = fill(tmp_path, *names)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        open_source(path, "train")


def test_links_that_lead_nowhere(tmp_path):
    path = fill(tmp_path / "set", "a/0.png")
    with pytest.raises(FileNotFoundError, match=r"there is no .*/sett"):
        open_source(path + "t", "train")
    with pytest.raises(ValueError, match=r"0.png is a file: expected a folder"):
        open_source(f"{path}/a/0.png", "train")
    link = tmp_path / "set" / "a" / "link"
    link.symlink_to(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"link is a link to .*/nothing, which isn't there"):
        open_source(path, "train")
    link.unlink()
    link.symlink_to(tmp_path / "set", target_is_directory=True)
    with pytest.raises(ValueError, match="link to a folder that contains it"):
        open_source(path, "train")


def test_a_broken_file_is_named(tmp_path):
    path = fill(tmp_path, "a/0.png", "a/1.png", "a/2.png")
    source = open_source(path, "train")
    data = DataConfig(path, preprocess="resize", num_threads=0)
    (tmp_path / "a" / "1.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"example 1 \(a/1.png\): .*0 bytes"):
        list(eval_batches(source, data, batch_size=2, image_size=(8, 8)))
    os.unlink(tmp_path / "a" / "1.png")
    with pytest.raises(ValueError, match=r"example 1 \(a/1.png\): cannot read it"):
        list(eval_batches(source, data, batch_size=2, image_size=(8, 8)))


def write_table(folder, name, rows):
    """Writes rows (dicts) as CSV, TSV or JSON Lines."""
    if name.endswith(".jsonl"):
        text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n"
    else:
        separator = "\t" if name.endswith(".tsv") else ","
        joined = [
            {k: "|".join(v) if isinstance(v, list) else str(v) for k, v in row.items()}
            for row in rows
        ]
        lines = [separator.join(rows[0]), *(separator.join(row.values()) for row in joined)]
        text = "\ufeff" + "\r\n".join(lines)  # as Excel writes it
    (folder / name).write_bytes(text.encode())
    return str(folder / name)


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.jsonl"])
def test_tables(tmp_path, name):
    fill(tmp_path, "x/0.png", "1.png", "é.png")
    rows = [
        {"path": "x/0.png", "label": "dog", "split": "train"},
        {"path": str(tmp_path / "1.png"), "label": "cat", "split": "holdout"},
        {"path": "é.png", "label": "cat", "split": "train"},
    ]
    path = write_table(tmp_path, name, rows)
    assert contents(open_source(path, "train")) == [("dog", 0), ("cat", 2)]
    assert contents(open_source(path, "holdout")) == [("cat", 1)]
    without = [{"path": row["path"], "label": row["label"]} for row in rows]
    path = write_table(tmp_path, name, without)
    assert contents(open_source(path, "train")) == [("dog", 0), ("cat", 1), ("cat", 2)]

    numbers = [row | {"label": i} for i, row in enumerate(without)]
    source = open_source(write_table(tmp_path, name, numbers), "train[1:]")
    assert [record["label"] for record in source] == [1, 2]
    assert (source.num_classes, source.class_names) == (3, None)
    (tmp_path / "classes.txt").write_text("zebra\n7\nant\n")
    source = open_source(path := write_table(tmp_path, name, numbers), "train")
    assert contents(source) == [("zebra", 0), ("7", 1), ("ant", 2)]

    several = [
        {"path": row["path"], "labels": ls}
        for row, ls in zip(rows, (["ant"], ["7", "zebra"], []), strict=True)
    ]
    source = open_source(write_table(tmp_path, name, several), "train")
    assert source.labels_per_example == 2
    assert [record["label"] for record in source] == [(2,), (1, 0), ()]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], r"begins with \[\]|line 1 has nothing"),
        ([{"file": "0.png", "label": "a"}], "expected .*path"),
        ([{"path": "0.png"}], "line [12] has path: expected values for path, label"),
        ([{"path": "0.png", "label": ""}], "line [12] has path: expected"),
        ([{"path": "2.png", "label": "a"}], "line [12]: there is no file .*2.png"),
        ([{"path": "0.png", "label": -1}], "line [12]: label '?-1'?: expected 0 <= label"),
        (
            [{"path": "0.png", "label": 1}, {"path": "1.png", "label": "a"}],
            "expected all of them to be numbers or all names",
        ),
        (
            [
                {"path": "0.png", "label": "a", "split": "train"},
                {"path": "./0.png", "label": "a", "split": "test"},
            ],
            r"line [23]: ./0.png is in test, and by line [12] in train: splits must not overlap",
        ),
    ],
)
@pytest.mark.parametrize("name", ["t.csv", "t.jsonl"])
def test_bad_tables(tmp_path, rows, message, name):
    fill(tmp_path, "0.png", "1.png")
    path = write_table(tmp_path, name, rows or [{}])
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        open_source(path, "train")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('0.png,"a\n1.png,b\n0.png,b\n', "line 3: .*stray quote"),
        ('0.png,"a\n1.png,b"\n0.png,b\n', "line 3: a value goes on in the next line"),
        ('0.png,"a" b\n', "line 3: .*expected after"),
        ("0.png,bee, wasp\n", "line 3: there are more values than columns"),
        ('0.png,"' + "x" * 140_000 + '"\n', "line 3: field larger than"),
    ],
)
def test_stray_quotes(tmp_path, text, message):
    fill(tmp_path, "0.png", "1.png")
    (tmp_path / "t.csv").write_text("path,label\n1.png,b\n" + text)
    with pytest.raises(ValueError, match=message):
        open_source(str(tmp_path / "t.csv"), "train")


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl"])
def test_splits_of_a_table_in_any_case(tmp_path, name):
    fill(tmp_path, "0.png", "1.png", "2.png")
    rows = [
        {"path": f"{i}.png", "label": "a", "split": split}
        for i, split in enumerate(("Train", "train ", "TEST"))
    ]
    path = write_table(tmp_path, name, rows)
    assert len(open_source(path, "train")) == len(open_source(path, "Train")) == 2
    assert len(open_source(path, "test")) == 1


def test_any_name_without_line_breaks_survives_a_table(tmp_path):
    hostile = (" cat", "cat ", "=1+1", "a,b", 'quote"', '"', "'", "7", "\u2028", "\x85x", "\x1c|")
    hostile += (
        "\x0b\x0c",
        "\ufeffa",
        "caf\udce9",
        "#",
        "None",
        "a\tb",
        "\\n",
        "-",
        "@x",
        "\x1b[31m",
    )
    fill(tmp_path, *(f"x{name}/0.png" for name in hostile))
    names = sorted(hostile)
    tables.write_class_names(tmp_path, names)
    rows = [(str(tmp_path / f"x{name}/0.png"), name, "train") for name in hostile]
    tables.write_table(tmp_path / "t.csv", rows)
    source = open_source(str(tmp_path / "t.csv"), "train")
    assert [source.class_names[record["label"]] for record in source] == list(hostile)
    assert list(source.records.records.paths) == [path for path, _, _ in rows]


def test_labels_beyond_the_classes(tmp_path):
    fill(tmp_path, "0.png")
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    path = write_table(tmp_path, "t.csv", [{"path": "0.png", "label": 2}])
    with pytest.raises(ValueError, match=r"t.csv, line 2: label 2: expected 0 <= label < 2"):
        open_source(path, "train")
    path = write_table(tmp_path, "t.csv", [{"path": "0.png", "label": "dgo"}])
    with pytest.raises(ValueError, match=r"t.csv, line 2: unknown class 'dgo': did you mean 'dog'"):
        open_source(path, "train")
    path = write_table(tmp_path, "t.jsonl", [{"path": "0.png", "labels": [1.5]}])
    with pytest.raises(ValueError, match=r"line 1: label 1.5: expected a class's name or number"):
        open_source(path, "train")
    path = write_table(tmp_path, "t.jsonl", [{"path": "0.png", "labels": 1}])
    with pytest.raises(ValueError, match=r"line 1: labels 1: expected a list"):
        open_source(path, "train")
    (tmp_path / "t.csv").write_bytes("path,label\n0.png,Größe".encode("latin1"))
    with pytest.raises(ValueError, match=r"t.csv is not UTF-8 text"):
        open_source(str(tmp_path / "t.csv"), "train")
    (tmp_path / "t.jsonl").write_text('{"path": "0.png", "label": 1}\n{"path": \n')
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        open_source(path, "train")
