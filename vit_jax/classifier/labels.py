"""Writes labels of image files as a table, CSV or JSON while they are computed."""

import contextlib
import csv
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from vit_jax.config import InputError, printable, unknown
from vit_jax.parallel.run_files import as_path, written_locally
from vit_jax.weights.trained import TrainedModel

Row = dict[str, Any]  # {"file", "labels": [[name, probability], ...]} or {"file", "error"}


def as_table(rows: Iterator[Row], files: Sequence[Path], top: int) -> Iterator[str]:
    """Yields aligned columns for a terminal."""
    width = max(len(printable(str(file))) for file in files)
    for row in rows:
        if "labels" in row:
            labels = "  ".join(f"{name} {p:6.1%}" for name, p in row["labels"])
            yield printable(f"{printable(row['file']):{width}}  {labels}") + "\n"


def csv_line(cells: list) -> str:
    """Returns a row of a CSV file, with its line break."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()


def csv_name(text: str) -> str:
    """Prefixes a name with ' if a spreadsheet would read it as a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def as_csv(rows: Iterator[Row], files: Sequence[Path], top: int) -> Iterator[str]:
    """Yields file, label, probability, label_2, ..., error; unreadable files only have an error."""
    suffixes = ["", *(f"_{i}" for i in range(2, top + 1))]
    columns = [f"{column}{suffix}" for suffix in suffixes for column in ("label", "probability")]
    yield csv_line(["file", *columns, "error"])
    for row in rows:
        cells = [cell for label, p in row.get("labels", ()) for cell in (csv_name(label), p)]
        cells += [""] * (len(columns) - len(cells))
        yield csv_line([csv_name(row["file"]), *cells, row.get("error", "")])


def as_json(rows: Iterator[Row], files: Sequence[Path], top: int) -> Iterator[str]:
    """Yields {"images": [{"file", "labels"}, ...], "unreadable": [{"file", "error"}, ...]}."""

    def text(row: Row) -> str:
        plain = json.dumps(row, ensure_ascii=False)
        return plain if plain.isprintable() else json.dumps(row)

    unreadable, separator = [], "\n    "
    yield '{\n  "images": ['
    for row in rows:
        if "labels" in row:
            yield separator + text(row)
            separator = ",\n    "
        else:
            unreadable.append("\n    " + text(row))
    yield f'\n  ],\n  "unreadable": [{",".join(unreadable)}\n  ]\n}}\n'


WRITERS = {"table": as_table, "csv": as_csv, "json": as_json}


def write_labels(
    model: TrainedModel,
    files: Sequence[Path],
    format: str = "table",
    output: str | os.PathLike | None = None,
    *,
    top: int = 3,
    batch_size: int = 32,
) -> list[Row]:
    """Labels files, writes labels while they are computed, and returns the rows with an error.

    Args:
      model: a model with a head.
      files: image files; unreadable ones don't stop the others.
      format: a name in `WRITERS`. In CSV, names that a spreadsheet would read as formulas are
        prefixed with '.
      output: a file, whose folder is created; None: the terminal.
      top: labels per image, the most probable first.
      batch_size: images per batch.

    Raises ValueError for an unknown format and for numbers below 1.
    """
    if format not in WRITERS:
        raise unknown("format of labels", format, WRITERS)
    if top < 1 or batch_size < 1:
        raise InputError(f"top = {top}, batch_size = {batch_size}: expected at least 1")
    unreadable = []

    def label() -> Iterator[Row]:
        for found in model.iterate_predictions(files, batch_size):
            if found.error:
                unreadable.append({"file": found.image, "error": found.error})
                yield unreadable[-1]
            else:
                labels = [[name, round(p, 6)] for name, p in found.top(top)]
                yield {"file": found.image, "labels": labels}

    with opened_output(output) as write:
        for text in WRITERS[format](label(), files, min(top, model.num_classes)):
            write(text)
    return unreadable


@contextlib.contextmanager
def opened_output(output: str | os.PathLike | None) -> Iterator[Callable[[str], Any]]:
    """Yields a function that writes to a file, whose folder is created, or to the terminal."""
    if not output:
        yield lambda text: print(printable(text), end="", flush=True)
        return
    with written_locally(as_path(output)) as path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with opened_text(path) as file:
            yield file.write


def opened_text(path: Path) -> IO[str]:
    """Opens a text file for writing; bytes of file names that aren't UTF-8 stay as they are."""
    return path.open("w", encoding="utf-8", errors="surrogateescape", newline="")


def report_unreadable(unreadable: Sequence[Row], total: int) -> None:
    """Lists unreadable files on stderr; ends the process if no file could be read."""
    if unreadable:
        print(f"{len(unreadable)} of {total} files can't be read:", file=sys.stderr)
        for row in unreadable:
            print(printable(f"  {row['file']}: {row['error']}"), file=sys.stderr)
    if len(unreadable) == total:
        sys.exit("error: no file could be read")
