"""Paths in a bucket, `gs://BUCKET/PATH` or `s3://BUCKET/PATH`, with the methods of `pathlib.Path`.

An object appears whole or not at all, and folders are no more than common beginnings of names. A
bucket can't append and can't rename: `rename` copies and deletes. Listings aren't cached, because
other processes write too.
"""

import io
import os
import posixpath
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, Self

import fsspec
from etils.epath.gpath import PosixGPath

from vit_jax.config import InputError

COMPLETE = "commit_success.txt"  # orbax's mark in a checkpoint that is complete
_PACKAGES = {"gs": "gcsfs", "s3": "s3fs"}


class BucketPath(PosixGPath):
    """A path in a bucket. Methods raise OSError, which names it, if the bucket doesn't answer."""

    def absolute(self) -> Self:
        return self

    def resolve(self, strict: bool = False) -> Self:
        return self

    def expanduser(self) -> Self:
        return self

    def exists(self) -> bool:
        try:
            self._info()
        except FileNotFoundError:
            return False
        return True

    def is_dir(self) -> bool:
        try:
            return self._info()["type"] == "directory"
        except FileNotFoundError:
            return False

    def is_file(self) -> bool:
        return self.exists() and not self.is_dir()

    def stat(self) -> SimpleNamespace:
        """Returns `st_size` in bytes and `st_mtime`, by the bucket's clock."""
        found = self._info()
        written = found.get("mtime") or found.get("LastModified")
        return SimpleNamespace(st_size=found["size"], st_mtime=written.timestamp())

    def iterdir(self) -> Iterator[Self]:
        names = {posixpath.basename(name.rstrip("/")) for name in self._ask("ls", detail=False)}
        yield from (self / name for name in sorted(names - {self.name, ""}))

    def glob(self, pattern: str) -> Iterator[Self]:
        bucket = os.fspath(self).removesuffix(self._name)
        try:
            names = (self / pattern)._ask("glob")
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{self}: there is no such bucket: make it first") from error
        yield from (type(self)(f"{bucket}{name}") for name in names)

    def open(
        self,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
    ) -> IO:
        """Opens for reading alone; `write_bytes` writes."""
        if mode not in ("r", "rb"):
            raise io.UnsupportedOperation(f"{self}: a bucket's objects are written as a whole")
        file = self._ask("open", "rb")
        if mode == "rb":
            return file
        return io.TextIOWrapper(file, encoding or "utf-8", errors, newline)

    def read_bytes(self) -> bytes:
        return self._ask("cat_file")

    def read_text(self, encoding: str | None = None, errors: str | None = None) -> str:
        return self.read_bytes().decode(encoding or "utf-8", errors or "strict")

    def write_bytes(self, data: bytes) -> int:
        self._ask("pipe_file", bytes(data))
        return len(data)

    def write_text(
        self,
        data: str,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
    ) -> int:
        return self.write_bytes(data.encode(encoding or "utf-8", errors or "strict"))

    def create(self, data: bytes) -> None:
        """Writes an object that isn't there; FileExistsError if it is. One of many succeeds.

        `data` tells this call from others: a request whose answer was lost is sent again.
        """
        try:
            self._ask("pipe_file", data, mode="create")
        except FileExistsError:
            if self.read_bytes() != data:
                raise

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        """Does nothing: a folder is there as soon as something is inside."""

    def unlink(self, missing_ok: bool = False) -> None:
        try:
            self._ask("rm_file")
        except FileNotFoundError:
            if not missing_ok:
                raise

    def rmtree(self, missing_ok: bool = False) -> None:
        """Removes all that is inside; a checkpoint is incomplete from the first moment on."""
        (self / COMPLETE).unlink(missing_ok=True)
        try:
            self._ask("rm", recursive=True)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def rename(self, target: str | os.PathLike) -> Self:
        """Copies an object, or all of a folder, and removes it here."""
        target, names = type(self)(target), self._files()
        for name in sorted(names, key=lambda name: name.endswith(COMPLETE)):  # the mark comes last
            self._below(name)._ask("cp_file", os.fspath(target._below(name)))
        if any(names):
            self.rmtree()
        else:
            self.unlink()
        return target

    def upload(self, local: Path) -> None:
        """Writes a local file, or all files of a local folder, the largest last."""
        if local.is_file():
            self._ask("put_file", str(local), own_last=True)
            return
        files = [path for path in local.rglob("*") if path.is_file()]
        for file in sorted(files, key=lambda path: path.stat().st_size):  # weights come last
            (self / file.relative_to(local).as_posix()).upload(file)

    def download(self, local: Path) -> None:
        """Reads an object, or all of a folder, to a local path."""
        for name in self._files():
            file = local / name if name else local
            file.parent.mkdir(parents=True, exist_ok=True)
            self._below(name)._ask("get_file", str(file))

    def _files(self) -> list[str]:
        """Names of all objects below, relative to this path; [""] for an object."""
        return [name[len(self._name) :].lstrip("/") for name in self._ask("find")]

    def _below(self, name: str) -> Self:
        return self / name if name else self

    @property
    def _name(self) -> str:
        """BUCKET/PATH."""
        return os.fspath(self).partition("://")[2]

    def _info(self) -> dict[str, Any]:
        return self._ask("info")

    def _ask(self, call: str, *arguments: Any, own_last: bool = False, **options: Any) -> Any:
        path = os.fspath(self)
        both = (*arguments, path) if own_last else (path, *arguments)
        try:
            return getattr(_storage(path.partition("://")[0]), call)(*both, **options)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{path}: no such object, folder or bucket") from error
        except FileExistsError as error:
            raise FileExistsError(f"{path} exists") from error
        except Exception as error:  # each library has its own network errors
            problem = f"{type(error).__name__}: {str(error).strip()[:200]}"
            raise OSError(
                f"{path}: the bucket can't be used ({problem}): check its name, the network, and "
                "the credentials (gcloud auth application-default login), then start again"
            ) from error


@cache
def _storage(scheme: str) -> fsspec.AbstractFileSystem:
    # epath, through which orbax and jax see a bucket, makes its own: without a memory, too.
    for protocol in ("gs", "gcs", "s3"):
        fsspec.config.conf.setdefault(protocol, {})["use_listings_cache"] = False
    if server := os.environ.get("STORAGE_EMULATOR_HOST"):  # gcsfs's name; that of array_record's
        os.environ.setdefault("CLOUD_STORAGE_EMULATOR_ENDPOINT", server)
    return fsspec.filesystem(scheme)


def open_bucket(address: str) -> BucketPath:
    """The path of an address; ValueError for another scheme, or one whose package is missing."""
    scheme, _, rest = address.partition("://")
    if scheme not in _PACKAGES or not rest.strip("/"):
        raise InputError(f"{address}: expected a folder, gs://BUCKET/PATH or s3://BUCKET/PATH")
    try:
        _storage(scheme)
    except ImportError as error:
        raise InputError(
            f"{address}: {scheme}:// needs a package that is not installed ({error}): "
            f"pip install {_PACKAGES[scheme]}"
        ) from error
    return BucketPath(address.rstrip("/"))
