"""Converts image datasets of any supported kind to ArrayRecord, which training reads fast."""

import dataclasses
import re
import sys
from pathlib import Path
from typing import Any

from vit_jax.config import InputError
from vit_jax.data.array_records import build_with_tfds
from vit_jax.data.manifest import MANIFEST, read_manifest
from vit_jax.data.sources import is_path, open_path
from vit_jax.data.tfds_metadata import METADATA
from vit_jax.data.walk import check_mounted
from vit_jax.data.writer import WriteConfig, write_dataset


@dataclasses.dataclass(frozen=True)
class PreparedDataset:
    """A dataset on disk; `broken` lists the images that were left out."""

    folder: Path
    name: str
    data_dir: str
    broken: tuple[dict, ...] = ()  # {split, file, reason}

    def __str__(self) -> str:
        count = len(self.broken)
        return (
            f"{self.folder} is written"
            + (f"; {count} broken images were left out (see {MANIFEST})" if count else "")
            + ". Train on it with\n"
            + f"  --config.data.dataset={self.name} --config.data.data_dir={self.data_dir}"
        )


def prepare(
    source: str, output: str, name: str | None = None, version: str | None = None, **options: Any
) -> PreparedDataset:
    """Writes a dataset, or resumes where a killed call stopped.

    Args:
      source: a folder or table of images, IDX files, tars, or the name of a TFDS dataset.
      output: folder of datasets, `data_dir` in recipes.
      name: the dataset's name; by default derived from the source's.
      version: by default 1.0.0, or TFDS's version if it knows a dataset of this name.
      **options: fields of `WriteConfig`.

    Raises ValueError and OSError, see `write_dataset`.
    """
    if "://" in output:
        raise InputError(f"output {output}: expected a local folder. Write there, then copy it")
    check_mounted(source)
    if not is_path(source):
        return PreparedDataset(Path(build_with_tfds(source, output)), source, output)
    path = Path(source).expanduser().resolve()
    if (path / METADATA).exists():
        raise InputError(
            f"{path} is a dataset of TFDS already. If it isn't in ArrayRecord format: tfds "
            f"convert_format --dataset_version_dir={path} --out_file_format=array_record"
        )
    stem = path.stem if path.is_file() else path.name
    name = name or re.sub(r"[^a-z0-9]+", "_", stem.lower())
    listing = open_path(str(path))
    splits = ", ".join(f"{len(records)} in {split}" for split, records in listing.splits.items())
    print(f"{path}: {listing.kind}, {listing.num_classes} classes, {splits}", file=sys.stderr)
    data_dir = Path(output).expanduser()
    folder = write_dataset(listing, data_dir, name, version, WriteConfig(**options))
    return PreparedDataset(folder, name, output, tuple(read_manifest(folder)["broken"]))
