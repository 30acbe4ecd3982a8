"""Reads and writes array files: `.npz` and `.safetensors`.

Files are untrusted. Nothing is unpickled or evaluated, and sizes are checked before memory is
allocated. Anything but a complete file of finite numbers raises a ValueError that names the cause.
"""

import json
import math
import os
import re
import struct
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from absl import logging

from vit_jax.config import InputError
from vit_jax.weights.download import NotPublicError, fetch
from vit_jax.weights.published import by_hand, web_address

# Scheme of a path -> the package that logs in to read what isn't public.
PACKAGES = {"gs": "gcsfs", "hf": "huggingface_hub"}

# Weights hardly compress, so an npz may unpack to at most FREE_BYTES + MAX_RATIO * its size. A
# deflate stream expands at most DEFLATE_RATIO times (zlib's technical details).
FREE_BYTES = 64 << 20
MAX_RATIO = 20
DEFLATE_RATIO = 1032

# The header of a .npy array, as numpy writes it. numpy's own reader evaluates the header as Python
# and raises many kinds of errors for malicious ones, including MemoryError.
_HEADER = re.compile(
    rb"\{'descr': '([^']*)', 'fortran_order': (True|False), "
    rb"'shape': \(((?:\d{1,18}, ?)*(?:\d{1,18})?)\), \}\s*"
)
# numpy writes bfloat16 as V2 (google-research/big_vision issue 107).
_NPY_NUMBERS = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248]|V2)")
_NPY_TEXT = re.compile(r"[<>|=]?[US]\d+")
_SAFETENSORS_NUMBERS = re.compile("BOOL|BF16|F16|F32|F64|[IU](8|16|32|64)")
_BROKEN = (zipfile.BadZipFile, safetensors.SafetensorError, zlib.error, struct.error)
_BROKEN += (EOFError, OSError, ValueError, RuntimeError)

_OTHERS = {
    b"version https://git-lfs": "a Git LFS pointer: fetch the file it stands for, `git lfs pull`",
    b"<": "a web page: the download failed",
    b"\x80": "a pickle, which can run code and is never read: export it as safetensors",
    b"\x93NUMPY": "a single .npy array: save arrays by name with numpy.savez",
    b"\x89HDF": "HDF5: export it as safetensors",
    b"\x1f\x8b": "compressed by gzip: unpack it",
    b"GGUF": "quantised weights for llama.cpp: take the weights that they were made from",
}


def read_arrays(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Reads all arrays of a `.npz` or `.safetensors` file; detects the format by content.

    Args:
      path: a local path, `https://host/file`, `gs://bucket/file`, `hf://owner/repo/file`, or
        `hf://owner/repo` for its `model.safetensors`. What isn't local is fetched once, see
        `download`.

    Returns:
      Name -> array of booleans, integers or finite floats. float16 and bfloat16 become float32.

    Raises:
      ValueError: the file has another format or the other's suffix, is damaged, holds NaN,
        infinities or objects, or declares more data than its size allows.
      FileNotFoundError: there is no such file.
      ConnectionError: the download failed, or nothing may be downloaded.
    """
    with local_copy(path) as local:
        try:
            suffix = _format(local)
            _check_name(local, suffix)
            return _checked(_READERS[suffix](local))
        except ValueError as error:
            remote = "://" in os.fspath(path)
            again = f" (to fetch it again, remove {local})" if remote else ""
            raise InputError(f"{path}: {error}{again}") from error


def read_json(path: str | os.PathLike) -> dict | None:
    """Reads a JSON object from any path that `read_arrays` accepts; None if there is no file.

    Where the names of files aren't public, servers refuse those that don't exist: None too.

    Raises ValueError for anything but an object.
    """
    try:
        with local_copy(path) as local:
            text = local.read_bytes()
    except (FileNotFoundError, NotPublicError):
        return None
    with _intact(f"{path}: the JSON"):
        content = json.loads(text)
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object, found {str(content)[:40]!r}")
    return content


def write_npz(path: str | os.PathLike, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays to a local `.npz`, uncompressed and atomically.

    Raises ValueError, and writes nothing, for arrays that `read_arrays` rejects.
    """
    checked = _checked(arrays.items())
    with atomic(path, ".npz") as partial, zipfile.ZipFile(partial, "w") as archive:
        for name, array in checked.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def write_safetensors(
    path: str | os.PathLike,
    arrays: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes arrays to a local `.safetensors`, under the rules of `write_npz`.

    `metadata` goes to the file's header, for example {"format": "pt"} for PyTorch.
    """
    checked = _checked(arrays.items())
    with atomic(path, ".safetensors") as partial:
        safetensors.numpy.save_file(checked, partial, metadata and dict(metadata))


@contextmanager
def local_copy(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a local file for a path of `read_arrays`: of remote ones, that in the cache.

    What isn't public is fetched by the scheme's package, and deleted on exit.
    """
    text = os.fspath(path)
    if "://" not in text:
        yield Path(path).expanduser()
        return
    url = web_address(text)
    private = None
    with tempfile.TemporaryDirectory() as folder:
        try:
            if text.startswith("gs://") and "STORAGE_EMULATOR_HOST" in os.environ:
                raise NotPublicError("the bucket isn't Google's")
            local = fetch(url)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{path}: no such file ({url})") from error
        except NotPublicError as error:
            private = error
        except ConnectionError as error:
            raise ConnectionError(f"{path} can't be fetched ({error}): {by_hand(text)}") from error
        if private:
            local = _fetch_private(text, Path(folder) / url.rpartition("/")[2], private)
        yield local


def _fetch_private(path: str, copy: Path, refusal: NotPublicError) -> Path:
    """Fetches what only who is logged in may read, with the package of its scheme."""
    scheme = path.partition("://")[0]
    if scheme not in PACKAGES:
        raise refusal
    if scheme == "hf" and path.count("/") == 3:
        path = f"{path}/model.safetensors"
    try:
        import fsspec

        filesystem, source = fsspec.url_to_fs(path)
    except ImportError as error:
        raise NotPublicError(
            f"{path} doesn't exist or isn't public ({refusal}); the package that logs in to "
            f"{scheme}:// is not installed: pip install {PACKAGES[scheme]}, or {by_hand(path)}"
        ) from error
    try:
        filesystem.get_file(source, str(copy))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: no such file") from error
    except Exception as error:  # each library has its own network errors
        problem = f"{type(error).__name__}: {str(error).strip()[:200]}"
        raise ConnectionError(f"{path} can't be fetched ({problem}): {by_hand(path)}") from error
    return copy


@contextmanager
def atomic(path: str | os.PathLike, suffix: str) -> Iterator[Path]:
    """Yields a temporary path to write; moves it to `path` if nothing fails."""
    if "://" in os.fspath(path):
        raise InputError(f"{path}: write to a local path and copy the file from there")
    path = Path(path).expanduser()
    _check_name(path, suffix)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _checked(tensors: Iterable[tuple[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Returns C-contiguous arrays in native byte order; ValueError unless finite numbers."""
    arrays = {}
    for name, tensor in tensors:
        array = np.asarray(tensor)
        if array.dtype == np.dtype("V2"):
            array = array.view(ml_dtypes.bfloat16)
        half = array.dtype in (np.float16, ml_dtypes.bfloat16)
        dtype = np.float32 if half else array.dtype.newbyteorder("=")
        array = array.astype(dtype, order="C", copy=False)
        if array.dtype.kind not in "biuf" or array.dtype.itemsize > 8:
            raise InputError(_not_numbers(name, array.dtype))
        if not (finite := np.isfinite(array)).all():
            raise InputError(
                f"tensor {name!r} {array.shape}: {(~finite).sum()} of {array.size} values are NaN "
                "or infinite: its training diverged, take an earlier checkpoint"
            )
        arrays[name] = array
    if not arrays:
        raise InputError("no arrays: expected those of a model")
    return arrays


def _not_numbers(name: str, dtype: object) -> str:
    return (
        f"tensor {name!r} of dtype {dtype}: expected booleans, integers or floats of 16 to 64 "
        "bits. Python objects are never unpickled: leave it out or convert it before saving"
    )


def _format(path: Path) -> str:
    """Returns the suffix that belongs to a file's contents."""
    with path.open("rb") as file:
        head = file.read(64)
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return ".npz"
    if head[8:9] == b"{":
        return ".safetensors"
    other = [text for magic, text in _OTHERS.items() if head.startswith(magic)]
    found = f"it looks like {other[0]}" if other else f"it begins with {head[:8]!r}"
    found = found if head else "it is empty, fetch it again"
    raise InputError(f"expected the contents of a .npz or .safetensors file: {found}")


def _check_name(path: Path, suffix: str) -> None:
    if path.suffix in _READERS and path.suffix != suffix:
        raise InputError(f"{path.name} has the contents of a {suffix} file: rename it to {suffix}")


@contextmanager
def _intact(what: str) -> Iterator[None]:
    """Converts the errors of a broken file to a ValueError."""
    try:
        yield
    except _BROKEN as error:
        raise InputError(
            f"{what} is damaged or incomplete ({error}): fetch or save the file again"
        ) from error


def _read_npz(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    with _intact("the zip archive"):
        archive = zipfile.ZipFile(path)
        members = archive.infolist()
        # zipfile doesn't check the number of members: one wrong byte can hide some in a comment.
        with path.open("rb") as file:
            file.seek(-22 - len(archive.comment), os.SEEK_END)
            magic, count = struct.unpack("<4s6xH", file.read(12))
        if magic != b"PK\x05\x06" or count not in (len(members), 0xFFFF):
            raise zipfile.BadZipFile(f"{len(members)} members of {count}")
    with archive:
        counts = Counter(member.filename for member in members)
        if twice := [name for name, count in counts.items() if count > 1]:
            raise InputError(f"several members are named {twice[0]!r}: save the file again")
        limit = FREE_BYTES + MAX_RATIO * path.stat().st_size
        if (total := sum(member.file_size for member in members)) > limit:
            raise InputError(
                f"would unpack to {total:,} bytes, more than {FREE_BYTES:,} and {MAX_RATIO} times "
                "its size: a zip bomb, or save it again uncompressed"
            )
        for member in members:
            if not member.filename.endswith(".npy"):
                raise InputError(
                    f"member {member.filename!r} is no .npy array: save arrays with numpy.savez. A "
                    "PyTorch .bin, .pt or .pth holds pickles and is never read: export safetensors"
                )
            if (array := _read_npy(archive, member)) is not None:
                yield member.filename.removesuffix(".npy"), array


def _read_npy(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray | None:
    """Reads one array; checks first that compressed, declared and array sizes agree.

    Passes over text, such as a config beside the weights: returns None, and logs its name.
    """
    name = member.filename.removesuffix(".npy")
    ratios = {zipfile.ZIP_STORED: 1, zipfile.ZIP_DEFLATED: DEFLATE_RATIO}
    if (ratio := ratios.get(member.compress_type)) is None:
        raise InputError(f"tensor {name!r} is compressed, and not by deflate: save the file again")
    if member.file_size > ratio * member.compress_size:
        raise InputError(
            f"tensor {name!r}: {member.compress_size:,} bytes cannot unpack to the "
            f"{member.file_size:,} declared: a zip bomb or a damaged file, fetch it again"
        )
    with _intact(f"tensor {name!r}"):
        stream = archive.open(member)
        descr, shape, order = _npy_header(stream)
    if _NPY_TEXT.fullmatch(descr):
        logging.info("passed over %r: it is text", name)
        return None
    if not _NPY_NUMBERS.fullmatch(descr):
        raise InputError(_not_numbers(name, descr))
    dtype = np.dtype(descr)
    size = math.prod(shape)
    if stream.tell() + size * dtype.itemsize != member.file_size:
        raise InputError(
            f"tensor {name!r} {shape} {dtype} is not of the {member.file_size:,} bytes that the "
            "archive declares: a damaged file, fetch or save it again"
        )
    with _intact(f"tensor {name!r}"), stream:
        array = np.empty(size, dtype)
        if stream.readinto(array.view(np.uint8)) != array.nbytes:
            raise EOFError("its data ends early")
        return array.reshape(shape, order=order)


def _npy_header(stream: IO[bytes]) -> tuple[str, tuple[int, ...], str]:
    """Returns the dtype string, the shape and the order ("C" or "F") of a .npy array."""
    version, _ = np.lib.format.read_magic(stream)
    length = int.from_bytes(stream.read(2 if version == 1 else 4), "little")
    header = stream.read(length)
    if not (match := _HEADER.fullmatch(header)):
        raise InputError(f"not the header of an array of numbers: {header[:80]!r}")
    descr, fortran, shape = (text.decode("latin1") for text in match.groups())
    return descr, tuple(map(int, re.findall(r"\d+", shape))), "F" if fortran == "True" else "C"


def _read_safetensors(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    with _intact("the file"):
        file = safetensors.safe_open(path, framework="numpy")
    with file:
        for name in file.keys():  # noqa: SIM118 (it is not a mapping)
            if not _SAFETENSORS_NUMBERS.fullmatch(dtype := file.get_slice(name).get_dtype()):
                raise InputError(_not_numbers(name, dtype))
            yield name, file.get_tensor(name)


_READERS = {".npz": _read_npz, ".safetensors": _read_safetensors}
