"""The folder of a run: whether it may be used, the config it was made with, compiled programs."""

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from vit_jax.config import InputError, build, covered, fields_where
from vit_jax.parallel.multihost import barrier, first_of_all, is_main
from vit_jax.parallel.run_files import (
    Lock,
    as_path,
    check_holds_checkpoints,
    read_json,
    saved_steps,
    write_whole,
)
from vit_jax.training.clock import read_starts
from vit_jax.training.metrics import read_metrics

CONFIG = "config.json"
_STARTED_OVER = "started_over"  # the folder for what is there when a run starts over
_STAYS = (
    ".lock",
    ".shared",
    "compiled",
    "data",
    "trials",
    "sweep.json",
    "budget.json",
    "probe",
    _STARTED_OVER,
)  # isn't the run's state


def open_workdir(workdir: str, config: Any) -> tuple[Path, Lock | None]:
    """Makes or finds a run's folder and locks it: (its path, the lock on process 0).

    `config` is the run's, a dataclass, whose metadata say which fields a restart may set otherwise
    (`config.setting`).

    Raises:
      ValueError: an empty name; or the folder holds the state of a run that can't go on: its config
        differs in any other field, or `config.json` is missing, or all its checkpoints are; a file
        of the run is damaged.
      OSError: it can't be written, or another process uses it.
    """
    if not workdir:
        raise InputError("no workdir: say where to keep this run with --workdir=FOLDER")
    path = as_path(workdir)
    path.mkdir(parents=True, exist_ok=True)
    if isinstance(path, Path) and not os.access(path, os.W_OK | os.X_OK):
        raise PermissionError(f"workdir {workdir} is not writable: choose another --workdir")
    lock = lock_workdir(path)
    read_starts(path)  # damage is told before anything is computed
    read_metrics(path)
    or_start_over(path, config, lambda: _check_state(path, config))
    return path, lock


def lock_workdir(path: Path) -> Lock | None:
    """Locks a folder on process 0, for all; OSError, on all, that names who has it."""
    check_holds_checkpoints(path)
    lock, problem = None, ""
    if is_main():
        try:
            lock = Lock(path)
        except OSError as error:
            problem = str(error)
    if problem := first_of_all(problem):
        raise OSError(problem)
    return lock


def or_start_over(path: Path, config: Any, check: Callable[[], list[str]]) -> list[str]:
    """Calls `check`, which raises ValueError if the run in the folder can't go on.

    With `config.start_over` its state is then moved to `started_over/`, and the run begins at step
    0. A run that can go on goes on: the same command may be started again.
    """
    try:
        return check()
    except ValueError as error:
        if not config.start_over:
            raise InputError(
                f"{error}\nNothing was changed. To begin at step 0, with all that is there moved "
                f"to {path / _STARTED_OVER}: --config.start_over=True"
            ) from error
        notes = [f"{error}\nstart_over: this is moved to {_move_state(path)}"]
    if is_main():
        print(*notes, sep="\n", file=sys.stderr, flush=True)
    return []


def _move_state(path: Path) -> Path:
    """Moves everything that belongs to a run's state out of its way; returns where it is."""
    before = path / _STARTED_OVER
    barrier("start over")
    folder = before / str(len(list(before.iterdir())) if before.exists() else 0)
    if is_main():
        folder.mkdir(parents=True)
        for entry in sorted(path.iterdir()):
            if entry.name not in _STAYS:
                entry.rename(folder / entry.name)
    barrier("started over")
    return folder


def _check_state(path: Path, config: Any) -> list[str]:
    """ValueError if the folder holds a state that isn't this config's, or one that is lost."""
    steps = saved_steps(path)
    step = max(steps, default=0)
    if steps and not (path / CONFIG).exists():
        raise InputError(
            f"{path} holds a run at step {step}, and no {CONFIG}, which says with which recipe: "
            "copy it back"
        )
    if steps:
        _check_same(path / CONFIG, config, f", at step {step}")
        return []
    if (path / "unreadable").is_dir() and any((path / "unreadable").iterdir()):
        raise InputError(
            f"all checkpoints of {path} are in {path / 'unreadable'}: move one that is good back "
            f"to {path / 'checkpoints'}/STEP"
        )
    if saved := last_saved(path):
        raise InputError(
            f"{path} holds a run that has saved step {saved}, and no checkpoint: copy it back to "
            f"{path / 'checkpoints' / str(saved)}"
        )
    return []


def last_saved(path: Path) -> int:
    """The last step that a run saved, as `starts.json` tells; 0 if it saved none."""
    return max((max(s.get("saved", 0), s["from_step"]) for s in read_starts(path)), default=0)


def keep_config(workdir: Path, config: dict[str, Any]) -> None:
    """Writes the resolved config to `config.json`, for `open_workdir` and for people."""
    _keep(workdir / CONFIG, config)


def keep_same(file: Path, config: Any) -> None:
    """Writes a dataclass; ValueError if the file holds another one, as for `open_workdir`."""
    if file.exists():
        _check_same(file, config)
    _keep(file, dataclasses.asdict(config))


def _keep(file: Path, config: dict[str, Any]) -> None:
    if is_main():
        write_whole(file, json.dumps(config, indent=2) + "\n")


def _check_same(file: Path, config: Any, when: str = "") -> None:
    may_change = [
        name for what in ("speed", "records") for name in fields_where(type(config), changes=what)
    ]
    there = read_json(file, "copy it back, or use another --workdir")
    # What an older version wrote lacks the fields that are newer: it ran as by their defaults.
    with suppress(ValueError):  # a field that there is no more is shown as a difference
        there = _as_json(build(type(config), there))
    changed = [
        f"  {name}: {before!r} there, {now!r} here"
        for name, before, now in _differences(there, _as_json(config))
        if not (covered(name, may_change) or _moved(before, now, file.parent))
    ]
    if changed:
        raise InputError(
            f"{file.parent} holds a run with another config{when}:\n"
            + "\n".join(changed)
            + "\nUse another --workdir, or the same config to resume."
        )


def _moved(before: Any, now: Any, folder: Path) -> bool:
    """Whether two paths are of one file of the run, whose folder was elsewhere before."""
    root = folder.absolute()
    if root.parent.name == "trials":  # of a sweep, whose data is the run's
        root = root.parents[1]
    if not (isinstance(before, str) and isinstance(now, str) and now.startswith(f"{root}/")):
        return False
    is_absolute = before.startswith("/") or "://" in before
    return is_absolute and before.endswith(now.removeprefix(str(root)))


@contextmanager
def compiled_kept(workdir: Path, where: str) -> Iterator[None]:
    """Inside, programs that took a second to compile are kept, and found by the next start.

    `where` is "workdir", another folder, to share between runs, or "" for nowhere. A cache that was
    set for jax in another way, such as JAX_COMPILATION_CACHE_DIR, is left as it is.
    """
    if jax.config.jax_compilation_cache_dir or not where:
        yield
        return
    folder = workdir / "compiled" if where == "workdir" else where
    try:
        _set_cache(str(folder))
        yield
    finally:
        _set_cache(None)


def _set_cache(folder: str | None) -> None:
    jax.config.update("jax_compilation_cache_dir", folder)
    # Whether there is a cache is decided at the first compilation of a process, which is over:
    # jax.random.key is one. This makes it decide anew.
    compilation_cache.reset_cache()


def _as_json(config: Any) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(config)))


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
