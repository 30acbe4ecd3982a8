"""Small files of runs: locks, atomic writes, and JSON read with clear errors."""

import errno
import fcntl
import json
import os
import socket
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, ClassVar

from absl import logging

from vit_jax.config import InputError

# Errors of file systems without locks.
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class Lock:
    """Keeps other processes out of a folder while the object lives.

    The operating system holds the lock and releases it when the process ends, even if killed.
    Locking a folder again in the same process returns the same lock. Raises OSError that names the
    process which holds the lock. On a file system without locks it only logs a warning.
    """

    _held: ClassVar[weakref.WeakValueDictionary[str, "Lock"]] = weakref.WeakValueDictionary()

    def __new__(cls, folder: Path) -> "Lock":
        name = os.path.realpath(folder)
        if lock := cls._held.get(name):
            return lock
        lock = super().__new__(cls)
        lock._file = open(folder / ".lock", "a+")  # noqa: SIM115 (closed by __del__)
        lock_file(lock._file, f"another process uses {folder}")
        lock._file.truncate(0)
        lock._file.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock._file.flush()
        cls._held[name] = lock
        return lock

    def __del__(self):
        if hasattr(self, "_file"):
            self._file.close()


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
        named = f" ({owner})" if owner else ""
        raise OSError(f"{busy}{named}: wait for it to end, or choose another folder") from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        logging.log_first_n(
            logging.WARNING,
            "%s: this file system has no locks (%s). Do not start a second process on the folder",
            1,
            *(file.name, error.strerror),
        )


def write_whole(file: Path, text: str) -> None:
    """Writes a text file atomically: readers see all of it or none, even after a kill."""
    partial = file.with_name(f"{file.name}.partial")
    partial.write_text(text, "utf-8", "surrogatepass")  # undecodable file names
    partial.replace(file)


@contextmanager
def locked_output(file: Path) -> Iterator[Callable[[str], None]]:
    """Locks a result's file until the block ends; yields the function that writes it atomically.

    Raises OSError, before anything is computed, if the file can't be written or another process is
    about to write it.
    """
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
