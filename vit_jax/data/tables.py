"""Reads and writes tables (CSV, TSV, JSON Lines) of image files and their labels."""

import csv
import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from vit_jax.config import InputError, unknown
from vit_jax.data.foreign_files import read_file
from vit_jax.data.listing import SPLIT_FOLDERS, ImageFiles, Listing
from vit_jax.parallel.run_files import write_whole

TABLES = (".csv", ".tsv", ".jsonl")
CLASS_NAMES = "classes.txt"  # beside a table or tars: one class per line, the only valid labels
_UNDECODABLE = "surrogatepass"  # file names may hold bytes that aren't UTF-8
MAX_CLASSES = 1 << 24  # a larger label is taken for a mistake


def read_table(path: Path) -> Listing:
    """Lists the images that a `.csv`, `.tsv` or `.jsonl` file names.

    Its columns (keys in JSON Lines) are:

    - `path`: relative to the table's folder, or absolute;
    - `label`: a class's name, or its number counted from 0; or, for a multi-label set, `labels`: a
      list of them (in CSV joined by |);
    - `split`: optional; train by default.

    If the table's folder holds a `classes.txt` with one class per line, these are the classes.
    Otherwise names are sorted, and the highest number is the last class.

    Raises:
      ValueError: a column is missing, a label is malformed or out of range, names and numbers are
        mixed, or an image is in two splits. The message names the line.
      FileNotFoundError: an image is missing.
    """
    files, splits, labels, places = [], [], [], []
    first = {}  # file -> the split and line that name it first
    several = None
    for line, row in _table_rows(path):
        place = f"{path}, line {line}"
        columns = [k for k, v in row.items() if v is not None and (v != "" or k == "labels")]
        several = "labels" in row if several is None else several
        if not {"path", "labels" if several else "label"} <= {*columns}:
            raise InputError(
                f"{place} has {', '.join(map(str, columns)) or 'nothing'}: expected values for "
                "path, label (or, in all lines, labels), and optionally split"
            )
        file, split = str(row["path"]), str(row.get("split") or "train")
        if (known := split.strip().lower()) in SPLIT_FOLDERS:  # "Train " and train are the same
            split = known
        other_split, other_line = first.setdefault(os.path.normpath(file), (split, line))
        if other_split != split:
            raise InputError(
                f"{place}: {file} is in {split}, and by line {other_line} in {other_split}: "
                "splits must not overlap"
            )
        if not os.path.isfile(path.parent / file):
            raise FileNotFoundError(f"{place}: there is no file {path.parent / file}")
        label = row["labels"] if several else row["label"]
        if several and isinstance(label, str):
            label = label.split("|") if label else []
        if several != isinstance(label, list):
            raise InputError(f"{place}: labels {label!r}: expected a list, and one in each line")
        files.append(file)
        splits.append(split)
        labels.append(label)
        places.append(place)
    if not files:
        raise InputError(f"{path} has no rows: expected at least one image")

    numbers, classes = number_labels(labels, places, class_names_beside(path))
    records = {}
    for split in dict.fromkeys(splits):
        rows = [row for row, other in enumerate(splits) if other == split]
        records[split] = ImageFiles(
            str(path.parent), [files[row] for row in rows], [numbers[row] for row in rows]
        )
    return Listing("table of images", records, *classes)


def _table_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line number, {column: value}) of each row."""
    text = read_text(path)
    if path.suffix.lower() == ".jsonl":
        for line, row in enumerate(text.split("\n"), 1):
            if row.strip():
                try:
                    values = json.loads(row)
                except (ValueError, RecursionError) as error:
                    raise InputError(f"{path}, line {line} is not JSON: {error}") from error
                if not isinstance(values, dict):
                    raise InputError(f"{path}, line {line}: expected a JSON object")
                yield line, values
        return
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    rows = csv.DictReader(
        io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True
    )
    line = 1
    try:
        if "path" not in (rows.fieldnames or ()):
            raise InputError(
                f"{path} begins with {rows.fieldnames}: expected a line of column names: "
                "path, label (or labels), and optionally split"
            )
        line = rows.line_num + 1
        for row in rows:
            values = [v for v in row.values() if isinstance(v, str)]
            if any("\n" in value or "\r" in value for value in values):
                raise csv.Error("a value goes on in the next line")
            if None in row:
                raise csv.Error(f"there are more values than columns: {row[None]}")
            yield rows.line_num, row
            line = rows.line_num + 1
    except csv.Error as error:
        raise InputError(
            f'{path}, line {line}: {error}. Is there a stray quote ("), or one missing around a '
            "value with a quote or a separator?"
        ) from error


def write_table(path: Path, rows: Iterable[tuple[str, str, str]]) -> None:
    """Writes (path, label, split) rows as CSV, which `read_table` reads back unchanged.

    Names may hold anything but line breaks, also bytes that aren't UTF-8.
    """

    def quoted(value: str) -> str:
        needed = value.startswith(" ") or any(c in value for c in '",')
        return '"' + value.replace('"', '""') + '"' if needed else value

    lines = (",".join(map(quoted, row)) + "\r\n" for row in [("path", "label", "split"), *rows])
    write_whole(path, "".join(lines))


def read_text(path: Path) -> str:
    """Reads UTF-8 text with or without a byte order mark. ValueError for other encodings."""
    try:
        return read_file(path).decode("utf-8-sig", _UNDECODABLE)
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error}): save it as UTF-8") from error


def write_class_names(folder: Path, names: Iterable[str]) -> None:
    """Writes the list that `class_names_beside` reads."""
    text = "".join(f"{name}\n" for name in names)
    text = "\ufeff" * text.startswith("\ufeff") + text  # readers drop the first as a mark
    (folder / CLASS_NAMES).write_bytes(text.encode("utf-8", _UNDECODABLE))


def class_names_beside(path: Path) -> tuple[str, ...] | None:
    """Returns the classes in the `classes.txt` beside this file; None if there is none."""
    file = path.parent / CLASS_NAMES
    if not file.exists():
        return None
    lines = read_text(file).removesuffix("\n").split("\n")  # a name may hold other separators
    names = tuple(line.removesuffix("\r") for line in lines)
    if len(set(names)) < len(names) or not all(names):
        raise InputError(f"{file}: expected one class per line, none empty or repeated")
    return names


def number_labels(
    labels: Sequence[str | int | list[str | int]],
    places: Sequence[str],
    names: tuple[str, ...] | None,
) -> tuple[list[int] | list[tuple[int, ...]], tuple[int, tuple[str, ...] | None, int | None]]:
    """Converts labels, given as names or numbers, to numbers.

    Args:
      labels: for each example a name or a number (possibly as text); for a multi-label set, a list
        of them.
      places: where each example's labels are, for messages.
      names: the classes' names, if they are known.

    Returns:
      Each example's number or tuple of numbers; and `Listing`'s (num_classes, class_names,
      labels_per_example). If `names` is None, names in `labels` are sorted, and the highest number
      is the last class.

    Raises:
      ValueError: a label is malformed, unknown or out of range. The message names its place.
    """
    several = any(isinstance(example, list) for example in labels)
    given = {}  # distinct label -> the first place
    for example, place in zip(labels, places, strict=True):
        if several and not isinstance(example, list):
            raise InputError(f"{place}: label {example!r}: expected a list, as others have")
        for label in example if several else [example]:
            if type(label) not in (str, int) or label == "":
                raise InputError(f"{place}: label {label!r}: expected a class's name or number")
            if "\n" in str(label) or "\r" in str(label):
                raise InputError(f"{place}: label {label!r}: expected a name without line breaks")
            given.setdefault(label, place)
    numeric = {label for label in given if re.fullmatch(r"-?\d+", str(label))}
    if names is not None and set(map(str, given)) <= set(names):
        numeric = set()  # "7" is the name of a class
    if numeric and len(numeric) < len(given):
        number, name = sorted(numeric, key=str)[0], sorted(given.keys() - numeric)[0]
        raise InputError(
            f"{given[number]} has the label {number!r}, {given[name]} {name!r}: expected all of "
            f"them to be numbers or all names (a {CLASS_NAMES} beside makes numbers names)"
        )
    if numeric:
        index = {k: int(k) if len(str(k)) < 20 else MAX_CLASSES for k in given}
        for label, place in given.items():
            if not 0 <= index[label] < (len(names) if names else MAX_CLASSES):
                raise InputError(
                    f"{place}: label {label}: expected 0 <= label < "
                    f"{len(names) if names else MAX_CLASSES}"
                )
    else:
        names = names or tuple(sorted(map(str, given)))
        known = {name: i for i, name in enumerate(names)}
        for label, place in given.items():
            if str(label) not in known:
                raise InputError(f"{place}: {unknown('class', str(label), names)}")
        index = {label: known[str(label)] for label in given}
    num_classes = len(names) if names else 1 + max(index.values(), default=0)
    if not several:
        return [index[label] for label in labels], (num_classes, names, None)
    numbers = [tuple(index[label] for label in example) for example in labels]
    return numbers, (num_classes, names, max(1, *map(len, numbers)))
