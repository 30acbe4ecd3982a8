"""Reads files that come from anybody, and tells a fault of the machine from a broken file.

A broken file may be left out or skipped. A fault of the machine (no descriptors, no memory, a disk
or a mount that fails) says nothing of the file, and is never passed over.
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
    """All bytes of a regular file, or of an object in a bucket.

    Raises ValueError for a file that isn't there, is a folder, a pipe, a socket or a device (also
    through a link), or has more than `most` bytes; OSError for a fault of the machine.
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
    """ValueError for what is there but no regular file: reading it might never end."""
    kind = stat.S_IFMT(os.stat(path).st_mode)
    if kind != stat.S_IFREG:
        raise InputError(f"{os.fspath(path)} is {_KINDS.get(kind, 'special')}: expected a file")


def system_error(error: Exception) -> OSError | MemoryError | None:
    """The fault of the machine that an exception tells of; libraries have it as text."""
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
    """Raises this process's limit of open files as far as it may, and returns it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 1 << 16 if hard == resource.RLIM_INFINITY else min(hard, 1 << 16)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return wanted
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (ValueError, OSError):  # a sandbox, or macOS, which has a limit of its own below
        return soft
    return wanted
