"""Manifests of written datasets, with a checksum for every file."""

import concurrent.futures
import hashlib
import sys
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vit_jax.data.foreign_files import check_regular
from vit_jax.parallel.run_files import read_json

MANIFEST = "manifest.json"


def read_manifest(folder: Path) -> dict[str, Any]:
    """Reads the manifest of a dataset that `write_dataset` wrote.

    Raises FileNotFoundError for a folder without a manifest, ValueError for a damaged manifest.
    """
    file = folder / MANIFEST
    if not file.exists():
        raise FileNotFoundError(f"{folder} holds no {MANIFEST}: vit_jax.prepare did not write it")
    return read_json(file, f"copy it back, or prepare {folder} again", keys=("plan", "files"))


def verify(folder: Path) -> Iterator[str]:
    """Reads every file of a dataset and yields a message for each missing, added or changed one.

    Raises FileNotFoundError for a folder without a manifest.
    """
    expected = read_manifest(folder)["files"]
    found = {path.name for path in folder.iterdir()} - {MANIFEST}
    for name in sorted(expected.keys() - found):
        yield f"{folder / name} is missing"
    for name in sorted(found - expected.keys()):
        yield f"{folder / name} is not in the manifest"
    names = sorted(expected.keys() & found)
    size = sum(expected[name]["bytes"] for name in names)
    with concurrent.futures.ThreadPoolExecutor() as pool, progress_bar(size, "B") as bar:
        digests = pool.map(lambda name: file_sha256(folder / name), names)
        for name, digest in zip(names, digests, strict=True):
            bar.update(expected[name]["bytes"])
            if digest != expected[name]["sha256"]:
                yield (
                    f"{folder / name} has changed: sha256 {digest[:12]}, expected "
                    f"{expected[name]['sha256'][:12]}"
                )


def file_list(
    folder: Path, besides: Container[str], known: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Returns {name: size and checksum} of a folder's files; takes checksums in `known` from there.

    Leaves out the files named in `besides`.
    """
    files = {}
    for path in sorted(folder.iterdir()):
        if path.name not in besides:
            sha256 = known[path.name]["sha256"] if path.name in known else file_sha256(path)
            files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256}
    return files


def file_sha256(path: Path) -> str:
    check_regular(path)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def progress_bar(total: int, unit: str, initial: int = 0) -> tqdm:
    every = 0.2 if sys.stderr.isatty() else 30
    return tqdm(
        total=total,
        initial=initial,
        unit=unit,
        unit_scale=unit == "B",
        mininterval=every,
        dynamic_ncols=True,
    )
