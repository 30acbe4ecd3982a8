import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from vit_jax.data.array_records import build_with_tfds
from vit_jax.data.decode import decode_image
from vit_jax.data.sources import Source, open_path, open_source, parse_split
from vit_jax.data.writer import WriteConfig, write_dataset

NAMES = ("cat", "dog", "emu")


def picture(i):
    return np.random.default_rng(i).integers(256, size=(5 + i % 3, 4, 3), dtype=np.uint8)


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    file.seek(0)
    return file


def fill_folder(root, count):
    """Writes an image folder of two classes."""
    for i in range(count):
        path = root / NAMES[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(np.full((3, 3, 3), i, np.uint8)).getvalue())
    return str(root)


def write_tfds(name, data_dir, label_features, examples):
    """Prepares a TFDS dataset and unregisters its builder, as if someone else had made it."""
    features = {"image": tfds.features.Image(), "id": tfds.features.Text(), **label_features}

    def info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def generate(start, stop):
        for i in range(start, stop):
            yield i, {"image": png(picture(i)), "id": str(i), **examples(i)}

    def split_generators(self, manager):
        return {
            "train": generate(0, 20),
            "test": generate(20, 26),
        }

    members = {
        "name": name,
        "VERSION": tfds.core.Version("1.0.0"),
        "_info": info,
        "_split_generators": split_generators,
        "_generate_examples": None,
        "__module__": __name__,
    }
    builder = types.new_class(
        name,
        (tfds.core.GeneratorBasedBuilder,),
        {"skip_registration": True},
        lambda ns: ns.update(members),
    )
    builder(data_dir=data_dir, file_format="array_record").download_and_prepare()


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    root = str(tmp_path_factory.mktemp("tfds"))
    classes = tfds.features.ClassLabel(names=NAMES)
    write_tfds("pets", root, {"label": classes}, lambda i: {"label": i % 3})
    write_tfds(
        "tags",
        root,
        {"labels": tfds.features.Sequence(classes)},
        lambda i: {"labels": list(range(i % 3))},
    )
    write_tfds("numbers", root, {"label": tfds.features.Scalar(np.int64)}, lambda i: {"label": i})
    write_tfds("bare", root, {"species": classes}, lambda i: {"species": 0})
    return root


def test_digits_splits_are_fixed():
    train, test = open_source("digits", "train"), open_source("digits", "test")
    assert (len(train), len(test)) == (1198, 599)
    assert train.num_classes == 10
    assert train.class_names == tuple("0123456789")
    from sklearn.datasets import load_digits

    digits = load_digits()
    for source, first in ((train, 0), (test, 2)):
        record = source[0]
        assert record["image"].dtype == np.uint8
        assert record["image"].shape == (8, 8)
        assert max(source[i]["image"].max() for i in range(10)) == 255
        np.testing.assert_allclose(record["image"], digits.images[first] * 255 / 16, atol=0.5)
        assert record["label"] == digits.target[first]


@pytest.mark.parametrize("name", ["strokes/20", "fractals/20"])
def test_formula_splits(name):
    train, validation = open_source(name, "train"), open_source(name, "validation")
    assert (len(train), len(validation)) == (1_000_000, 10_000)
    assert train.num_classes == 20
    images = {train[i]["image"].tobytes() for i in range(30)}
    assert len(images) == 30
    assert not images & {validation[i]["image"].tobytes() for i in range(30)}
    assert len(open_source(name, "train[:5_000_000_000]")) == 5_000_000_000
    part = open_source(name, "train[5:8]")
    for i in range(3):
        np.testing.assert_array_equal(part[i]["image"], train[5 + i]["image"])
        assert part[i]["label"] == train[5 + i]["label"]


def test_synthetic_images_are_large_and_in_imagenets_splits():
    """`test` is nobody else's, `full` and `train` begin with the same images."""
    names = ("train[:20]", "full[:20]", "validation[:20]", "test[:20]", "train[99%:]+test")
    train, full, validation, test, joined = (open_source("synthetic/7", name) for name in names)
    images = [{s[i]["image"].tobytes() for i in range(20)} for s in (train, full, validation, test)]
    assert images[0] == images[1] and len(set.union(*images)) == 60
    assert train[3]["image"].shape == (256, 256, 3) and train[8]["label"] == 1
    assert len(open_source("synthetic", "full[51200:]")) == 14_197_122 - 51_200
    assert len(joined) == 14_197_122 - 14_055_151 + 100_000


def test_no_training_split_reaches_the_validation_examples():
    assert len(open_source("strokes", f"train[{2**60 - 1}:{2**60}]")) == 1
    with pytest.raises(ValueError, match=f"expected to end by {2**60}"):
        open_source("strokes", f"train[{2**60}:{2**60 + 5}]")


def test_formula_classes_default_to_1000():
    assert open_source("strokes", "train").num_classes == 1000


def test_joined_splits_are_concatenated():
    train, test = open_source("digits", "train"), open_source("digits", "test")
    both = open_source("digits", "train[:3] + test[-2:] + train[3:5]")
    assert len(both) == 7
    expected = [train[0], train[1], train[2], test[597], test[598], train[3], train[4]]
    for i, record in enumerate(expected):
        np.testing.assert_array_equal(both[i]["image"], record["image"])


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train", [("train", 0, 1000)]),
        ("train[:99%]", [("train", 0, 990)]),
        ("train[10%:20%]", [("train", 100, 200)]),
        ("train[-10%:]", [("train", 900, 1000)]),
        ("train[9_90:]+test[:-1]", [("train", 990, 1000), ("test", 0, 6)]),
        ("test[:50%]", [("test", 0, 4)]),
    ],
)
def test_split_grammar_is_that_of_tfds(split, expected):
    sizes = {"train": 1000, "test": 7}
    assert parse_split(split, sizes, "x") == expected
    infos = [
        tfds.core.SplitInfo(
            name=name,
            shard_lengths=[size],
            num_bytes=0,
            filename_template=tfds.core.ShardedFileTemplate(
                data_dir="/none", dataset_name="x", filetype_suffix="array_record"
            ),
        )
        for name, size in sizes.items()
    ]
    theirs = tfds.core.splits.SplitDict(infos)[split].num_examples
    assert sum(stop - start for _, start, stop in expected) == theirs


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("trian", "unknown split of digits 'trian': did you mean 'train'"),
        ("train[:3", "cannot read 'train"),
        ("train[1.5:]", "cannot read 'train"),
        ("train[0:10:2]", "cannot read 'train"),
        ("", "cannot read ''"),
        ("train+", "cannot read ''"),
        ("train[5:5]", "examples 5 to 5: expected a range that is not empty"),
        ("train[3:2]", "examples 3 to 2"),
        ("train[:0%]", "examples 0 to 0"),
        ("train[:1199]", "within train's 1198 examples"),
        ("train[-2000:]", "examples -802 to 1198"),
    ],
)
def test_bad_splits(split, message):
    with pytest.raises(ValueError) as error:
        open_source("digits", split)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("digit", "did you mean 'digits'"),
        ("cifar1", "did you mean 'cifar10'"),
        ("pest", "did you mean 'pets'"),
        ("strokes/many", "expected the number of classes"),
        ("strokes/0", "expected the number of classes"),
        ("cifar10:9.9.9", "cannot open cifar10:9.9.9"),
        ("bare", "has the features id, image, species: expected `image` and one of label"),
        ("numbers", "expected a ClassLabel"),
    ],
)
def test_bad_datasets(name, message, data_dir):
    with pytest.raises(ValueError) as error:
        open_source(name, "train", data_dir)
    assert message in str(error.value)


@pytest.mark.parametrize("name", ["pets", "pets:1.0.0"])
def test_tfds_by_name_and_split(name, data_dir):
    train = open_source(name, "train", data_dir)
    assert len(train) == 20
    assert train.num_classes == 3
    assert train.class_names == NAMES
    assert train.labels_per_example is None
    # TFDS shuffles on writing, so records are matched by their pixels.
    pixels = {picture(i).tobytes(): i for i in range(26)}
    parts = {
        split: [
            pixels[decode_image(record["image"]).tobytes()]
            for record in open_source(name, split, data_dir)
        ]
        for split in ("train", "train[:50%]", "train[50%:]", "test", "train[15:]+test[:1]")
    }
    assert sorted(parts["train"]) == list(range(20))
    assert sorted(parts["test"]) == list(range(20, 26))
    assert parts["train[:50%]"] + parts["train[50%:]"] == parts["train"]
    assert parts["train[15:]+test[:1]"] == parts["train"][15:] + parts["test"][:1]
    assert [train[i]["label"] for i in range(20)] == [i % 3 for i in parts["train"]]
    assert set(train[0]) == {"image", "label"}
    assert isinstance(train[0]["image"], bytes)
    assert pickle.loads(pickle.dumps(train))[3] == train[3]  # for worker processes


def test_shards_missing_truncated_or_damaged(data_dir, tmp_path):
    """Damage is found when the split is opened; damage inside a record, when it is read."""
    shutil.copytree(f"{data_dir}/pets/1.0.0", tmp_path, dirs_exist_ok=True)
    shard = tmp_path / "pets-train.array_record-00000-of-00001"
    source = open_source(str(tmp_path), "train[5:]")  # the folder's path will do for the name
    assert source.class_names == NAMES and len(source) == 15
    assert source.describe(2) == "example 2 (record 7 of pets-train.array_record-00000-of-00001)"
    whole = shard.read_bytes()
    image = source[2]["image"]
    damaged = bytearray(whole)
    damaged[whole.index(image) + len(image) // 2] ^= 1
    shard.write_bytes(damaged)
    source = open_source(str(tmp_path), "train[5:]")
    assert source[3] == open_source(f"{data_dir}/pets/1.0.0", "train")[8]
    with pytest.raises(ValueError, match=r"cannot read it: .*Corrupted"):
        source[2]
    for data in (b"", whole[:-1], whole[: len(whole) // 2]):
        shard.write_bytes(data)
        with pytest.raises(ValueError, match=f"shard {shard} is truncated or damaged"):
            open_source(str(tmp_path), "train")
    other = (tmp_path / "pets-test.array_record-00000-of-00001").read_bytes()
    shard.write_bytes(other)
    with pytest.raises(ValueError, match=r"holds 6 records, its dataset_info.json says 20"):
        open_source(str(tmp_path), "train")
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"1 of 1 shards are missing, such as {shard}"):
        open_source(str(tmp_path), "train")
    assert len(open_source(str(tmp_path), "test")) == 6


CLASS_LABEL = "tensorflow_datasets.core.features.class_label_feature.ClassLabel"


@pytest.mark.parametrize("by", ["path", "name", "version"])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (CLASS_LABEL, "evil.Label"),
        ('{"pythonClassName": "', '{"python_class_name": "evil.Label", "x": "'),
        ('{"description": "', '{"jsonFeature": {"json": "{\\"type\\": \\"evil.X\\"}"}, "x": "'),
    ],
)
def test_metadata_import_nothing(data_dir, tmp_path, monkeypatch, before, after, by):
    """Classes named in features.json, at any depth, must be TFDS's own."""
    folder = tmp_path / "data/pets/1.0.0"
    shutil.copytree(f"{data_dir}/pets/1.0.0", folder)
    file = folder / "features.json"
    text = json.dumps(json.loads(file.read_text())).replace(
        '{"classLabel"', '{"description": "a", "classLabel"'
    )
    assert before in text
    file.write_text(text.replace(before, after))
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    name = {"path": str(folder), "name": "pets", "version": "pets:1.0.0"}[by]
    with pytest.raises(ValueError, match=r"features.json names the class 'evil"):
        open_source(name, "train", str(tmp_path / "data"))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("features.json", "[" * 200_000, "is not readable JSON"),
        ("features.json", "{}", "cannot open"),
        ("features.json", '{"numClasses": "1000000000"}', "1000000000 classes: expected up to"),
        ("dataset_info.json", '{"name": 3}', "cannot open"),
        ("dataset_info.json", "[]", "cannot open"),
        (
            "dataset_info.json",
            json.dumps({"splits": [{"name": "train", "shardLengths": ["1"] * 200_000}]}),
            "lists 200,000 shards",
        ),
    ],
)
def test_malformed_metadata(data_dir, tmp_path, file, content, message):
    shutil.copytree(f"{data_dir}/pets/1.0.0", tmp_path, dirs_exist_ok=True)
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        open_source(str(tmp_path), "train")


def test_a_pipe_for_a_file_is_refused(data_dir, tmp_path):
    """Reading it would wait for ever."""
    for name in ("pets-train.array_record-00000-of-00001", "features.json"):
        shutil.copytree(f"{data_dir}/pets/1.0.0", tmp_path / name)
        (tmp_path / name / name).unlink()
        os.mkfifo(tmp_path / name / name)
        with pytest.raises(ValueError, match="is a named pipe: expected a file"):
            open_source(str(tmp_path / name), "train")


def test_more_shards_than_files_may_be_open(tmp_path):
    """Few readers are open at a time; too many open files are not a broken example."""
    folder = fill_folder(tmp_path / "in", 40)
    write_dataset(open_path(folder), tmp_path, "many", None, WriteConfig(shards=40))
    program = f"""
import os, resource
limit = len(os.listdir("/proc/self/fd")) + 30
resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
from vit_jax.data.sources import open_source
source = open_source("many", "train", {str(tmp_path)!r})
assert len({{source[i]["image"] for i in range(40)}}) == 40
assert len(os.listdir("/proc/self/fd")) < 30
from vit_jax.data import array_records
array_records._readers().cache_clear()
keep = []
try:
    while True:
        keep.append(os.open("/dev/null", os.O_RDONLY))
except OSError:
    pass
try:
    source[0]
except ValueError:
    raise
except OSError as error:
    assert "Too many open files" in str(error), error
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_tfds_multi_label(data_dir):
    source = open_source("tags", "train", data_dir)
    assert source.num_classes == 3
    assert source.labels_per_example >= 3
    counts = sorted(len(record["label"]) for record in source)
    assert counts == sorted(i % 3 for i in range(20))
    assert all(list(r["label"]) == list(range(len(r["label"]))) for r in source)


def test_tfds_errors_say_how_to_prepare(data_dir, tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        open_source("cifar10", "train", data_dir)
    assert f"tfds build cifar10 --file_format=array_record --data_dir={data_dir}" in str(
        error.value
    )
    with pytest.raises(FileNotFoundError, match=r"--manual_dir=DIR(.|\n)*ILSVRC2012_img_train.tar"):
        open_source("imagenet2012", "train", data_dir)
    shutil.copytree(data_dir, tmp_path, dirs_exist_ok=True)
    info_file = tmp_path / "pets" / "1.0.0" / "dataset_info.json"
    info = json.loads(info_file.read_text())
    assert info["fileFormat"] == "array_record"
    info_file.write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    with pytest.raises(FileNotFoundError, match="tfds convert_format --dataset_version_dir="):
        open_source("pets", "train", str(tmp_path))


def test_nothing_imports_tensorflow_nor_the_embedded_sets_tfds(data_dir):
    program = f"""
import sys
from vit_jax.data.sources import open_source
open_source("strokes/10", "train")[0]
open_source("digits", "train")[0]
assert "tensorflow_datasets" not in sys.modules
assert open_source("pets", "train", {data_dir!r})[0]
assert "tensorflow_datasets" in sys.modules
assert "tensorflow" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_source_keeps_only_image_and_label():
    source = Source(({"image": b"", "label": [1], "file_name": "x"},), 2)
    assert source[0] == {"image": b"", "label": [1]}


@pytest.mark.parametrize("split", ["train", "train[:3]+test"])
def test_index_out_of_range(split):
    source = open_source("digits", split)
    for index in (-1, len(source)):
        with pytest.raises(IndexError):
            source[index]


@pytest.mark.parametrize("name", ["huggingface:mnist", "kaggle:a/b", "ns:name", "a:b:1.0.0"])
def test_datasets_of_communities_are_refused(name, tmp_path):
    """TFDS would fetch and run their code. A version isn't one."""
    with pytest.raises(ValueError, match=f"^{name}: expected a dataset of TFDS itself"):
        open_source(name, "train")
    with pytest.raises(ValueError, match="runs code of its own"):
        build_with_tfds(name, str(tmp_path))
    for version in ("3.0.2", "3.*.*", "*.*.*"):
        with pytest.raises(FileNotFoundError, match="is not prepared"):
            open_source(f"cifar10:{version}", "train", str(tmp_path))


def test_the_environments_folder_is_no_bucket(monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", "gs://b/data")
    with pytest.raises(ValueError, match="gcsfuse --implicit-dirs -o ro b /mnt/b, and name /mnt/b"):
        open_source("cifar10", "train")
