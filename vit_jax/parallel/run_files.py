"""The files of runs, on a disk or in a bucket: locked, and written whole or not at all.

`as_path` makes the path of an address. Here is what pathlib's methods can't do for both.
"""

import errno
import fcntl
import json
import os
import shutil
import socket
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import IO, Any, ClassVar

from absl import logging

from vit_jax.config import InputError
from vit_jax.parallel.claims import Claims

# Errors of file systems without locks.
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


# In a bucket a lock is a claim. After so many seconds without a sign of life it is another's.
_LEASE = 120.0
_SELDOM = 30.0  # seconds between two writes of an object that is written in passing


def as_path(name: str | os.PathLike) -> Path:
    """The path of a folder or file, `gs://BUCKET/PATH` and `s3://BUCKET/PATH` included.

    Raises ValueError for another scheme, and for one whose package isn't installed.
    """
    if isinstance(name, PurePath):
        return name
    if "://" not in os.fspath(name):
        return Path(name)
    from vit_jax.parallel.buckets import open_bucket

    return open_bucket(os.fspath(name))


class Lock:
    """Keeps other processes out of a folder while the object lives.

    On a disk the operating system holds the lock and releases it when the process ends, even if
    killed. In a bucket it is a claim that the process renews; the claim of a process that has ended
    is free on its machine at once, elsewhere after `_LEASE` seconds. Locking a folder again in the
    same process returns the same lock. Raises OSError that names the process which holds the lock.
    On a file system without locks it only logs a warning.
    """

    _held: ClassVar[weakref.WeakValueDictionary[str, "Lock"]] = weakref.WeakValueDictionary()

    def __new__(cls, folder: Path) -> "Lock":
        name = os.path.realpath(folder) if isinstance(folder, Path) else str(folder)
        if lock := cls._held.get(name):
            return lock
        lock = super().__new__(cls)
        release = _lock_on_disk(folder) if isinstance(folder, Path) else _claim(folder)
        weakref.finalize(lock, release)
        cls._held[name] = lock
        return lock


def _lock_on_disk(folder: Path) -> Callable[[], None]:
    """Locks a folder; returns what unlocks it."""
    file = open(folder / ".lock", "a+")  # noqa: SIM115 (what is returned closes it)
    lock_file(file, f"another process uses {folder}")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file.close


def _claim(folder: Path) -> Callable[[], None]:
    """Claims a folder in a bucket; returns what gives it back.

    A process of another machine that may have ended is watched until it shows that it lives, which
    is an error, or its claim has run out.
    """
    claims, before = Claims(folder / ".lock", _LEASE), None
    while not (held := claims.take("run")):
        claim = claims.newest("run")
        renewed = before and (claim.number > before.number or claim.age < before.age)
        if claim.is_here or renewed:
            host, _, pid = claim.owner.rpartition(":")
            raise OSError(_busy(f"another process uses {folder}", f"process {pid} on {host}"))
        if before is None:
            logging.warning("%s: waiting to see whether %s has ended", folder, claim.owner)
        before = claim
        time.sleep(_LEASE / 24)
    held.__enter__()

    def give_back() -> None:
        try:
            held.__exit__()
        except OSError as error:
            logging.warning("%s: its lock ends by itself in %g s: %s", folder, _LEASE, error)

    return give_back


def lock_file(file: IO, busy: str, wait: bool = False) -> None:
    """Locks an open file until it is closed; if it is locked, waits or raises OSError.

    `busy` is the warning before it waits, and the beginning of the error.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        if wait:
            logging.warning("%s: waiting for it", busy)
            fcntl.flock(file, fcntl.LOCK_EX)
            return
        file.seek(0)
        owner = file.readline(200) if "b" not in file.mode else ""
        raise OSError(_busy(busy, owner)) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        logging.log_first_n(
            logging.WARNING,
            "%s: this file system has no locks (%s). Do not start a second process on the folder",
            1,
            *(file.name, error.strerror),
        )


def _busy(busy: str, owner: str) -> str:
    named = f" ({owner})" if owner else ""
    return f"{busy}{named}: wait for it to end, or choose another folder"


def write_whole(file: Path, content: str | bytes) -> None:
    """Writes a file atomically: readers see all of it or none, even after a kill."""
    data = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
    if not isinstance(file, Path):
        file.write_bytes(data)
        return
    partial = file.with_name(f"{file.name}.partial")
    partial.write_bytes(data)
    partial.replace(file)


class Rewritten:
    """A file that is written again and again, on a disk each time.

    In a bucket what is written in passing is written in the background, and seldom: the newest
    content follows with the next write.
    """

    def __init__(self, file: Path):
        self._file, self._due, self._under_way = file, 0.0, None
        self._thread = None if isinstance(file, Path) else ThreadPoolExecutor(1)

    def write(self, text: str, in_passing: bool = False) -> None:
        """Writes; the file holds `text` when this returns, unless `in_passing`."""
        under_way: Future | None = self._under_way
        if in_passing and self._thread:
            if time.monotonic() >= self._due and (under_way is None or under_way.done()):
                self._wait()
                self._due = time.monotonic() + _SELDOM
                self._under_way = self._thread.submit(write_whole, self._file, text)
            return
        self._wait()
        write_whole(self._file, text)

    def _wait(self) -> None:
        under_way, self._under_way = self._under_way, None
        if under_way:
            under_way.result()


class Lines:
    """Appends lines to a file: the interface of an open file. In a bucket `flush` keeps them."""

    def __init__(self, file: Path):
        self._text = [file.read_text()] if file.exists() else []
        self._file, self._kept = Rewritten(file), len(self._text)

    def write(self, line: str) -> None:
        self._text.append(line)
        self._file.write("".join(self._text), in_passing=True)

    def flush(self) -> None:
        if len(self._text) > self._kept:
            self._file.write("".join(self._text))
            self._kept = len(self._text)

    close = flush


def open_lines(file: Path) -> IO | Lines:
    """Opens a text file to append whole lines to; `flush` makes sure that they are there."""
    return file.open("a", buffering=1) if isinstance(file, Path) else Lines(file)


def check_holds_checkpoints(folder: Path) -> Path:
    """Returns the folder; ValueError for one at s3://, where orbax can't keep checkpoints."""
    if str(folder).startswith("s3://"):
        raise InputError(
            f"{folder}: checkpoints are kept on a disk or at gs://, orbax doesn't support s3://: "
            "mount the bucket (mount-s3), or use another folder"
        )
    return folder


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint's folder is complete: on a disk it has no name before that."""
    if isinstance(checkpoint, Path):
        return True
    from vit_jax.parallel.buckets import COMPLETE

    return (checkpoint / COMPLETE).exists()


def saved_steps(workdir: Path) -> list[int]:
    """Returns the steps of complete checkpoints."""
    folder = workdir / "checkpoints"
    found = folder.iterdir() if folder.is_dir() else ()
    return [int(p.name) for p in found if p.name.isdigit() and is_complete(p)]


def remove_tree(folder: Path) -> None:
    """Removes a folder, if it is there."""
    if isinstance(folder, Path):
        shutil.rmtree(folder, ignore_errors=True)
    else:
        folder.rmtree(missing_ok=True)


@contextmanager
def written_locally(path: Path) -> Iterator[Path]:
    """Yields a local path to write to: `path`, or one from which it is then copied there.

    What lies beside it is copied too, before it.
    """
    if isinstance(path, Path):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / path.name
        for entry in sorted(Path(folder).iterdir(), key=lambda entry: entry.name == path.name):
            path.with_name(entry.name).upload(entry)


@contextmanager
def read_locally(path: Path) -> Iterator[Path]:
    """Yields a local path to read a file or folder from: `path`, or a copy for the time being."""
    if isinstance(path, Path):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        path.download(Path(folder) / path.name)
        yield Path(folder) / path.name


@contextmanager
def locked_output(file: Path) -> Iterator[Callable[[str], None]]:
    """Locks a result's file until the block ends; yields the function that writes it atomically.

    Raises OSError, before anything is computed, if the file can't be written or another process is
    about to write it.
    """
    if not isinstance(file, Path):
        yield lambda text: write_whole(file, text)
        return
    if file.is_dir():
        raise IsADirectoryError(f"output {file} is a folder: expected a file")
    if file.exists() and not file.is_file():  # /dev/stdout
        yield file.write_text
        return
    file = Path(os.path.realpath(file))
    partial = file.with_name(f"{file.name}.partial")
    with open(partial, "a+") as opened:
        lock_file(opened, f"another process writes {file}")

        def fill(text: str) -> None:
            opened.truncate(0)
            opened.write(text)
            opened.flush()

        def write(text: str) -> None:
            fill(text)
            partial.replace(file)

        fill(f"process {os.getpid()} on {socket.gethostname()}")
        try:
            yield write
        finally:
            partial.unlink(missing_ok=True)


def read_json(file: Path, remedy: str, kind: type = dict, keys: tuple[str, ...] = ()) -> Any:
    """Reads a JSON file: a dict with these keys, or a list of such dicts.

    Otherwise raises ValueError that names the file and ends with `remedy`, which says what to do.
    """
    try:
        content = json.loads(file.read_bytes())
        if not isinstance(content, kind):
            raise InputError(f"expected a {kind.__name__}, found {str(content)[:40]!r}")
        for entry in [content] if kind is dict else content:
            if missing := [key for key in keys if not isinstance(entry, dict) or key not in entry]:
                raise InputError(f"it lacks {', '.join(missing)}")
    except ValueError as error:  # includes JSON's and UTF-8's errors
        raise InputError(f"{file} is damaged ({error}): {remedy}") from error
    return content
