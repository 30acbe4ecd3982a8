"""Reads untrusted files, and distinguishes broken files from faults of the machine.

A broken file may be left out or skipped. A fault of the machine (no file descriptors, no memory, a
failing disk or mount) says nothing about the file and is always raised.
"""

import errno
import os
import resource
import stat
from functools import cache

from vit_jax.config import InputError
from vit_jax.parallel.run_files import as_path

MAX_BYTES = 2 << 30  # of an encoded image; 200 megapixels with 16 bits a channel are 1.2 GB
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_SYSTEM = (
    *(errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.ENOSPC, errno.EDQUOT),
    *(errno.ESTALE, errno.EACCES, errno.EPERM, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN),
)


def read_file(path: str | os.PathLike, most: int = MAX_BYTES) -> bytes:
    """Reads a regular file, or an object in a bucket.

    Raises ValueError if the file is missing, is a folder, pipe, socket or device (also through a
    link), or has more than `most` bytes. Raises OSError for a fault of the machine.
    """
    if "://" in os.fspath(path):
        return as_path(path).read_bytes()
    try:
        check_regular(path)
        with open(path, "rb") as file:
            if (size := os.fstat(file.fileno()).st_size) > most:
                raise InputError(f"{path} has {size:,} bytes: expected up to {most:,}")
            return file.read()
    except OSError as error:
        if fault := system_error(error):
            raise fault from error
        raise InputError(f"cannot read it ({error})") from error


def check_regular(path: str | os.PathLike) -> None:
    """Raises ValueError if the path exists but isn't a regular file: a read might never end."""
    kind = stat.S_IFMT(os.stat(path).st_mode)
    if kind != stat.S_IFREG:
        raise InputError(f"{os.fspath(path)} is {_KINDS.get(kind, 'special')}: expected a file")


def system_error(error: Exception) -> OSError | MemoryError | None:
    """Returns the fault of the machine behind an exception, or None.

    Libraries report such faults only as text in exceptions of other types.
    """
    if isinstance(error, MemoryError):
        return error
    if isinstance(error, OSError) and error.errno:
        return error if error.errno in _SYSTEM else None
    text = str(error)
    if "out of memory" in text.lower():
        return MemoryError(text)
    return next((OSError(n, text) for n in _SYSTEM if os.strerror(n) in text), None)


@cache
def open_files_limit() -> int:
    """Raises this process's limit of open files as far as allowed, and returns it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 1 << 16 if hard == resource.RLIM_INFINITY else min(hard, 1 << 16)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return wanted
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (ValueError, OSError):  # in a sandbox, or on macOS, whose own limit is lower
        return soft
    return wanted
