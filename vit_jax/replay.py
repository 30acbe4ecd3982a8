"""Repeats steps of a run on one device, and reports where a value stops being finite.

vit_jax replay --workdir=runs/b16 --step=70012

It starts from the newest checkpoint before the step, uses the run's batches, and writes nothing to
the workdir. The page (--output) shows the first tensor that isn't finite: its layer, pass and
operation, and its largest input. It also shows the norms of each layer's gradients, updates and
activations beside those of earlier steps, and the images, labels and losses.
"""

import dataclasses
import sys
from typing import Any

import jax
import numpy as np
from absl import flags

from vit_jax.classifier.recipe import TransferConfig
from vit_jax.classifier.start import load_adapted
from vit_jax.command_line import run
from vit_jax.config import InputError, build
from vit_jax.data.pipeline import open_data
from vit_jax.data.sources import Source
from vit_jax.parallel.mesh import MeshConfig, make_mesh, use_mesh
from vit_jax.parallel.run_files import as_path, read_json, saved_steps, written_locally
from vit_jax.pictures.step_page import make_page, norms_table
from vit_jax.training.checkpoint import restore, restore_other
from vit_jax.training.initial import fresh_state, loaded_state
from vit_jax.training.recipe import TrainConfig, Training, build_training
from vit_jax.training.repeat import batch_losses, examine, take_steps
from vit_jax.training.step import TrainState
from vit_jax.training.workdir import CONFIG
from vit_jax.weights.trained import find_checkpoint


def open_run(workdir: Any, microbatch: int) -> tuple[Training, Source]:
    """Returns the training of the run in a workdir, on one device, and its data.

    Raises ValueError or FileNotFoundError if there is no run.
    """
    file = workdir / CONFIG
    if not file.exists():
        raise FileNotFoundError(f"{workdir} holds no run: expected its {CONFIG}")
    values = read_json(file, "copy it back")
    config = build(TransferConfig if "init" in values else TrainConfig, values)
    source = open_data(config.data)
    config = config.weighed(source)
    rows = 2 if config.augmentation.mixes else 1  # in each indivisible group
    fitting = (
        a
        for a in range(config.accumulation, config.batch_size + 1)
        if config.batch_size % (a * rows) == 0 and config.batch_size <= a * microbatch
    )
    accumulation = next(fitting, config.accumulation)
    config = dataclasses.replace(config, mesh=MeshConfig(), accumulation=accumulation)
    mesh = make_mesh(config.mesh, jax.local_devices()[:1])
    return build_training(config, mesh, source.num_classes, len(source)), source


def state_before(training: Training, workdir: Any, step: int) -> TrainState:
    """Returns the run's newest saved state before `step`, or its initial state."""
    config, shapes = training.config, training.placed_shapes
    saved = [number for number in saved_steps(workdir) if number < step]
    if saved:
        return restore(workdir / "checkpoints" / str(max(saved)), shapes)
    if config.resume:
        return restore_other(find_checkpoint(config.resume), shapes)[0]
    if init := getattr(config, "init", ""):
        if config.head != "zero":
            raise InputError(
                f"{workdir} has no checkpoint from before step {step}, and its initial head was "
                f"fitted to {init}: choose a step after the first checkpoint"
            )
        return loaded_state(training, load_adapted(config, training.model, training.shapes.params))
    return fresh_state(training)(jax.random.key(config.seed))


def replay(workdir: Any, last: int, shown: int = 32, microbatch: int = 64) -> tuple[list[str], str]:
    """Repeats the run's steps up to `last`: (lines of findings, HTML page).

    Raises ValueError for a step that the run doesn't have, and as `open_run`.
    """
    training, source = open_run(workdir, microbatch)
    if not training.steps:
        raise InputError(f"{workdir} is a run without steps: there is none to repeat")
    if not 1 <= last <= training.steps:
        raise InputError(f"--step={last}: expected 1 to {training.steps}, the run's steps")
    with use_mesh(training.mesh):
        state = state_before(training, workdir, last)
        summary, steps = [f"begins with the state after step {int(state.step)}"], []
        for step in take_steps(training, source, state, last):
            steps = [*(dataclasses.replace(s, batch={}) for s in steps[:-1]), *steps[-1:], step]
            print(f"step {step.number}: loss {step.values['loss']:.6g}", file=sys.stderr)
        step = steps[-1]
        origin, now = examine(training, step)
        before = examine(training, steps[-2])[1] if len(steps) > 1 else {}
        losses = batch_losses(training, step, microbatch)
    scalars = {k: v for k, v in step.values.items() if " " not in k}
    summary.append(f"step {step.number}: " + ", ".join(f"{k} {v:.6g}" for k, v in scalars.items()))
    if origin:
        summary.append(str(origin))
    elif step.is_finite:
        summary.append("everything in it is finite")
    else:
        summary.append(
            "the compiled step isn't finite, but its operations one by one are: a value is near "
            "its dtype's limit"
        )
    order = np.argsort(-np.nan_to_num(losses, nan=np.inf, posinf=np.inf), kind="stable")[:shown]
    images, labels = (np.asarray(step.batch[name])[order] for name in ("image", "label"))
    captions = [
        f"row {row}: {_name(source, label)}, loss {losses[row]:.4g}"
        for row, label in zip(order, labels, strict=True)
    ]
    title = f"{workdir}, step {step.number}"
    norms = norms_table([step.values for step in steps], before, now)
    return summary, make_page(title, summary, norms, images, captions)


def _name(source: Source, label: np.ndarray) -> str:
    names = source.class_names or ()
    numbers = np.atleast_1d(label)
    return ", ".join(names[n] if 0 <= n < len(names) else f"label {n}" for n in numbers)


def main(_) -> None:
    """Prints the findings and writes the page."""
    args = flags.FLAGS
    output = as_path(args.output)
    summary, page = replay(as_path(args.workdir), args.step, args.shown)
    with written_locally(output) as file:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(page, encoding="utf-8", errors="backslashreplace")
    print(*summary, output, sep="\n")


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Folder of the run.")
    flags.DEFINE_integer("step", None, "The step to examine, the last one to repeat.")
    flags.DEFINE_string("output", "replay.html", "HTML file to write.")
    flags.DEFINE_integer("shown", 32, "Number of images on the page, by largest loss.")
    run(main, "workdir", "step")
