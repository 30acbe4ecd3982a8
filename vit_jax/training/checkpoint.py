"""Checkpoints: asynchronous, atomic, resumable.

A checkpoint is a folder `workdir/checkpoints/STEP` of four items: `params`, `ema` (when kept),
`training` (the step and the optimizer's state) and `model`, a JSON description with which the
parameters can be used without the run's config.
"""

import dataclasses
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from vit_jax.parallel.multihost import all_agree, barrier, is_main
from vit_jax.training.step import TrainState
from vit_jax.weights.trained import saved_steps

# Bytes of tensors that a process reads at a time: what it holds besides those in their place.
_READ_AT_ONCE = 250_000_000

# orbax tells saves apart by a number that is current while one begins, the same for all threads of
# a process: of two that begin at once, one would write into folders that aren't there yet.
_BEGINS = threading.Lock()


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
    """Writes the checkpoints of one run; to be made when the state to begin with is restored.

    `saved(step)` is called once a checkpoint is complete, no sooner; a save that fails raises
    OSError from the next call of any method. What a killed save left behind is removed.
    """

    def __init__(self, workdir: Path, config: CheckpointConfig, saved: Callable[[int], None]):
        self._manager = ocp.CheckpointManager(
            (workdir / "checkpoints").absolute(),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=config.keep_last,
                keep_period=config.keep_every,
                cleanup_tmp_directories=True,
            ),
        )
        self._saved = saved
        self._saving: int | None = None

    def save(self, state: TrainState, description: dict[str, Any]) -> None:
        """Begins to save in the background, once the save before is complete.

        A folder appears under its name only when complete.
        """
        self.wait()
        items = {name: ocp.args.StandardSave(tree) for name, tree in _split(state).items()}
        items["model"] = ocp.args.JsonSave(description)
        step = int(state.step)
        with _BEGINS:
            begun = self._manager.save(step, args=ocp.args.Composite(**items))
        if not begun:
            raise RuntimeError(f"step {step} is not saved: there is a checkpoint of a later one")
        self._saving = step

    def poll(self) -> None:
        """Looks, without waiting, whether a save has come to its end, a good or a bad one."""
        if not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Waits until what is being saved is complete."""
        if self._saving is None:
            return
        step, self._saving = self._saving, None
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # orbax hands on whatever the storage raises
            cause = str(error).strip().splitlines()[0]
            raise OSError(
                f"step {step} could not be saved: {cause}\nThe checkpoints before it are complete: "
                "make room, or mend the storage, and start again"
            ) from error
        self._saved(step)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, *error: object) -> None:
        """Waits until what is being saved is complete."""
        self.wait()
        if kind is None:
            self._manager.close()


def restore_newest(workdir: Path, state: TrainState) -> tuple[TrainState, list[str]]:
    """The newest checkpoint that can be read, as `restore` does: (state, what to say about others).

    One that can't be is moved to `unreadable/`, on every process if on any: its step comes again.
    Raises ValueError if none can.
    """
    notes = []
    for step in sorted(saved_steps(workdir), reverse=True):
        folder = workdir / "checkpoints" / str(step)
        try:
            restored, problem = restore(folder, state), ""
        except ValueError as error:
            restored, problem = None, str(error)
        if all_agree(restored is not None):
            return restored, notes
        notes.append(f"{problem or f'another process cannot read {folder}'}; going back by one")
        if is_main():
            kept = workdir / "unreadable"
            kept.mkdir(exist_ok=True)
            again = len(list(kept.glob(f"{step}*")))
            folder.rename(kept / (f"{step}.{again}" if again else f"{step}"))
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
    largest = max(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    at_once = max(_READ_AT_ONCE, 4 * largest) / 1e9  # orbax refuses tensors above its limit
    handlers = {
        name: ocp.StandardCheckpointHandler(restore_concurrent_gb=at_once) for name in items
    }
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers)) as reader:
            restored = reader.restore(folder.absolute(), args=ocp.args.Composite(**items))
        parts = {"params": restored["params"], "ema": restored.get("ema")}
        return TrainState(**parts, **restored["training"])
    except Exception as error:  # orbax raises that very class for a file that is missing
        raise ValueError(
            f"checkpoint {folder} can't be read: it is damaged, or of another model or optimizer "
            f"({type(error).__name__}: {str(error).strip().splitlines()[0][:300]})"
        ) from error


def _split(state: TrainState) -> dict[str, Any]:
    items = {"params": state.params, "training": {"step": state.step, "opt_state": state.opt_state}}
    return items if state.ema is None else {**items, "ema": state.ema}
