"""Crops of JPEGs with restart markers: fewer bytes, the same pixels."""

import io
import os
import shutil
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from test_image_folder import fill
from test_jpeg import encode, photo

from vit_jax.data import jpeg_markers
from vit_jax.data.decode import decode_image, open_image
from vit_jax.data.sources import open_path, open_source
from vit_jax.data.writer import WriteConfig, write_dataset

needs_jpegtran = pytest.mark.skipif(
    not shutil.which("jpegtran"), reason="apt-get install libjpeg-turbo-progs"
)

# Kind: (blocks coded together in a row of 158 pixels, how Pillow writes it).
KINDS = {
    "420": (10, {"subsampling": 2}),
    "422": (10, {"subsampling": 1}),
    "444": (20, {"subsampling": 0}),
    "rgb": (20, {"keep_rgb": True}),
    "grey": (20, {"mode": "L"}),
    "exif, own tables": (10, {"optimize": True, "comment": b"c" * 999}),
}
HEIGHT, WIDTH = 107, 158


def pair(kind, interval=1):
    """Returns a JPEG as Pillow writes it, without and with indexed restart markers."""
    options = dict(KINDS[kind][1])
    image = photo().crop((0, 0, WIDTH, HEIGHT)).convert(options.pop("mode", "RGB"))
    marked = encode(image, quality=90, restart_marker_blocks=interval, **options)
    return encode(image, quality=90, **options), jpeg_markers.add_index(marked)


def boxes(count, smallest=1, seed=0):
    rng = np.random.default_rng(seed)
    while count:
        top, bottom = np.sort(rng.choice(HEIGHT + 1, 2, replace=False))
        left, right = np.sort(rng.choice(WIDTH + 1, 2, replace=False))
        if min(bottom - top, right - left) >= smallest:
            count -= 1
            yield int(left), int(top), int(right), int(bottom)


@pytest.mark.parametrize("interval", [1, 2, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_any_crop_equals_the_same_part_of_the_whole(kind, interval):
    plain, marked = pair(kind, interval)
    whole = decode_image(plain)
    np.testing.assert_array_equal(decode_image(marked), whole)  # by Pillow
    image = open_image(marked)
    np.testing.assert_array_equal(image.decode(), whole)
    smaller = 0
    for box in boxes(40):
        left, top, right, bottom = box
        found = image.crop(box, (bottom - top, right - left))
        np.testing.assert_array_equal(found, whole[top:bottom, left:right])
        part = jpeg_markers.cut(marked, image.height_at - 5, box, margin=1)
        smaller += part is not None and len(part[0]) < len(marked)
    assert smaller >= 36


@pytest.mark.parametrize("scale", [2, 4, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_crops_decoded_smaller_are_the_same(kind, scale):
    plain, marked = map(open_image, pair(kind))
    for box in boxes(20, smallest=4 * scale):
        at_least = ((box[3] - box[1]) // scale, (box[2] - box[0]) // scale)
        found = marked.crop(box, at_least)
        np.testing.assert_array_equal(found, plain.crop(box, at_least))
        assert found.shape[0] <= (box[3] - box[1]) // scale + 2


def test_what_a_crop_parses():
    """A crop parses the header and the segments under the box and its margin, nothing else."""
    _, marked = pair("420", interval=2)
    frame = open_image(marked).height_at - 5
    part, origin, size = jpeg_markers.cut(marked, frame, (65, 33, 95, 47), margin=1)
    assert (origin, size) == ((64, 32), (16, 32))
    with Image.open(io.BytesIO(part)) as image:  # by Pillow
        assert image.size == (32, 16)
        image.load()
    assert len(part) < 900 < len(marked) / 7
    assert part.count(b"\xff\xd0") == 0  # a single segment needs no marker
    # A margin of two pixels needs the neighbours.
    assert jpeg_markers.cut(marked, frame, (65, 33, 95, 47), margin=2)[1:] == ((32, 16), (48, 96))
    everything = (0, 0, WIDTH, HEIGHT)
    assert jpeg_markers.cut(marked, frame, everything, margin=1) is None


def test_only_a_grid_gets_an_index():
    image = photo().crop((0, 0, WIDTH, HEIGHT))
    assert jpeg_markers.add_index(encode(image)) is None
    assert jpeg_markers.add_index(encode(image, restart_marker_blocks=3)) is None  # ten in a row
    assert jpeg_markers.add_index(encode(image, restart_marker_rows=1))
    assert jpeg_markers.add_index(encode(image, progressive=True, restart_marker_blocks=1)) is None
    assert jpeg_markers.add_index(encode(image, "PNG")) is None
    marked = encode(image, restart_marker_blocks=5)
    assert jpeg_markers.add_index(marked)
    assert jpeg_markers.add_index(marked + b"more") is None
    assert jpeg_markers.add_index(marked[:-300]) is None


def test_a_wrong_index_is_not_used():
    plain, marked = pair("420")
    whole, box = decode_image(plain), (30, 20, 90, 70)
    frame = open_image(marked).height_at - 5
    assert jpeg_markers.cut(marked, frame, box, 1)
    at = frame + 19 + 4  # the index's name; then 16 bytes of it, the interval, the distance
    lengths = at + 22
    swapped = bytearray(marked)
    swapped[lengths + 44 : lengths + 48] = marked[lengths + 46 : lengths + 48] * 2
    for broken in (
        bytes(swapped),
        marked[:at] + b"V" + marked[at + 1 :],
        marked[: at + 16] + b"\x02" + marked[at + 17 :],
        marked[: at + 18] + b"\x02" + marked[at + 19 :],
        marked[:lengths] + b"\x00" + marked[lengths + 1 :],
        marked + b"more",
    ):
        assert broken != marked
        assert jpeg_markers.cut(broken, frame, box, 1) is None
        found = open_image(broken).crop(box, (50, 60))
        np.testing.assert_array_equal(found, whole[20:70, 30:90])
    # Moved by one segment, their sum unchanged: the markers aren't where it says.
    moved = marked[:lengths] + marked[lengths + 2 :][:1000] + marked[lengths + 1002 :]
    assert jpeg_markers.cut(moved, frame, box, 1) is None
    for length in range(frame, len(marked), 97):  # cut off anywhere
        assert jpeg_markers.cut(marked[:length], frame, box, 1) is None
        with pytest.raises(ValueError, match=f"cannot decode {length} bytes"):
            np.asarray(open_image(marked[:length]))


@needs_jpegtran
@pytest.mark.parametrize("width", [WIDTH, 97, 7])
@pytest.mark.parametrize("kind", [*KINDS, "progressive"])
def test_rewriting_changes_no_pixel(kind, width):
    options = {"progressive": True} if kind == "progressive" else dict(KINDS[kind][1])
    image = photo().crop((0, 0, width, HEIGHT)).convert(options.pop("mode", "RGB"))
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(image, quality=92, exif=exif, **options)
    marked = jpeg_markers.add_markers(data)
    whole = decode_image(data)
    np.testing.assert_array_equal(decode_image(marked), whole)
    with Image.open(io.BytesIO(marked)) as read:
        assert read.getexif()[0x0112] == 6
        assert "progression" not in read.info
    rewritten = open_image(marked)
    for left, top, right, bottom in boxes(20):
        if right > width:
            continue
        found = rewritten.crop((left, top, right, bottom), (bottom - top, right - left))
        np.testing.assert_array_equal(found, whole[top:bottom, left:right])
    frame = rewritten.height_at - 5
    assert jpeg_markers.cut(marked, frame, (0, 0, 1, 1), 1)
    assert len(marked) < 1.2 * len(data)
    assert jpeg_markers.add_markers(data[:-500]) is None  # with a warning


# Without jpegtran. Images of even blocks survive being encoded again.
STAND_IN = f"""#!{sys.executable}
import io, sys
from PIL import Image
before, after = Image.open(io.BytesIO(sys.stdin.buffer.read())), io.BytesIO()
blocks = int(sys.argv[-1].removesuffix("B"))
before.save(after, "JPEG", quality="keep", progressive=False, restart_marker_blocks=blocks)
sys.stdout.buffer.write(after.getvalue())
"""


@pytest.mark.parametrize("program", [pytest.param("jpegtran", marks=needs_jpegtran), "stand-in"])
def test_a_dataset_with_markers(tmp_path, monkeypatch, program):
    """Pixels are unchanged for us and for TFDS; only JPEGs are rewritten."""
    names = [f"a/{i}.jpg" for i in range(4)] + ["b/4.png"]
    path = fill(tmp_path / "in", *names)
    for i, name in enumerate(names[:4]):
        blocks = np.random.default_rng(i).integers(256, size=(11, 12), dtype=np.uint8)
        image = Image.fromarray(np.kron(blocks, np.ones((8, 8), np.uint8)))
        (tmp_path / "in" / name).write_bytes(encode(image, progressive=i % 2 == 1))
    if program == "stand-in":
        (tmp_path / "jpegtran").write_text(STAND_IN)
        (tmp_path / "jpegtran").chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    config = WriteConfig(restart_markers=True)
    write_dataset(open_path(path), tmp_path, "marked", None, config)
    theirs = tfds.data_source("marked", split="train", data_dir=str(tmp_path), download=False)
    ours = open_source("marked", "train", str(tmp_path))
    names_written = set()
    for record, found in zip(theirs, ours, strict=True):
        name = record["file_name"].decode()
        before, after = (tmp_path / "in" / name).read_bytes(), found["image"]
        whole = decode_image(before)
        np.testing.assert_array_equal(np.broadcast_to(record["image"], whole.shape), whole)
        np.testing.assert_array_equal(decode_image(after), whole)
        if name.endswith("jpg"):
            image = open_image(after)
            assert jpeg_markers.cut(after, image.height_at - 5, (20, 20, 50, 50), 1)
            np.testing.assert_array_equal(
                image.crop((20, 20, 50, 50), (30, 30)), whole[20:50, 20:50]
            )
        else:
            assert before == after
        names_written.add(name)
    assert names_written == set(names)
    with pytest.raises(ValueError, match="restart_markers True there, None here"):
        write_dataset(open_path(path), tmp_path, "marked", None, WriteConfig())


def test_what_jpegtran_cannot_do_stays_as_it_came(tmp_path, monkeypatch):
    """If jpegtran fails or changes a pixel, the original file is written."""
    path = fill(tmp_path / "in", "a/0.jpg", "b/1.jpg")
    data = encode(photo())
    for name in ("a/0.jpg", "b/1.jpg"):
        (tmp_path / "in" / name).write_bytes(data + name.encode())
    _, other = pair("444")
    (tmp_path / "other.jpg").write_bytes(other)
    program = tmp_path / "bin" / "jpegtran"
    program.parent.mkdir()
    monkeypatch.setenv("PATH", str(program.parent))
    listing = open_path(path)
    with pytest.raises(ValueError, match="jpegtran, which is not on the PATH: install"):
        write_dataset(listing, tmp_path, "none", None, WriteConfig(restart_markers=True))
    for name, body in (("fails", "exit 2"), ("changes", f"exec /bin/cat {tmp_path}/other.jpg")):
        program.write_text(f"#!/bin/sh\n{body}\n")
        program.chmod(0o755)
        write_dataset(listing, tmp_path, name, None, WriteConfig(restart_markers=True))
        written = open_source(name, "train", str(tmp_path))
        for i, record in enumerate(written):
            assert record["image"] == data + written.name(i).split(", ")[-1].encode()
