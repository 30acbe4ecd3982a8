"""Prepares images of any supported kind as a dataset that training reads quickly and exactly."""

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
from vit_jax.data.writer import WriteConfig, write_dataset


@dataclasses.dataclass(frozen=True)
class PreparedDataset:
    """A dataset on disk; `broken` names the images that were left out."""

    folder: Path
    name: str
    data_dir: str
    broken: tuple[str, ...] = ()

    def __str__(self) -> str:
        count = len(self.broken)
        return (
            f"{self.folder} is written"
            + (f"; {count} broken images are left out (see {MANIFEST})" if count else "")
            + ". Train on it with\n"
            + f"  --config.data.dataset={self.name} --config.data.data_dir={self.data_dir}"
        )


def prepare(
    source: str, output: str, name: str | None = None, version: str | None = None, **options: Any
) -> PreparedDataset:
    """Writes a dataset, or goes on where a killed call stopped.

    Args:
      source: a folder or table of images, IDX files, tars, or the name of a dataset of TFDS.
      output: folder of datasets, `data_dir` in recipes.
      name: of the dataset; by default the source's own.
      version: by default 1.0.0, or TFDS's own of a dataset it knows.
      **options: fields of `WriteConfig`.

    Raises ValueError and OSError, see `write_dataset`.
    """
    if "://" in output:
        raise InputError(f"output {output}: write to a disk and copy the folder then")
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
