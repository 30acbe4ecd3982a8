"""Repeats steps of a run on one device, and reports where a value stops being finite.

vit_jax replay --workdir=runs/b16 --step=70012

It starts from the newest checkpoint before the step, uses the run's batches, and writes nothing to
the workdir. The page (--output) shows the first tensor that isn't finite: its layer, pass and
operation, and its largest input. It also shows the norms of each layer's gradients, updates and
activations beside those of earlier steps, and the images, labels and losses.
"""

import base64
import dataclasses
import html
import io
import math
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from PIL import Image

from vit_jax.classifier.recipe import TransferConfig
from vit_jax.classifier.start import load_adapted
from vit_jax.command_line import run
from vit_jax.config import InputError, build, printable
from vit_jax.data.pipeline import open_data, train_batches
from vit_jax.data.sources import Source
from vit_jax.parallel.mesh import MeshConfig, local_rows, make_mesh, put_batch, use_mesh
from vit_jax.parallel.run_files import as_path, read_json, saved_steps, written_locally
from vit_jax.training.checkpoint import restore, restore_other
from vit_jax.training.initial import fresh_state, loaded_state
from vit_jax.training.norms import layer_norms
from vit_jax.training.origins import Examination, Origin
from vit_jax.training.recipe import TrainConfig, Training, build_training
from vit_jax.training.stages import Stage
from vit_jax.training.step import TrainState, make_losses, with_draws
from vit_jax.training.workdir import CONFIG
from vit_jax.weights.trained import find_checkpoint


@dataclasses.dataclass(frozen=True)
class Step:
    """A repeated step: its number, the state before it, its batch and its metrics."""

    number: int
    state: TrainState
    batch: dict
    values: dict[str, float]

    @property
    def is_finite(self) -> bool:
        return all(map(math.isfinite, self.values.values()))


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


def take_steps(training: Training, source: Source, state: TrainState, last: int) -> Iterator[Step]:
    """Yields the steps from `state` to `last`; ends at the first that isn't finite."""
    config, start = training.config, int(state.step)
    local = train_batches(
        source,
        config.data,
        batch_size=config.batch_size,
        image_size={stage.start: stage.model.image_size for stage in training.stages},
        seed=config.seed,
        start_step=start,
        rows=local_rows(training.mesh, config.batch_size),
    )
    programs = {
        stage: jax.jit(partial(training.during(stage).step, observe=layer_norms))
        for stage in training.stages
    }
    try:
        for number in range(start + 1, last + 1):
            batch = put_batch(training.mesh, next(local))
            take = programs[_stage_of(training, number)]
            after, values = take(state, batch, *_rest(training))
            values = {name: float(value) for name, value in jax.device_get(values).items()}
            step = Step(number, state, batch, values)
            yield step
            if not step.is_finite:
                return
            state = after
    finally:
        local.close()


def _stage_of(training: Training, number: int) -> Stage:
    """Returns the stage of step `number`, counted from 1."""
    return next(stage for stage in training.stages if number <= stage.stop)


def _rest(training: Training) -> list[Any]:
    """Returns a step's further arguments: the peak learning rate, a teacher's parameters."""
    teacher = [training.teacher.place()] if training.teacher else []
    return [jnp.float32(training.config.schedule.peak), *teacher]


def examine(training: Training, step: Step) -> tuple[Origin | None, dict]:
    """Returns the origin of the step's first value that isn't finite, and layers' activations."""
    during = training.during(_stage_of(training, step.number))
    given, examination = (step.state, step.batch, *_rest(training)), Examination()
    outputs = examination.run(jax.make_jaxpr(during.step)(*given), examination.arguments(given))
    origins = [value.origin for value in outputs if value.origin]
    first = min(origins, key=lambda origin: origin.order, default=None)
    return first, examination.activations


def batch_losses(training: Training, step: Step, microbatch: int) -> np.ndarray:
    """Returns each example's loss, float32 [B], without a teacher's part."""
    config, model = training.config, _stage_of(training, step.number).model
    losses = make_losses(model, config.loss, config.masked_patches)
    batch, keys = with_draws(config.augmentation, config.seed, step.state.step, step.batch)
    compute, size = jax.jit(lambda *given: losses(*given)[0]), 2 * -(-microbatch // 2)
    parts = [
        compute(step.state.params, *jax.tree.map(lambda x, a=a: x[a : a + size], (batch, keys)))
        for a in range(0, config.batch_size, size)
    ]
    return np.concatenate(parts)


def make_page(
    title: str,
    summary: list[str],
    rows: list[tuple[str, ...]],
    images: Sequence[np.ndarray],
    captions: list[str],
) -> str:
    """Returns the page as self-contained HTML."""
    lines = "".join(f"<li>{html.escape(line)}</li>" for line in summary)
    table = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    figures = "".join(
        f'<figure><img src="data:image/png;base64,{_png(image)}" height="128">'
        f"<figcaption>{html.escape(printable(caption))}</figcaption></figure>"
        for image, caption in zip(images, captions, strict=True)
    )
    style = "body{font:14px sans-serif}figure{display:inline-block}td{padding:0 1em}"
    return (
        f'<!doctype html><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{style}</style><h1>{html.escape(title)}</h1><ul>{lines}</ul>"
        f"<table>{table}</table>{figures}\n"
    )


def _png(image: np.ndarray) -> str:
    data = io.BytesIO()
    Image.fromarray(image).save(data, "PNG")
    return base64.b64encode(data.getvalue()).decode()


def table_of(steps: list[Step], before: dict, now: dict) -> list[tuple[str, ...]]:
    """Returns each layer's norms in the last step, with the earlier steps' medians in brackets."""
    *earlier, last = [step.values for step in steps]

    def cell(kind: str, layer: str) -> str:
        if (name := f"{kind} {layer}") not in last:
            return ""
        medians = f" ({np.median([v[name] for v in earlier]):.3g})" if earlier else ""
        return f"{last[name]:.3g}{medians}"

    def activation(layer: str) -> str:
        if layer not in now:
            return ""
        medians = f" ({before[layer][0]:.3g})" if layer in before else ""
        return f"{now[layer][0]:.3g}{medians}"

    layers = [name.removeprefix("gradient ") for name in last if name.startswith("gradient ")]
    layers = list(dict.fromkeys([*now, *layers]))
    head = ("layer", "gradient (before)", "update (before)", "activations' RMS (step before)")
    return [head] + [
        (layer, cell("gradient", layer), cell("update", layer), activation(layer))
        for layer in layers
    ]


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
    return summary, make_page(title, summary, table_of(steps, before, now), images, captions)


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
