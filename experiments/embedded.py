"""Makes the checkpoint in the package again: `vit_jax.load("embedded")`.

python -m experiments.embedded                    about ten minutes of one core

Pretrains `pretrain/embedded` in --workdir, or continues there, and writes the network without its
head: `embedded.npz`, whose numbers are bfloat16, and `embedded.json`, which describes the model and
says how it was made. The recipe's images are the same on every machine; the parameters are only
equal to rounding on another processor.
"""

import dataclasses
import datetime
import hashlib
import json
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from absl import flags

import vit_jax
from vit_jax.command_line import run
from vit_jax.models.variants import build_model
from vit_jax.weights.adapt import flatten
from vit_jax.weights.published import EMBEDDED, PUBLISHED
from vit_jax.weights.trained import TrainedModel

RECIPE = "pretrain/embedded"
SIZE = (96, 96)  # of the images that it is meant for, pixels
WORKDIR = flags.DEFINE_string("workdir", "runs/embedded", "Folder of the pretraining run.")
OUTPUT = flags.DEFINE_string("output", PUBLISHED[EMBEDDED], "The .npz file to write.")


def without_head(model: TrainedModel) -> TrainedModel:
    """The network that gives features of all stages for images of `SIZE`."""
    config = dataclasses.replace(model.config, stage_features=True)
    return dataclasses.replace(
        model,
        architecture=build_model(config, 0, SIZE),
        params={name: group for name, group in model.params.items() if name != "head"},
    )


def write(model: TrainedModel, file: Path, made: dict[str, object]) -> None:
    """Writes the parameters as bfloat16, and beside them the description with `made`."""
    arrays = {k: np.asarray(v, ml_dtypes.bfloat16) for k, v in flatten(model.params).items()}
    np.savez(file, **arrays)
    made = {**made, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    description = {**model.description, "made": made}
    file.with_suffix(".json").write_text(json.dumps(description, indent=2) + "\n")


def main(_) -> None:
    """Pretrains, writes, and says what was written."""
    config = vit_jax.recipe(RECIPE)
    trained = vit_jax.pretrain(config, WORKDIR.value)
    model = vit_jax.load(WORKDIR.value)
    made = {
        "recipe": RECIPE,
        "seed": config.get("seed", 0),
        "steps": trained.metrics["step"],
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "jax": jax.__version__,
    }
    file = Path(OUTPUT.value)
    write(without_head(model), file, made)
    print(f"{file}: {file.stat().st_size / 1e6:.1f} MB, {vit_jax.load(file)}")


if __name__ == "__main__":
    run(main)
