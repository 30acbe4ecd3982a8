"""Reading WebDataset's and ImageNet's tars without unpacking them."""

import io
import json
import pickle
import tarfile

import pytest
from test_image_folder import contents
from test_sources import picture, png

from vit_jax.data.sources import open_path, open_source
from vit_jax.data.writer import WriteConfig, write_dataset


def tar_bytes(files):
    """Makes a tar of {name: bytes} or pairs; a number stands for the picture with this number."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in files.items() if isinstance(files, dict) else files:
            content = png(picture(data)).getvalue() if isinstance(data, int) else data
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def write_tar(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_bytes(files))
    return path


def test_web_dataset(tmp_path):
    train = {"a/01.jpg": 0, "a/01.cls": b"2", "a/02.x.y.txt": b"", "a/02.png": 1, "a/02.cls": b"0"}
    write_tar(tmp_path / "set-train-000.tar", train | {"./b/.hidden": b""})
    write_tar(tmp_path / "set-train-001.tar", {"01.json": b'{"label": 1}', "01.JPG": 2})
    write_tar(tmp_path / "set-val-000.tar", {"1.png": 3, "1.cls": b"1\n"})
    source = open_source(str(tmp_path), "train")
    assert (source.num_classes, source.class_names) == (3, None)
    assert [record["label"] for record in source] == [2, 0, 1]
    assert source[2]["image"] == png(picture(2)).getvalue()
    assert source.describe(1) == "example 1 (set-train-000.tar:a/02.png)"
    assert pickle.loads(pickle.dumps(source))[1] == source[1]
    (tmp_path / "classes.txt").write_text("ant\nbee\ncat\n")
    assert contents(open_source(str(tmp_path), "validation")) == [("bee", 3)]
    assert contents(open_source(f"{tmp_path}/set-train-001.tar", "train")) == [("bee", 2)]


def test_web_dataset_in_folders_with_many_labels(tmp_path):
    labels = [["cat", "ant"], [], ["bee"]]
    samples = {}
    for i, names in enumerate(labels):
        samples |= {f"{i}.png": i, f"{i}.json": json.dumps({"labels": names}).encode()}
    write_tar(tmp_path / "train" / "0.tar", samples)
    write_tar(tmp_path / "test" / "0.tar", samples)
    source = open_source(str(tmp_path), "test")
    assert source.class_names == ("ant", "bee", "cat")
    assert [record["label"] for record in source] == [(2, 0), (), (1,)]
    assert source.labels_per_example == 2


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"0.png": 0}, "0.tar:0 has png: expected a .cls, or a .json"),
        ({"0.cls": b"1"}, "0.tar:0 has cls: expected one image"),
        ({"0.png": 0, "0.jpg": 1, "0.cls": b"1"}, "has png, jpg, cls: expected one image"),
        ({"0.png": 0, "0.json": b"[1]"}, "0.tar:0 has png, json: expected a .cls"),
        ({"0.png": 0, "0.json": b"{"}, "0.tar:0: its .json is malformed"),
        ({"0.png": 0, "0.cls": b"-1"}, "0.tar:0: label -1: expected 0 <= label"),
        ({"0.png": 0, "0.json": b'{"labels": 3}'}, "0.tar:0: labels 3: expected a list"),
        ({}, "no samples inside"),
        ({"0.cls": b"\xff", "0.png": 0}, "is not UTF-8 text"),
        ({"0.a.png": 0, "0.a.cls": b"1"}, "expected one image.*first dot"),
        ({"0.png": 0, "1.png": 1, "0.cls": b"1"}, "expected a .cls.*tar --sort=name"),
    ],
)
def test_bad_samples(tmp_path, files, message):
    write_tar(tmp_path / "0.tar", files)
    with pytest.raises(ValueError, match=message):
        open_source(str(tmp_path), "train")


def test_a_sample_that_comes_twice(tmp_path):
    twice = [("0.png", 0), ("0.cls", b"1"), ("0.png", 1), ("0.cls", b"0")]
    write_tar(tmp_path / "0.tar", twice)
    with pytest.raises(ValueError, match=r"0.tar:0 has two files .png: expected one"):
        open_source(str(tmp_path), "train")


def test_a_tar_among_class_folders_is_left_out(tmp_path):
    for i in range(2):
        (tmp_path / "ab"[i]).mkdir()
        (tmp_path / "ab"[i] / "x.png").write_bytes(png(picture(i)).getvalue())
    write_tar(tmp_path / "old.tar", {"0.png": 0, "0.cls": b"1"})
    write_tar(tmp_path / "a" / "old.tar", {"0.png": 0, "0.cls": b"1"})
    assert contents(open_source(str(tmp_path), "train")) == [("a", 0), ("b", 1)]


def test_damaged_tars(tmp_path):
    samples = {"0.png": 0, "0.cls": b"1", "1.png": 1, "1.cls": b"0"}
    path = write_tar(tmp_path / "0.tar", samples)
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-1]
    source = open_source(str(tmp_path), "train")
    for size, message in (
        (last.offset_data, "truncated|not a whole tar"),
        (last.offset, "lacks the end mark of a tar"),
        (last.offset + 100, "not a whole tar|lacks the end mark"),
        (1000, "truncated|not a whole tar"),
    ):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=f"{path}.*({message})"):
            open_source(str(tmp_path), "train")
    with pytest.raises(ValueError, match="ends inside it: truncated since"):
        source[1]
    path.write_bytes(whole + bytes(2 << 20))
    with pytest.raises(ValueError, match="after its end mark: joined tars"):
        open_source(str(tmp_path), "train")
    with tarfile.open(path, "w:gz") as tar:
        tar.add(__file__, "x.py")
    with pytest.raises(ValueError, match=r"if it is compressed, unpack it to a .tar"):
        open_source(str(tmp_path), "train")


def test_imagenet_1k(tmp_path):
    """As image-net.org ships it; class numbers and validation labels as TFDS has them."""
    inner = {
        "n01751748.tar": tar_bytes({"n01751748_2.JPEG": 0, "n01751748_10.JPEG": 1}),
        "n01440764.tar": tar_bytes({"n01440764_1.JPEG": 2}),
    }
    write_tar(tmp_path / "in" / "ILSVRC2012_img_train.tar", inner)
    validation = {f"ILSVRC2012_val_{i:08}.JPEG": 2 + i for i in (1, 2, 3)}
    write_tar(tmp_path / "in" / "ILSVRC2012_img_val.tar", validation)
    listing = open_path(f"{tmp_path}/in")
    assert listing.num_classes == 1000
    source = open_source(f"{tmp_path}/in", "train")
    assert contents(source) == [("n01440764", 2), ("n01751748", 1), ("n01751748", 0)]
    assert source[0]["label"] == 0
    assert contents(open_source(f"{tmp_path}/in", "validation")) == [
        ("n01751748", 3),
        ("n09193705", 4),
        ("n02105855", 5),
    ]
    folder = write_dataset(listing, tmp_path, "imagenet2012", None, WriteConfig())
    assert folder.name == "5.1.0"
    prepared = open_source("imagenet2012", "train", str(tmp_path))
    assert sorted(contents(prepared)) == sorted(contents(source))
    write_tar(tmp_path / "in" / "ILSVRC2012_img_val.tar", {"ILSVRC2012_val_00050001.JPEG": 1})
    with pytest.raises(ValueError, match=r"expected ILSVRC2012_val_00000001.JPEG to 00050000"):
        open_path(f"{tmp_path}/in")
    inner["n99999999.tar"] = inner["n01440764.tar"]
    write_tar(tmp_path / "in" / "ILSVRC2012_img_train.tar", inner)
    with pytest.raises(ValueError, match="n99999999 is not one of the 1000 classes"):
        open_path(f"{tmp_path}/in")


def test_imagenet_21k(tmp_path):
    """One tar per class, in a folder or in one tar."""
    classes = {
        "n00000002.tar": {"n00000002_1.JPEG": 0, "n00000002_2.JPEG": 1, "notes.txt": b""},
        "n00000001.tar": {"n00000001_7.JPEG": 2},
    }
    for name, files in classes.items():
        write_tar(tmp_path / "in" / name, files)
    inner = {f"winter/{name}": tar_bytes(files) for name, files in classes.items()}
    write_tar(tmp_path / "winter21_whole.tar", inner)
    expected = [("n00000001", 2), ("n00000002", 0), ("n00000002", 1)]
    for path in (tmp_path / "in", tmp_path / "winter21_whole.tar"):
        assert contents(open_source(str(path), "full")) == expected
    write_dataset(open_path(f"{tmp_path}/in"), tmp_path, "imagenet21k", None, WriteConfig())
    assert sorted(contents(open_source("imagenet21k", "full", str(tmp_path)))) == expected
    write_tar(tmp_path / "in" / "n00000003.tar", {})
    with pytest.raises(ValueError, match=r"n00000003.tar holds no images"):
        open_path(f"{tmp_path}/in")
    write_tar(tmp_path / "in" / "more.tar", {})
    with pytest.raises(ValueError, match=r"more.tar: expected one tar per class, such as n0144076"):
        open_path(f"{tmp_path}/in")
