r"""Labels image files with a checkpoint's own head.

vit_jax predict --model=runs/birds photos/*.jpg
vit_jax predict --model=runs/birds --format=csv --output=labels.csv photos/

`--model` is a run's workdir or any checkpoint that `convert` reads; folders stand for all images
inside. Files that can't be read are listed at the end and don't stop the others. Labels are written
as they come. In CSV a name that a spreadsheet would take for a formula has a ' in front.
"""

import contextlib
import csv
import dataclasses
import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from absl import flags

from vit_jax.command_line import run
from vit_jax.config import explained_errors, printable
from vit_jax.data.listing import find_images
from vit_jax.weights.trained import TrainedModel, load

MODEL = flags.DEFINE_string("model", None, "A run's workdir, or any checkpoint.")
FORMAT = flags.DEFINE_enum("format", "table", ["table", "csv", "json"], "How to write labels.")
OUTPUT = flags.DEFINE_string("output", None, "File to write to, not the terminal.")
TOP = flags.DEFINE_integer("top", 3, "Labels an image, the most probable first.")
TEMPERATURE = flags.DEFINE_float(
    "temperature", None, "Divides the logits; by default the one that was fitted on dev images."
)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "Images at a time.")
PREPROCESS = flags.DEFINE_string(
    "preprocess", None, "As in a recipe's data.preprocess; by default as the model was evaluated."
)


Row = dict[str, Any]  # {"file", "labels": [[name, probability], ...]} or {"file", "error"}


def label_files(model: TrainedModel, files: list[Path]) -> Iterator[Row]:
    """Labels the files, one after another."""
    for found in model.iterate_predictions(files, BATCH_SIZE.value):
        if found.error:
            yield {"file": found.image, "error": found.error}
        else:
            labels = [[name, round(p, 6)] for name, p in found.top(TOP.value)]
            yield {"file": found.image, "labels": labels}


def as_table(rows: Iterator[Row], files: list[Path], top: int) -> Iterator[str]:
    """Columns for people."""
    width = max(len(printable(str(file))) for file in files)
    for row in rows:
        if "labels" in row:
            labels = "  ".join(f"{name} {p:6.1%}" for name, p in row["labels"])
            yield printable(f"{printable(row['file']):{width}}  {labels}") + "\n"


def as_csv(rows: Iterator[Row], files: list[Path], top: int) -> Iterator[str]:
    """file, label, probability, label_2, ..., error; of unreadable files the error alone."""

    def line(cells: list) -> str:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerow(cells)
        return text.getvalue()

    def name(text: str) -> str:
        return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text

    suffixes = ["", *(f"_{i}" for i in range(2, top + 1))]
    columns = [f"{column}{suffix}" for suffix in suffixes for column in ("label", "probability")]
    yield line(["file", *columns, "error"])
    for row in rows:
        cells = [cell for label, p in row.get("labels", ()) for cell in (name(label), p)]
        cells += [""] * (len(columns) - len(cells))
        yield line([name(row["file"]), *cells, row.get("error", "")])


def as_json(rows: Iterator[Row], files: list[Path], top: int) -> Iterator[str]:
    """{"images": [{"file", "labels"}, ...], "unreadable": [{"file", "error"}, ...]}."""

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


@contextlib.contextmanager
def opened_output() -> Iterator[Callable[[str], Any]]:
    """A function that writes to --output, whose folder is made, or to the terminal."""
    if not OUTPUT.value:
        yield lambda text: print(printable(text), end="", flush=True)
        return
    path = Path(OUTPUT.value)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Bytes of file names that are no UTF-8 stay as they are.
    with path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        yield file.write


def main(arguments: list[str]) -> None:
    """Labels, writes, and says what could not be read."""
    unreadable = []

    def noted(rows: Iterator[Row]) -> Iterator[Row]:
        for row in rows:
            if "error" in row:
                unreadable.append(row)
            yield row

    with explained_errors():
        if TOP.value < 1 or BATCH_SIZE.value < 1 or (TEMPERATURE.value or 1.0) <= 0:
            raise ValueError("--top, --batch_size, --temperature: expected numbers greater than 0")
        files = find_images(arguments[1:])
        if not files:
            raise ValueError("no images: name files, or folders that hold some")
        model = load(MODEL.value)
        model = dataclasses.replace(
            model,
            temperature=TEMPERATURE.value or model.temperature,
            preprocessing=PREPROCESS.value or model.preprocessing,
        )
        with opened_output() as write:
            rows = noted(label_files(model, files))
            for text in WRITERS[FORMAT.value](rows, files, min(TOP.value, model.num_classes)):
                write(text)
    if unreadable:
        print(f"{len(unreadable)} of {len(files)} files can't be read:", file=sys.stderr)
        for row in unreadable:
            print(printable(f"  {row['file']}: {row['error']}"), file=sys.stderr)
    if len(unreadable) == len(files):
        sys.exit("error: no file could be read")


if __name__ == "__main__":
    run(main, "model", rest="IMAGE ...")
