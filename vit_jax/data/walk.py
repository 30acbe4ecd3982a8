"""Walks folders by the same rules for all commands, and lists left-out files by reason."""

import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from absl import logging

from vit_jax.config import InputError, printable

IMAGE_ENDINGS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".avif"),
)
NO_IMAGE = "not images by name, or in no class"
HIDDEN = "hidden or system files"
SPECIAL = "pipes, sockets or devices"
_UNREAD = {  # endings of images that aren't decoded -> what to do
    (".heic", ".heif", ".hif"): (
        "HEIC photographs, which aren't read (convert them: magick mogrify -format jpg *.heic)"
    ),
    (".cr2", ".cr3", ".nef", ".arw", ".dng", ".orf", ".rw2", ".raf", ".pef", ".srw"): (
        "cameras' raw files, which aren't read (export them as JPEG)"
    ),
    (".jxl", ".jp2", ".j2k", ".psd", ".svg", ".eps", ".ico", ".exr", ".tga", ".dcm"): (
        "images of a format that isn't read (convert them to JPEG or PNG)"
    ),
}
_LITTER = {  # besides names that begin with a dot: .DS_Store, ._photo.jpg, .ipynb_checkpoints
    *("__macosx", "@eadir", "#recycle", "@recycle", "@tmp", "$recycle.bin", "lost+found"),
    *("system volume information", "thumbs.db", "ehthumbs.db", "desktop.ini"),
}


def check_mounted(folder: str) -> None:
    """ValueError for a folder in a bucket, whose files a disk's readers can't read."""
    if "://" in folder:
        scheme, _, rest = folder.partition("://")
        bucket, _, below = rest.partition("/")
        tool = "mount-s3 --read-only" if scheme == "s3" else "gcsfuse --implicit-dirs -o ro"
        raise InputError(
            f"{folder}: images and prepared datasets are read from a folder: mount the bucket, "
            f"mkdir /mnt/{bucket} && {tool} {bucket} /mnt/{bucket}, and "
            f"name /mnt/{bucket}/{below}; or copy it to a disk"
        )


class Walker:
    """Lists folders below a root. Links are followed.

    Attributes:
      root: paths in `left_out` are relative to it.
      left_out: reason -> files and folders that were left out.
    """

    def __init__(self, root: Path):
        self.root = root
        self.left_out: dict[str, list[str]] = {}

    def entries(self, folder: Path) -> tuple[list[Path], list[Path]]:
        """Returns the folders and the regular files in a folder, sorted.

        Raises FileNotFoundError for a broken link, ValueError for a name with a line break.
        """
        folders, files = [], []
        for name in sorted(os.listdir(folder)):
            path = folder / name
            if name.startswith(".") or name.lower() in _LITTER:
                self.leave_out(path, HIDDEN)
                continue
            try:
                kind = stat.S_IFMT(os.stat(path).st_mode)
            except FileNotFoundError as error:
                target = os.readlink(path)
                raise FileNotFoundError(
                    f"{path} is a link to {target}, which isn't there"
                ) from error
            if "\n" in name or "\r" in name:  # tables and lists of classes have a row a line
                raise InputError(f"{str(path)!r} has a line break in its name: rename it")
            if kind == stat.S_IFDIR:
                folders.append(path)
            elif kind == stat.S_IFREG:
                files.append(path)
            else:
                self.leave_out(path, SPECIAL)
        return folders, files

    def images(self, folder: Path) -> Iterator[Path]:
        """Yields all images in a folder, at any depth, in the order of their paths.

        Raises as `entries`, and ValueError for a link to a folder that contains it.
        """
        todo: list[tuple[Path, tuple[tuple[int, int], ...] | None]] = [(folder, ())]
        while todo:
            path, above = todo.pop()
            if above is None:
                if is_image(path):
                    yield path
                else:
                    self.leave_out(path)
                continue
            status = os.stat(path)
            if (status.st_dev, status.st_ino) in above:
                raise InputError(f"{path} is a link to a folder that contains it")
            above = (*above, (status.st_dev, status.st_ino))
            folders, files = self.entries(path)
            inside = [*((f, above) for f in folders), *((f, None) for f in files)]
            todo += sorted(inside, key=lambda pair: pair[0], reverse=True)

    def leave_out(self, path: Path, reason: str = "") -> None:
        """Records a left-out path. The default reason depends on its name."""
        name = path.name.lower()
        reason = reason or next((r for e, r in _UNREAD.items() if name.endswith(e)), NO_IMAGE)
        self.left_out.setdefault(reason, []).append(str(path.relative_to(self.root)))

    def warn(self) -> None:
        """Logs the number of left-out files and the first of them, by reason."""
        for reason, paths in self.left_out.items():
            found = f"{self.root}: {len(paths)} files are {reason}: {shown(paths)}"
            logging.warning("%s", printable(found))


def shown(paths: Iterable[str], most: int = 5) -> str:
    """Lists the first few paths, for messages."""
    paths = list(paths)
    return ", ".join(paths[:most]) + (", ..." if len(paths) > most else "")


def is_image(file: Path) -> bool:
    return file.name.lower().endswith(IMAGE_ENDINGS)
