"""Writes embeddings of image files as Parquet, NumPy's npz or CSV while they are computed."""

import contextlib
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from vit_jax.classifier.labels import Row, csv_line, csv_name, opened_text
from vit_jax.config import InputError, unknown
from vit_jax.parallel.run_files import as_path, written_locally
from vit_jax.weights.files import atomic
from vit_jax.weights.trained import TrainedModel

Embedded = Iterable[tuple[str, np.ndarray | None, str]]  # see TrainedModel.iterate_features
_GROUP = 1024  # rows per write


def as_parquet(path: Path, rows: Embedded, files: Sequence[Path], width: int) -> None:
    """Writes columns file, features (float32 list, null if unreadable) and error (else null).

    `file` is text, or bytes if a name isn't UTF-8.
    """
    import pyarrow as pa
    from pyarrow import parquet

    names = [os.fspath(file) for file in files]
    text = all(name.isascii() or _is_utf8(name) for name in names)
    schema = pa.schema(
        {
            "file": pa.string() if text else pa.binary(),
            "features": pa.list_(pa.float32(), width),
            "error": pa.string(),
        }
    )
    with parquet.ParquetWriter(path, schema) as writer:
        for group in _groups(rows):
            found, features, errors = zip(*group, strict=True)
            columns = {
                "file": found if text else [os.fsencode(name) for name in found],
                "features": features,
                "error": [_as_utf8(error) or None for error in errors],
            }
            writer.write_table(pa.table(columns, schema))


def as_npz(path: Path, rows: Embedded, files: Sequence[Path], width: int) -> None:
    """Writes arrays features [N, D] float32 and files [N]; unreadable [M] and errors [M]."""
    found, unreadable, errors = [], [], []
    with tempfile.TemporaryFile(dir=path.parent) as kept:  # the array's header needs its length
        for file, features, error in rows:
            if features is None:
                unreadable.append(file)
                errors.append(error)
            else:
                found.append(file)
                kept.write(np.asarray(features, "<f4").tobytes())
        kept.seek(0)
        with zipfile.ZipFile(path, "w") as archive:
            with archive.open("features.npy", "w", force_zip64=True) as member:
                header = {"descr": "<f4", "fortran_order": False, "shape": (len(found), width)}
                np.lib.format.write_array_header_1_0(member, header)
                while chunk := kept.read(1 << 20):
                    member.write(chunk)
            texts = {"files": found, "unreadable": unreadable, "errors": errors}
            for name, values in texts.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, np.array(values, np.str_))


def as_csv(path: Path, rows: Embedded, files: Sequence[Path], width: int) -> None:
    """Writes columns file, feature_0, feature_1, ..., error; names as in the CSV of labels."""
    with opened_text(path) as output:
        output.write(csv_line(["file", *(f"feature_{i}" for i in range(width)), "error"]))
        for file, features, error in rows:
            cells = [""] * width if features is None else features
            output.write(csv_line([csv_name(file), *cells, error]))


WRITERS = {".parquet": as_parquet, ".npz": as_npz, ".csv": as_csv}


@contextlib.contextmanager
def opened_embeddings(
    output: str | os.PathLike,
) -> Iterator[Callable[[TrainedModel, Sequence[Path], int], list[Row]]]:
    """Yields a function (model, files, batch_size) that embeds image files into the file `output`.

    The function holds one batch at a time, and returns a row {"file", "error"} for each unreadable
    file. `output` appears complete at the end of the `with` block.

    Before anything is loaded, raises ValueError for an ending not in `WRITERS` or a missing
    package, and OSError for a folder that can't be written.
    """
    path = as_path(output)
    if (ending := path.suffix.lower()) not in WRITERS:
        raise unknown("ending of a file of embeddings", ending, WRITERS)
    if ending == ".parquet":
        try:
            import pyarrow  # noqa: F401
        except ImportError as error:
            raise InputError(
                f"{output}: .parquet needs a package that is not installed: pip install pyarrow, "
                "or write .npz or .csv"
            ) from error
    with written_locally(path) as local, atomic(local, path.suffix) as partial:
        partial.touch()

        def write(model: TrainedModel, files: Sequence[Path], batch_size: int) -> list[Row]:
            unreadable = []

            def rows() -> Embedded:
                for row in model.iterate_features(files, batch_size):
                    if row[1] is None:
                        unreadable.append({"file": row[0], "error": row[2]})
                    yield row

            width = model.features(np.zeros((0, *model.image_size, 3), np.uint8)).shape[1]
            WRITERS[ending](partial, rows(), files, width)
            return unreadable

        yield write


def _groups(rows: Embedded) -> Iterator[list]:
    group = []
    for row in rows:
        group.append(row)
        if len(group) == _GROUP:
            yield group
            group = []
    if group:
        yield group


def _is_utf8(text: str) -> bool:
    return _as_utf8(text) == text


def _as_utf8(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()
