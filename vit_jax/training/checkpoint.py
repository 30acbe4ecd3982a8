"""Checkpoints: asynchronous, atomic, resumable. The only importer of orbax.

A checkpoint is a folder `workdir/checkpoints/STEP` of four items: `params`, `ema` (when kept),
`training` (the step and the optimizer's state) and `model`, a JSON description with which the
parameters can be used without the run's config.
"""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from vit_jax.parallel.multihost import all_agree, barrier, is_main
from vit_jax.training.step import TrainState
from vit_jax.weights import formats


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to save and what to keep; there is always a checkpoint of the last step."""

    every: int = 1000  # steps
    keep_last: int = 2  # the newest ones: when the last can't be read, there is one before it
    keep_every: int | None = None  # and forever those whose step is a multiple of this

    def __post_init__(self):
        for name in ("every", "keep_last", "keep_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"checkpoint.{name} = {value}: expected at least 1")


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, workdir: Path, config: CheckpointConfig):
        self._manager = ocp.CheckpointManager(
            (workdir / "checkpoints").absolute(),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=config.keep_last, keep_period=config.keep_every
            ),
        )

    def save(self, state: TrainState, description: dict[str, Any]) -> None:
        """Begins to save in the background; a folder appears under its name only when complete."""
        items = {name: ocp.args.StandardSave(tree) for name, tree in _split(state).items()}
        items["model"] = ocp.args.JsonSave(description)
        self._manager.save(int(state.step), args=ocp.args.Composite(**items))

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *error: object) -> None:
        """Waits until what is being saved is complete."""
        self._manager.wait_until_finished()
        self._manager.close()


def restore_newest(workdir: Path, state: TrainState) -> tuple[TrainState, list[str]]:
    """The newest checkpoint that can be read, as `restore` does: (state, what to say about others).

    One that can't be is moved to `unreadable/`, on every process if on any: its step comes again.
    Raises ValueError if none can.
    """
    notes = []
    for step in sorted(_steps(workdir), reverse=True):
        folder = workdir / "checkpoints" / str(step)
        try:
            restored, problem = restore(folder, state), ""
        except ValueError as error:
            restored, problem = None, str(error)
        if all_agree(restored is not None):
            return restored, notes
        notes.append(f"{problem or f'another process cannot read {folder}'}; going back by one")
        if is_main():
            (workdir / "unreadable").mkdir(exist_ok=True)
            folder.rename(workdir / "unreadable" / str(step))
        barrier(f"unreadable {step}")
    raise ValueError(
        f"no checkpoint in {workdir} can be read; they are kept in {workdir / 'unreadable'}:\n"
        + "\n".join(notes)
    )


def restore(folder: Path, state: TrainState) -> TrainState:
    """One checkpoint's state, onto the shardings of `state`, a tree of shapes.

    ValueError for a checkpoint that is damaged or of another model or optimizer.
    """
    items = {name: ocp.args.StandardRestore(tree) for name, tree in _split(state).items()}
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
            restored = reader.restore(folder.absolute(), args=ocp.args.Composite(**items))
        parts = {"params": restored["params"], "ema": restored.get("ema")}
        return TrainState(**parts, **restored["training"])
    except Exception as error:  # orbax raises that very class for a file that is missing
        raise ValueError(
            f"checkpoint {folder} can't be read: it is damaged, or of another model or optimizer "
            f"({type(error).__name__}: {str(error).strip().splitlines()[0][:300]})"
        ) from error


def find_checkpoint(path: str | Path) -> Path:
    """The folder of one checkpoint: `path` itself, or the newest of the run whose workdir it is."""
    folder = Path(path).absolute()
    if (folder / "checkpoints").is_dir():
        if not (steps := _steps(folder)):
            raise FileNotFoundError(f"{path} holds no complete checkpoint: did its run save one?")
        folder = folder / "checkpoints" / str(max(steps))
    if not (folder / "params").is_dir():
        raise FileNotFoundError(
            f"no checkpoint at {path}: expected a run's workdir (it holds `checkpoints/`), one "
            f"checkpoint's folder (`params/`), an exported one ({formats.WEIGHTS}) or a .npz file"
        )
    return folder


def _split(state: TrainState) -> dict[str, Any]:
    items = {"params": state.params, "training": {"step": state.step, "opt_state": state.opt_state}}
    return items if state.ema is None else {**items, "ema": state.ema}


def load_checkpoint(
    path: str | Path, image_size: tuple[int, int] | None = None
) -> tuple[dict, dict[str, Any]]:
    """Reads a model: (parameters as a nested dict of numpy arrays, description).

    `path` is a run's workdir, whose newest checkpoint is taken, one checkpoint's folder, or
    whatever `weights.formats.read` reads, with its `image_size`. The running average (EMA) is taken
    where one was kept. FileNotFoundError says what is there.
    """
    folder = Path(path).absolute()
    foreign = "://" in str(path) or folder.is_file() or (folder / formats.WEIGHTS).is_file()
    if foreign:
        return formats.read(path, image_size)
    folder = find_checkpoint(path)
    name = "ema" if (folder / "ema").is_dir() else "params"
    handler = ocp.PyTreeCheckpointHandler()
    with ocp.Checkpointer(handler) as reader:
        tree = handler.metadata(folder / name).tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        params = reader.restore(folder / name, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
        description = reader.restore(folder / "model", args=ocp.args.JsonRestore())
    return params, description


def save_checkpoint(path: str | Path, params: dict, description: dict[str, Any]) -> None:
    """Writes a model alone, without a run: a folder that `load_checkpoint` reads; atomic."""
    items = {"params": ocp.args.StandardSave(params), "model": ocp.args.JsonSave(description)}
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as writer:
        writer.save(Path(path).absolute(), args=ocp.args.Composite(**items))


def open_workdir(
    workdir: str, config: dict[str, Any], *, may_change: tuple[str, ...]
) -> tuple[Path, int]:
    """Makes or finds a run's folder: (its path, the step of its newest checkpoint or 0).

    `may_change` names the fields (dotted; a prefix covers what is below it) that a restart may set
    otherwise. Raises ValueError for an empty name, and for a folder with checkpoints of a run whose
    config differs in anything else, showing the differences; OSError if it can't be written.
    """
    if not workdir:
        raise ValueError("no workdir: say where to keep this run with --workdir=FOLDER")
    if "://" in workdir:
        raise ValueError(f"workdir {workdir}: expected a local folder; mount the bucket as one")
    path = Path(workdir)
    path.mkdir(parents=True, exist_ok=True)
    if not os.access(path, os.W_OK | os.X_OK):
        raise PermissionError(f"workdir {workdir} is not writable: choose another --workdir")
    step = max(_steps(path), default=0)
    file = path / "config.json"
    if step and file.exists():
        changed = [
            f"  {name}: {before!r} there, {now!r} here"
            for name, before, now in _differences(
                json.loads(file.read_text()), json.loads(json.dumps(config))
            )
            if not any(name == field or name.startswith(field + ".") for field in may_change)
        ]
        if changed:
            raise ValueError(
                f"{workdir} holds a run with another config, at step {step}:\n"
                + "\n".join(changed)
                + "\nUse another --workdir, or the same config to resume."
            )
    return path, step


def keep_config(workdir: Path, config: dict[str, Any]) -> None:
    """Writes the resolved config to `config.json`, for `open_workdir` and for people."""
    if is_main():
        partial = workdir / "config.json.partial"
        partial.write_text(json.dumps(config, indent=2) + "\n")
        partial.replace(workdir / "config.json")


def _steps(workdir: Path) -> list[int]:
    """The complete checkpoints: orbax gives a folder its number when all of it is written."""
    folder = workdir / "checkpoints"
    return [int(p.name) for p in folder.iterdir() if p.name.isdigit()] if folder.is_dir() else []


def _differences(old: Any, new: Any, name: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            difference
            for key in sorted(old.keys() | new.keys())
            for difference in _differences(
                old.get(key), new.get(key), f"{name}.{key}" if name else key
            )
        ]
    return [] if old == new else [(name, old, new)]
