r"""Labels image files with a checkpoint's own head.

python -m vit_jax.predict --model=runs/birds photos/*.jpg
python -m vit_jax.predict --model=runs/birds --format=csv --output=labels.csv photos/

`--model` is a run's workdir or any checkpoint that `convert` reads; folders stand for all images
inside. Files that can't be read are listed at the end and don't stop the others.
"""

import csv
import dataclasses
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import app, flags

from vit_jax import config as configuration
from vit_jax.data.listing import find_images
from vit_jax.weights.trained import load

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
flags.mark_flag_as_required("model")


def label_files(files: list[Path]) -> tuple[list[dict], list[dict]]:
    """Returns ({"file", "labels": [[name, probability], ...]}, {"file", "error"}) for the flags."""
    model = load(MODEL.value)
    if TOP.value < 1 or BATCH_SIZE.value < 1 or (TEMPERATURE.value or 1.0) <= 0:
        raise ValueError("--top, --batch_size, --temperature: expected numbers greater than 0")
    model = dataclasses.replace(
        model,
        temperature=TEMPERATURE.value or model.temperature,
        preprocessing=PREPROCESS.value or model.preprocessing,
    )
    labelled, unreadable = [], []
    for found in model.iterate_predictions(files, BATCH_SIZE.value):
        if found.error:
            unreadable.append({"file": found.image, "error": found.error})
        else:
            labels = [[name, round(p, 6)] for name, p in found.top(TOP.value)]
            labelled.append({"file": found.image, "labels": labels})
    return labelled, unreadable


def as_table(labelled: list[dict], unreadable: list[dict]) -> str:
    """Columns for people."""
    width = max((len(row["file"]) for row in labelled), default=0)
    lines = [
        f"{row['file']:{width}}  " + "  ".join(f"{name} {p:6.1%}" for name, p in row["labels"])
        for row in labelled
    ]
    return "".join(line + "\n" for line in lines)


def as_csv(labelled: list[dict], unreadable: list[dict]) -> str:
    """file, label, probability, label_2, ...; of unreadable files the error alone."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    count = max((len(row["labels"]) for row in labelled), default=1)
    suffixes = ["", *(f"_{i}" for i in range(2, count + 1))]
    columns = [f"{name}{suffix}" for suffix in suffixes for name in ("label", "probability")]
    writer.writerow(["file", *columns, "error"])
    for row in labelled:
        writer.writerow([row["file"], *(x for pair in row["labels"] for x in pair), ""])
    for row in unreadable:
        writer.writerow([row["file"], *[""] * len(columns), row["error"]])
    return text.getvalue()


def as_json(labelled: list[dict], unreadable: list[dict]) -> str:
    """{"images": [{"file", "labels"}, ...], "unreadable": [{"file", "error"}, ...]}."""
    content: dict[str, Any] = {"images": labelled, "unreadable": unreadable}
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


WRITERS: dict[str, Callable[[list[dict], list[dict]], str]] = {
    "table": as_table,
    "csv": as_csv,
    "json": as_json,
}


def main(arguments: list[str]) -> None:
    """Labels, writes, and says what could not be read."""
    with configuration.explained_errors():
        files = find_images(arguments[1:])
        if not files:
            raise ValueError("no images: name files, or folders that hold some")
        labelled, unreadable = label_files(files)
        text = WRITERS[FORMAT.value](labelled, unreadable)
        if OUTPUT.value:
            Path(OUTPUT.value).write_text(text, "utf-8")
        else:
            print(text, end="")
    if unreadable:
        print(f"{len(unreadable)} of {len(files)} files can't be read:", file=sys.stderr)
        for row in unreadable:
            print(f"  {row['file']}: {row['error']}", file=sys.stderr)
    if not labelled:
        sys.exit("error: no file could be read")


if __name__ == "__main__":
    app.run(main, flags_parser=configuration.parse_flags)
