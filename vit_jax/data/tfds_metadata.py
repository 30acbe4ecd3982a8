"""Checks a dataset's metadata before TFDS reads them. They come with the data and aren't trusted.

TFDS imports the module of every class that `features.json` names. It also makes a name for each
class and a path for each shard that the files claim.
"""

import json
import os
from collections.abc import Iterator
from typing import Any

from etils import epath

from vit_jax.config import InputError
from vit_jax.data.foreign_files import check_regular

METADATA = "features.json"  # in every folder of a TFDS dataset
INFO = "dataset_info.json"
MAX_BYTES = 64 << 20  # of a metadata file
MAX_CLASSES = 1 << 20
MAX_SHARDS = 1 << 17
_CLASS_KEYS = ("type", "pythonClassName", "python_class_name")
_COUNT_KEYS = ("numClasses", "num_classes")


def check_metadata(folder: epath.Path) -> None:
    """Rejects metadata that would import code, or take minutes or all memory to read.

    Raises ValueError that names the file.
    """
    import tensorflow_datasets as tfds

    known = {
        f"{feature.__module__}.{feature.__name__}"
        for feature in vars(tfds.features).values()
        if isinstance(feature, type) and issubclass(feature, tfds.features.FeatureConnector)
    }
    file = folder / METADATA
    for key, value in _entries(_read(file), file):
        if key in _CLASS_KEYS and isinstance(value, str) and value not in known:
            raise InputError(
                f"{file} names the class {value!r}, which TFDS would import and run: expected one "
                f"of its own features, {', '.join(sorted(name.split('.')[-1] for name in known))}"
            )
        if key in _COUNT_KEYS and not 0 <= _number(value, file) <= MAX_CLASSES:
            raise InputError(f"{file}: {value} classes: expected up to {MAX_CLASSES:,}")
    file = folder / INFO
    if not file.exists():
        return  # written by an old TFDS, as TFDS's own error says
    shards = 0
    for key, value in _entries(_read(file), file):
        if key in ("shardLengths", "shard_lengths") and isinstance(value, list):
            shards += len(value)
    if shards > MAX_SHARDS:
        raise InputError(f"{file} lists {shards:,} shards: expected up to {MAX_SHARDS:,}")


def _read(file: epath.Path) -> Any:
    if os.path.exists(file):  # it may be in a bucket
        check_regular(file)
    if (size := file.stat().length) > MAX_BYTES:
        raise InputError(f"{file} has {size:,} bytes: expected up to {MAX_BYTES:,}")
    try:
        return json.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is not readable JSON: {error}") from error


def _entries(content: Any, file: epath.Path) -> Iterator[tuple[str, Any]]:
    """Yields all (key, value) at any depth, also in strings of JSON, which TFDS parses too."""
    todo = [content]
    while todo:
        value = todo.pop()
        if isinstance(value, dict):
            yield from value.items()
            todo += value.values()
        elif isinstance(value, list):
            todo += value
        elif isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
            try:
                todo.append(json.loads(value))
            except ValueError:
                continue  # a description, not JSON
            except RecursionError as error:
                raise InputError(f"{file} holds JSON that is too deep: {error}") from error


def _number(value: Any, file: epath.Path) -> int:
    try:
        return int(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{file}: {value!r} classes: expected a number") from error
