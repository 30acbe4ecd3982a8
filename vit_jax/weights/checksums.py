"""Checksums of a checkpoint's files: a disk that returns other bytes is noticed.

`checksums.json` in a checkpoint's folder holds {file: [bytes, CRC-32]}. It is written before the
folder gets its name, so a complete checkpoint has it; those of earlier versions have none.
"""

import asyncio
import json
import os
import zlib
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from vit_jax.config import InputError
from vit_jax.parallel.run_files import as_path

FILE = "checksums.json"
_THREADS = 8  # zlib computes 2 GB/s on each, without Python's lock
_CHUNK = 1 << 20


def checksummed(temporary_path: type) -> type:
    """Returns a subclass of one of orbax's temporary folders that writes checksums at its end.

    orbax finishes the folder on one process, after all processes have written their files.
    """

    class Checksummed(temporary_path):
        async def finalize(self) -> None:
            folder = as_path(os.fspath(self.get()))
            if (folder / "model").is_dir():  # the checkpoint itself, not one of its items
                await asyncio.to_thread(write_checksums, folder)
            await super().finalize()

    return Checksummed


def write_checksums(folder: Path) -> None:
    """Writes the checksums of all files in the folders inside `folder`."""
    files = sorted(path for path in folder.glob("*/**/*") if path.is_file())
    with ThreadPoolExecutor(_THREADS) as threads:
        sums = [[size, checksum] for size, checksum in threads.map(_sum, files)]
    names = (path.relative_to(folder).as_posix() for path in files)
    (folder / FILE).write_text(json.dumps(dict(zip(names, sums, strict=True)), indent=0) + "\n")


def find_damage(
    folder: Path, items: Collection[str] | None = None, part: int = 0, parts: int = 1
) -> str:
    """Says which file isn't as it was written; "" if all are, or if there are no checksums.

    `items`: the folders to look into; by default all. Of several processes, each looks at its
    `part` of the files: every `parts`-th.

    Raises OSError for a file that is there and can't be read.
    """
    try:
        expected = json.loads((folder / FILE).read_bytes())
        rows = sorted(
            (name, int(size), int(checksum)) for name, (size, checksum) in expected.items()
        )
        if not rows:
            raise InputError("it is empty")
    except FileNotFoundError:
        return ""
    except (ValueError, TypeError, AttributeError) as error:
        return f"{FILE} is no list of checksums ({error})"
    rows = [row for row in rows if items is None or row[0].partition("/")[0] in items]

    def check(row: tuple[str, int, int]) -> str:
        name, size, checksum = row
        try:
            found = (folder / name).stat().st_size
            if found != size:
                return f"{name} has {found} bytes, not {size}"
            return "" if _sum(folder / name)[1] == checksum else f"{name} holds other bytes"
        except (FileNotFoundError, NotADirectoryError):
            return f"{name} is missing"

    with ThreadPoolExecutor(_THREADS) as threads:
        return next(filter(None, threads.map(check, rows[part::parts])), "")


def check_whole(folder: Path, items: Collection[str] | None = None) -> None:
    """ValueError if `find_damage` finds some, which names the checkpoint before this one."""
    if damage := find_damage(folder, items):
        earlier = [p for p in folder.parent.iterdir() if p.name.isdigit() and folder.name.isdigit()]
        earlier = [p for p in earlier if int(p.name) < int(folder.name)]
        newest = max(earlier, key=lambda p: int(p.name), default=None)
        advice = f"use the one before it, {newest}" if newest else "copy it again, or make it again"
        raise InputError(f"checkpoint {folder} is damaged ({damage}): {advice}")


def _sum(file: Path) -> tuple[int, int]:
    size = checksum = 0
    with file.open("rb") as opened:
        while chunk := opened.read(_CHUNK):
            size, checksum = size + len(chunk), zlib.crc32(chunk, checksum)
    return size, checksum
