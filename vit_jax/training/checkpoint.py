"""Checkpoints: asynchronous, atomic, with checksums, resumable.

A checkpoint is a folder `workdir/checkpoints/STEP` with four items: `params`, `ema` (if kept),
`training` (the step and the optimizer's state) and `model`, a JSON description that makes the
parameters usable without the run's config. `weights.checksums` describes the file beside them.

Only a checkpoint whose bytes fail a check counts as damaged. It is moved to `unreadable/`, but only
if an earlier one is whole. A checkpoint that doesn't fit the run is left in place.
"""

import dataclasses
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from vit_jax.config import InputError
from vit_jax.models.names import is_stacked
from vit_jax.parallel.multihost import barrier, first_of_all, is_main
from vit_jax.parallel.run_files import saved_steps
from vit_jax.training.step import TrainState
from vit_jax.weights.checksums import FILE, find_damage
from vit_jax.weights.trained import written_by

# Bytes of tensors that a process reads at a time, in memory besides those already placed.
_READ_AT_ONCE = 250_000_000
_SHOWN = 10  # differences that an error lists

# orbax identifies a save by a number that all threads of a process share. If two saves began at
# once, one would write into folders that don't exist yet.
_BEGINS = threading.Lock()


class DamagedError(InputError):
    """The bytes of a checkpoint fail a check."""


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to save and what to keep; the last step is always saved."""

    every: int = 1000  # steps
    keep_last: int = 2  # the newest ones: if the last is damaged, the one before it remains
    keep_every: int | None = None  # also keeps steps that are multiples of this

    def __post_init__(self):
        for name in ("every", "keep_last", "keep_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"checkpoint.{name} = {value}: expected at least 1")


class Checkpoints:
    """Writes the checkpoints of one run. Create it after the initial state is restored.

    `saved(step)` is called once a checkpoint is complete. A save that fails raises OSError from the
    next call of any method. Leftovers of a killed save are removed.
    """

    def __init__(self, workdir: Path, config: CheckpointConfig, saved: Callable[[int], None]):
        self._workdir = workdir
        self._manager = ocp.CheckpointManager(
            os.fspath((workdir / "checkpoints").absolute()),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=config.keep_last,
                keep_period=config.keep_every,
                cleanup_tmp_directories=True,
                temporary_path_class=written_by(workdir),
            ),
        )
        self._saved = saved
        self._saving: int | None = None

    def save(self, state: TrainState, description: dict[str, Any]) -> None:
        """Begins to save in the background, after waiting for the previous save.

        A folder gets its final name only when complete; in a bucket it is marked instead.
        """
        self.wait()
        items = {name: ocp.args.StandardSave(tree) for name, tree in _split(state).items()}
        items["model"] = ocp.args.JsonSave(description)
        step = int(state.step)
        with _BEGINS:
            begun = self._manager.save(step, args=ocp.args.Composite(**items))
        if not begun:
            raise RuntimeError(f"step {step} is not saved: a later step has a checkpoint")
        self._saving = step

    def poll(self) -> None:
        """Checks without waiting whether a save has ended; raises OSError if it failed."""
        if not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Waits until the current save is complete; raises OSError if it failed."""
        if self._saving is None:
            return
        step, self._saving = self._saving, None
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # orbax reraises any exception of the storage
            cause = str(error).strip().splitlines()[0]
            whole = max(saved_steps(self._workdir), default=None)
            left = "There is no checkpoint yet" if whole is None else f"Step {whole} is complete"
            raise OSError(
                f"step {step} could not be saved: {cause}\n{left}: free space, or repair the "
                "storage, and start again"
            ) from error
        self._saved(step)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, *error: object) -> None:
        """Waits for the current save: this process may start the run again."""
        self.wait()
        if kind is None:
            self._manager.close()


def check_newest(workdir: Path, state: TrainState) -> list[str]:
    """Checks that the run can resume from its newest whole checkpoint, without computing anything.

    Processes share the work. Damaged checkpoints are moved to `unreadable/`. Returns a note about
    each.

    Args:
      workdir: the run's folder, with at least one checkpoint.
      state: the run's state, as shapes.

    Raises:
      ValueError: all are damaged, or the newest whole one doesn't fit `state`. Nothing is moved.
      OSError: a file can't be read. Nothing is moved.
    """
    damaged = {}
    for step in sorted(saved_steps(workdir), reverse=True):
        folder = workdir / "checkpoints" / str(step)
        damage = find_damage(folder, None, jax.process_index(), jax.process_count())
        try:
            differences = [] if damage else list(_differences(folder, _split(state)))
        except DamagedError as error:
            damage = str(error)
        if damage := first_of_all(damage):
            damaged[step] = damage
        elif differences:
            raise _misfit(folder, differences)
        else:
            return _set_aside(workdir, damaged, step)
    raise _none_whole(workdir, damaged)


def restore_newest(workdir: Path, state: TrainState) -> tuple[TrainState, list[str]]:
    """Restores the newest checkpoint that `check_newest` left: (state, notes about the others).

    Values that aren't finite and another step's state count as damage. Without checksums, so do
    files that orbax can't decode. Raises as `check_newest`.
    """
    damaged = {}
    for step in sorted(saved_steps(workdir), reverse=True):
        folder = workdir / "checkpoints" / str(step)
        try:
            restored = restore(folder, state)
            copied = int(restored.step) != step
            damage = f"it holds the state of step {int(restored.step)}" * copied
        except DamagedError as error:
            damage = str(error)
        if not (damage := first_of_all(damage)):
            return restored, _set_aside(workdir, damaged, step)
        damaged[step] = damage
    raise _none_whole(workdir, damaged)


def _set_aside(workdir: Path, damaged: dict[int, str], whole: int) -> list[str]:
    notes = []
    for step, damage in damaged.items():
        folder = workdir / "checkpoints" / str(step)
        notes.append(f"checkpoint {folder} can't be read, damaged: using step {whole} ({damage})")
        barrier(f"damaged {step}")  # all have looked at it
        if is_main():
            kept = workdir / "unreadable"
            kept.mkdir(exist_ok=True)
            again = len(list(kept.glob(f"{step}*")))
            folder.rename(kept / (f"{step}.{again}" if again else f"{step}"))
        barrier(f"unreadable {step}")
    return notes


def _none_whole(workdir: Path, damaged: dict[int, str]) -> InputError:
    shown = "\n".join(f"  step {step}: {damage}" for step, damage in damaged.items())
    return InputError(
        f"no checkpoint in {workdir} can be read: all are damaged\n{shown}\n"
        "Copy one back from elsewhere"
    )


def restore(folder: Path, state: TrainState) -> TrainState:
    """Restores one checkpoint onto the shardings of `state`, a tree of shapes.

    Raises DamagedError if values aren't finite or, without checksums, can't be decoded.
    """
    items = {name: ocp.args.StandardRestore(tree) for name, tree in _split(state).items()}
    largest = max(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    at_once = max(_READ_AT_ONCE, 4 * largest) / 1e9  # orbax refuses tensors above its limit
    handlers = {
        name: ocp.StandardCheckpointHandler(restore_concurrent_gb=at_once) for name in items
    }
    address = os.fspath(folder.absolute())
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers)) as reader:
            restored = reader.restore(address, args=ocp.args.Composite(**items))
    except Exception as error:  # orbax raises plain Exception for tensorstore's errors
        if (folder / FILE).exists() or not _is_damage(error):
            raise
        raise DamagedError(_first_line(error)) from error
    parts = {"params": restored["params"], "ema": restored.get("ema")}
    found = TrainState(**parts, **restored["training"])
    if strange := _not_finite(found):
        raise DamagedError(f"not finite: {', '.join(strange[:3])}")
    return found


def check_other(folder: Path, state: TrainState) -> None:
    """Raises ValueError if the run can't continue from another run's checkpoint."""
    damage = find_damage(folder, None, jax.process_index(), jax.process_count())
    if damage := first_of_all(damage):
        raise InputError(f"resume: checkpoint {folder} is damaged: {damage}")
    if differences := list(_differences(folder, _split(_averaged(folder, state)))):
        raise _misfit(folder, differences)


def restore_other(folder: Path, state: TrainState) -> tuple[TrainState, list[str]]:
    """Restores a checkpoint that `check_other` accepted: (state, notes about it).

    A running average that the checkpoint lacks starts from its parameters.
    """
    wanted = _averaged(folder, state)
    restored = restore(folder, wanted)
    if wanted.ema is not None or state.ema is None:
        left = state.ema is None and (folder / "ema").is_dir()
        note = f"{folder} has a running average (EMA), which is left out: ema_decay isn't set"
        return restored, [note] * left
    ema = jax.jit(lambda params: jax.tree.map(jnp.copy, params))(restored.params)
    note = f"{folder} has no running average (EMA): it starts from the parameters there"
    return dataclasses.replace(restored, ema=ema), [note]


def _averaged(folder: Path, state: TrainState) -> TrainState:
    """Returns the state, without the average if the checkpoint has none."""
    return state if (folder / "ema").is_dir() else dataclasses.replace(state, ema=None)


def _differences(folder: Path, items: dict[str, Any]):
    """Yields how a checkpoint's arrays differ from `items` in name or shape; reads no values."""
    for item, tree in items.items():
        if not (folder / item).is_dir():
            yield f"{item}: expected by the run, not in the checkpoint"
            continue
        try:
            there = ocp.PyTreeCheckpointHandler().metadata(folder.absolute() / item).tree
        except (ValueError, KeyError, FileNotFoundError) as error:
            if not _is_damage(error):
                raise
            raise DamagedError(f"{item}: {_first_line(error)}") from error
        before, now = _shapes(there), _shapes(tree)
        for name in sorted(before.keys() | now.keys()):
            if before.get(name) != now.get(name):
                shown = [shapes.get(name, "missing") for shapes in (before, now)]
                yield f"{item}.{name}: {shown[0]} in the checkpoint, {shown[1]} in the run"


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Returns {name: shape} of a tree of shapes or of orbax's metadata."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): tuple(leaf.shape)
        for path, leaf in leaves
        if hasattr(leaf, "shape")
    }


def _misfit(folder: Path, differences: list[str]) -> InputError:
    lines = [f"  {line}" for line in differences[:_SHOWN]]
    if more := len(differences) - _SHOWN:
        lines += [f"  and {more} more"] * (more > 0)
    if all(line.startswith("training.opt_state") for line in differences):
        lines.append("The models are equal, the optimizers differ (optimizer).")
    if any(is_stacked(line.removeprefix("params.").replace(".", "/")) for line in differences):
        lines.append("One stacks its layers in one array, the other does not (model.scan).")
    return InputError(
        f"checkpoint {folder} is of another model or optimizer than the run:\n"
        + "\n".join(lines)
        + "\nSet the recipe and the data to those of the checkpoint's run (config.json)."
    )


def _not_finite(state: TrainState) -> list[str]:
    """Returns the names of arrays with values that aren't finite."""
    finite = jax.jit(lambda array: jnp.isfinite(array).all())  # compiles once per shape
    return [
        jax.tree_util.keystr(path, simple=True, separator=".")
        for path, leaf in jax.tree_util.tree_leaves_with_path(_split(state))
        # One at a time: CPUs that run many collectives at once may deadlock.
        if jnp.issubdtype(leaf.dtype, jnp.floating) and not jax.device_get(finite(leaf))
    ]


def _is_damage(error: Exception) -> bool:
    """Whether tensorstore or orbax failed to decode the data, or missed a file."""
    while error.__cause__:
        error = error.__cause__
    text = str(error)
    told = isinstance(error, (ValueError, KeyError, FileNotFoundError))
    of_system = "RESOURCE_EXHAUSTED" in text or ("OS error" in text and "NOT_FOUND" not in text)
    return told and not of_system


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300]}"


def _split(state: TrainState) -> dict[str, Any]:
    items = {"params": state.params, "training": {"step": state.step, "opt_state": state.opt_state}}
    return items if state.ema is None else {**items, "ema": state.ema}
