"""Array files: written bits are read back, and every fault is a ValueError."""

import io
import math
import os
import re
import struct
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vit_jax.weights import files
from vit_jax.weights.download import cache_path
from vit_jax.weights.files import read_arrays, read_json, write_npz, write_safetensors
from vit_jax.weights.published import web_address

WRITERS = {".npz": write_npz, ".safetensors": write_safetensors}
SMALL = {
    "cls": np.arange(4, dtype=np.float32),
    "Transformer/encoderblock_0/kernel": np.linspace(-1, 1, 15, dtype=np.float32).reshape(3, 5),
    "step": np.int32(3),
}
FLOATS = ["<f2", "<f4", "<f8", ">f4", ml_dtypes.bfloat16]
shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
anything = settings(deadline=None, max_examples=100, database=None)


@st.composite
def finite_arrays(draw):
    """Generates arrays of any finite bits, including -0.0 and subnormal numbers."""
    dtype = np.dtype(draw(st.sampled_from([*FLOATS, "<i1", "<u1", "<i8", ">i4", "<u2"])))
    shape = draw(shapes)
    size = math.prod(shape) * dtype.itemsize
    array = np.frombuffer(draw(st.binary(min_size=size, max_size=size)), dtype).reshape(shape)
    return np.where(np.isfinite(array), array, -array.dtype.type(0)).astype(dtype)


tensors = st.dictionaries(
    st.text("ab01_/é. ", min_size=1, max_size=12),
    finite_arrays() | shapes.map(lambda shape: np.ones(shape, bool)),
    min_size=1,
    max_size=4,
)


def bits(arrays):
    """Returns what `read_arrays` should: half precision as float32, native byte order."""

    def same(array):
        array = np.asarray(array)
        half = array.dtype in (np.float16, ml_dtypes.bfloat16)
        array = array.astype(np.float32 if half else array.dtype.newbyteorder("="))
        return array.dtype.str, array.shape, array.tobytes()

    return {name: same(array) for name, array in arrays.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("files")


@pytest.fixture(scope="module")
def contents(folder):
    """The bytes of valid files: ours, numpy's plain and compressed ones, and safetensors."""
    found = {}
    for kind, save in {
        "ours.npz": lambda path: write_npz(path, SMALL),
        "plain.npz": lambda path: np.savez(path, **SMALL),
        "compressed.npz": lambda path: np.savez_compressed(path, **SMALL),
        "ours.safetensors": lambda path: write_safetensors(path, SMALL, {"format": "pt"}),
    }.items():
        save(folder / kind)
        found[kind] = (folder / kind).read_bytes()
    return found


KINDS = ["ours.npz", "plain.npz", "compressed.npz", "ours.safetensors"]


def refused(path, data, match=None) -> None:
    path.write_bytes(data)
    with pytest.raises(ValueError, match=match) as error:
        read_arrays(path)
    assert str(error.value).startswith(f"{path}: ")


def zipped(*members, compression=zipfile.ZIP_STORED):
    """Makes a zip archive of (name, bytes)."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return buffer.getvalue()


def npy(array, header=None):
    """Makes a .npy array, with another header if given."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array)
    data = buffer.getvalue()
    if header is None:
        return data
    length = struct.unpack("<H", data[8:10])[0]
    return data[:8] + struct.pack("<H", len(header)) + header + data[10 + length :]


@pytest.mark.parametrize("suffix", WRITERS)
@anything
@given(arrays=tensors)
def test_round_trip(folder, suffix, arrays):
    path = folder / f"round{suffix}"
    WRITERS[suffix](path, arrays)
    read = read_arrays(path)
    assert bits(read) == bits(arrays)
    assert all(a.flags.c_contiguous and a.flags.writeable for a in read.values())


@anything
@given(arrays=tensors)
def test_reads_what_the_libraries_write(folder, arrays):
    np.savez_compressed(folder / "library.npz", **arrays)  # bfloat16 becomes numpy's V2
    assert bits(read_arrays(folder / "library.npz")) == bits(arrays)
    safetensors.numpy.save_file(arrays, folder / "library.safetensors")
    assert bits(read_arrays(folder / "library.safetensors")) == bits(arrays)


def test_libraries_read_what_is_written(folder, contents):
    with np.load(folder / "ours.npz") as file:
        assert bits(dict(file)) == bits(SMALL)
    assert bits(safetensors.numpy.load_file(folder / "ours.safetensors")) == bits(SMALL)
    with safetensors.safe_open(folder / "ours.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("suffix", WRITERS)
def test_layout_in_memory_is_no_matter(folder, suffix):
    """safetensors itself writes the memory of a transposed array as if it weren't transposed."""
    square = np.arange(6, dtype=np.float32).reshape(2, 3)
    WRITERS[suffix](folder / f"t{suffix}", {"t": square.T, "s": square[:, ::2]})
    assert bits(read_arrays(folder / f"t{suffix}")) == bits({"t": square.T, "s": square[:, ::2]})
    np.savez(folder / "fortran.npz", t=np.asfortranarray(square))
    assert bits(read_arrays(folder / "fortran.npz")) == bits({"t": square})


@pytest.mark.parametrize("kind", KINDS)
def test_truncated_anywhere(folder, contents, kind):
    data = contents[kind]
    for end in range(len(data)):
        refused(folder / f"cut{kind}", data[:end])


@pytest.mark.parametrize("kind", KINDS[:3])
@anything
@given(data=st.data())
def test_damaged_npz_is_refused_or_whole(folder, contents, kind, data):
    """One wrong byte anywhere; in the zip's directory it can hide tensors from zipfile."""
    damaged = bytearray(contents[kind])
    damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= data.draw(st.integers(1, 255))
    path = folder / f"damaged{kind}"
    path.write_bytes(damaged)
    try:
        read = read_arrays(path)
    except ValueError:
        return
    assert bits(read) == bits(SMALL)


def test_a_damaged_directory_hides_no_tensor(folder, contents):
    """An entry's comment covers the next entry, so zipfile sees one member less."""
    data = bytearray(contents["ours.npz"])
    first = data.index(b"PK\x01\x02")
    second = data.index(b"PK\x01\x02", first + 1)
    third = data.index(b"PK\x01\x02", second + 1)
    struct.pack_into("<H", data, first + 32, third - second)
    assert len(zipfile.ZipFile(io.BytesIO(data)).namelist()) == 2
    refused(folder / "hidden.npz", data, "zip archive is damaged or incomplete .2 members of 3")


@anything
@given(data=st.data())
def test_damaged_safetensors_header_is_refused_or_whole(folder, contents, data):
    """Names and dtypes have no checksum, but every byte of data must belong to a tensor."""
    damaged = bytearray(contents["ours.safetensors"])
    end = 8 + int.from_bytes(damaged[:8], "little")
    damaged[data.draw(st.integers(0, end - 1))] ^= data.draw(st.integers(1, 255))
    path = folder / "damaged.safetensors"
    path.write_bytes(damaged)
    try:
        read = read_arrays(path)
    except ValueError:
        return
    assert len(read) == len(SMALL)


@anything
@given(
    start=st.sampled_from(
        [b"", b"PK\x03\x04", b"PK\x05\x06", b"\x80\x04", b"\x20" + bytes(7) + b"{"]
    ),
    data=st.binary(max_size=200),
    suffix=st.sampled_from([".npz", ".safetensors", ".bin", ""]),
)
def test_random_bytes(folder, start, data, suffix):
    refused(folder / f"random{suffix}", start + data)


@pytest.mark.parametrize(
    ("start", "match"),
    [
        (b"", "expected the contents of a .npz or .safetensors file: it is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "a web page: the download failed"),
        (b"\x80\x02}q\x00.", "a pickle, which can run code and is never read"),
        (npy(SMALL["cls"]), "a single .npy array: save arrays by name with numpy.savez"),
        (
            zipped(("model/data.pkl", b"\x80\x02}q\x00.")),
            r"'model/data.pkl' is no .npy array.*PyTorch",
        ),
        (
            zipped(("a.npy", npy(SMALL["cls"])), ("notes.txt", b"hi")),
            "'notes.txt' is no .npy array",
        ),
        (zipped(), "no arrays: expected those of a model"),
        (zipped(("a.npy", b"")), "tensor 'a' is damaged or incomplete"),
        (zipped(("a.npy", npy(SMALL["cls"])), compression=zipfile.ZIP_LZMA), "not by deflate"),
    ],
)
def test_other_files(folder, start, match):
    refused(folder / "other.npz", start, match)


@pytest.mark.parametrize("suffix", WRITERS)
def test_renamed(folder, contents, suffix):
    data = contents[f"ours{suffix}"]
    other = next(s for s in WRITERS if s != suffix)
    refused(folder / f"renamed{other}", data, f"has the contents of a {suffix} file: rename it")
    (folder / "blob").write_bytes(data)  # as in the caches of download tools
    assert bits(read_arrays(folder / "blob")) == bits(SMALL)
    with pytest.raises(ValueError, match=f"has the contents of a {suffix} file: rename it"):
        WRITERS[suffix](folder / f"wrong{other}", SMALL)
    assert not (folder / f"wrong{other}").exists()


def test_twice_the_same_member(folder):
    with pytest.warns(UserWarning, match="Duplicate name"):
        data = zipped(("a.npy", npy(SMALL["cls"])), ("a.npy", npy(SMALL["cls"] + 1)))
    refused(folder / "twice.npz", data, "several members are named 'a.npy'")


@pytest.mark.parametrize("suffix", WRITERS)
@anything
@given(data=st.data())
def test_nan_anywhere(folder, suffix, data):
    dtype = data.draw(st.sampled_from(FLOATS))
    array = np.zeros(data.draw(shapes.filter(math.prod)), dtype)
    index = data.draw(st.integers(0, array.size - 1))
    array.flat[index] = data.draw(st.sampled_from([np.nan, np.inf, -np.inf]))
    arrays = {"fine": SMALL["cls"], "head/kernel": array}
    match = rf"'head/kernel' .*: 1 of {array.size} values are NaN or infinite"
    path = folder / f"nan{suffix}"
    with pytest.raises(ValueError, match=match):
        WRITERS[suffix](path, arrays)
    if suffix == ".npz":
        np.savez(path, **arrays)
    else:
        safetensors.numpy.save_file(arrays, path)
    refused(path, path.read_bytes(), match)


class Bomb:
    """An object whose unpickling creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_pickles_are_never_read(folder):
    objects = np.array([Bomb(folder / "exploded"), 1], dtype=object)
    np.savez(folder / "objects.npz", a=SMALL["cls"], b=objects)
    match = r"tensor 'b' of dtype \|O: expected .* Python objects are never unpickled"
    refused(folder / "objects.npz", (folder / "objects.npz").read_bytes(), match)
    assert not (folder / "exploded").exists()
    with pytest.raises(ValueError, match="tensor 'b' of dtype object"):
        write_npz(folder / "written.npz", {"b": objects})
    assert not (folder / "written.npz").exists()


@pytest.mark.parametrize(
    "array",
    [np.array("text"), np.zeros(2, complex), np.zeros(2, "M8[s]"), np.zeros(2, np.longdouble)],
)
def test_only_numbers(folder, array):
    """Texts are passed over; what is left must be numbers."""
    np.savez(folder / "text.npz", a=array)
    message = "no arrays" if array.dtype.kind == "U" else "tensor 'a' of dtype .*expected"
    refused(folder / "text.npz", (folder / "text.npz").read_bytes(), message)
    for suffix, write in WRITERS.items():
        with pytest.raises(ValueError, match=r"tensor 'a' of dtype .*expected"):
            write(folder / f"none{suffix}", {"a": array})


def test_only_numbers_of_safetensors(folder):
    header = b'{"a":{"dtype":"F8_E4M3","shape":[2],"data_offsets":[0,2]}}'
    data = struct.pack("<Q", len(header)) + header + bytes(2)
    refused(folder / "f8.safetensors", data, "tensor 'a' of dtype F8_E4M3: expected")


HEADER = "{'descr': '<f4', 'fortran_order': False, 'shape': (4,), }"


@anything
@given(
    st.integers(0, len(HEADER)),
    st.integers(0, 9),
    st.text("0123456789(),'<f4[]{}-~+:L \\\n", max_size=9),
)
@example(0, 99, "-" * 9000)
@example(0, 99, "(" * 9000)
@example(0, 99, "[" * 90 + "]" * 90)
@example(11, 4, "[('a', '<f4')]")
@example(49, 1, "9" * 5000)
@example(49, 3, "4, 9999999999999999, 9999999999999999, 0")
@example(49, 1, "-4")
def test_hostile_headers(folder, start, length, text):
    """numpy's reader evaluates headers, and raises MemoryError or TokenError for some of these."""
    header = (HEADER[:start] + text + HEADER[start + length :]).encode("latin1")
    path = folder / "header.npz"
    path.write_bytes(zipped(("a.npy", npy(SMALL["cls"], header))))
    try:
        (array,) = read_arrays(path).values()
    except ValueError as error:
        assert "'a'" in str(error)
        return
    assert array.nbytes == SMALL["cls"].nbytes  # the same in another shape or dtype


@pytest.mark.parametrize("shape", ["(3,)", "(5,)", "(2, 3)", "(999999999999,)", "(4, 0)"])
def test_three_sizes_must_agree(folder, shape):
    header = HEADER.replace("(4,)", shape).encode()
    data = zipped(("a.npy", npy(SMALL["cls"], header)))
    refused(
        folder / "size.npz", data, "tensor 'a' .* is not of the .* bytes that the archive declares"
    )


def declare(data, size):
    """Changes the declared size of a zip archive's only member, in both places."""
    data = bytearray(data)
    struct.pack_into("<L", data, 22, size)
    struct.pack_into("<L", data, data.index(b"PK\x01\x02") + 24, size)
    return data


def test_bombs(folder, monkeypatch):
    zeros = npy(np.zeros(10_000_000, np.float32))
    bomb = zipped(("a.npy", zeros), compression=zipfile.ZIP_DEFLATED)
    assert len(zeros) > 900 * len(bomb)
    small = npy(SMALL["cls"])
    cases = {
        "would unpack to 40,000,128 bytes, more than 1,000,000": bomb,  # declared
        r"bytes cannot unpack to the 500,000 declared: a zip bomb": declare(
            zipped(("a.npy", small)), 500_000
        ),
        "tensor 'a' .*is not of the 144 bytes|damaged": declare(bomb, len(small)),  # real
    }
    monkeypatch.setattr(files, "FREE_BYTES", 1_000_000)
    for match, data in cases.items():
        tracemalloc.start()
        refused(folder / "bomb.npz", bytes(data), match)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 1_000_000

    # Data that goes on beyond its declared and matching size is never unpacked.
    lying = declare(
        zipped(
            ("a.npy", npy(np.zeros(4, np.float32)) + bytes(40_000_000)),
            compression=zipfile.ZIP_DEFLATED,
        ),
        144,
    )
    refused(folder / "bomb.npz", bytes(lying), "damaged or incomplete")


def test_zeros_are_no_bomb(folder):
    """A new head of zeros compresses a thousandfold and is still accepted."""
    arrays = {"head/kernel": np.zeros((1024, 10_000), np.float32)}
    np.savez_compressed(folder / "zeros.npz", **arrays)
    assert (folder / "zeros.npz").stat().st_size < 50_000
    assert bits(read_arrays(folder / "zeros.npz")) == bits(arrays)


@pytest.mark.parametrize("suffix", WRITERS)
def test_writing_is_atomic(tmp_path, monkeypatch, suffix):
    path = tmp_path / "new" / f"model{suffix}"
    WRITERS[suffix](path, SMALL)
    before = path.read_bytes()

    def full(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        WRITERS[suffix](path, {"other": np.ones(3)})
    with pytest.raises(ValueError, match="no arrays"):
        WRITERS[suffix](path, {})
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_remote(contents, monkeypatch, tmp_path):
    """As `test_download` has it; here with what is in the cache already."""
    monkeypatch.setenv("VIT_JAX_CACHE", str(tmp_path))
    for path, kind in (
        ("gs://bucket/ours.npz", "ours.npz"),
        ("hf://owner/repo", "ours.safetensors"),
        ("hf://owner/repo/model.safetensors", "ours.safetensors"),
    ):
        place = cache_path(web_address(path))
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(contents[kind])
        assert bits(read_arrays(path)) == bits(SMALL)
    with pytest.raises(ValueError, match=r"gs://a/b.npz: write to a local path"):
        write_npz("gs://a/b.npz", SMALL)


def test_no_such_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none.npz"):
        read_arrays(tmp_path / "none.npz")


@settings(anything, max_examples=50)
@given(st.binary(max_size=50).filter(lambda text: b"{" not in text))
@example(b"[" * 100_000)
@example(b'{"a": 1} {"b": 2}')
def test_broken_json(folder, text):
    path = folder / "config.json"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        read_json(path)


def test_json(tmp_path):
    (tmp_path / "config.json").write_text('{"architecture": "vit"}')
    assert read_json(tmp_path / "config.json") == {"architecture": "vit"}
    assert read_json(tmp_path / "none.json") is None
    (tmp_path / "config.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match=r"expected a JSON object, found '\[1, 2\]'"):
        read_json(tmp_path / "config.json")
