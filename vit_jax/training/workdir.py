"""The folder of a run: checks whether it may be used; keeps its config and compiled programs."""

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
from vit_jax.parallel.multihost import barrier, is_main, on_main
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
_STARTED_OVER = "started_over"  # the folder for the previous state when a run starts over
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
    """Creates or opens a run's folder and locks it: (its path, the lock on process 0).

    `config` is the run's dataclass. Its metadata state which fields a restart may change
    (`config.setting`).

    Raises:
      ValueError: the name is empty, a file of the run is damaged, or its run can't resume: the
        config differs in another field, or `config.json` or all checkpoints are missing.
      OSError: the folder can't be written, or another process uses it.
    """
    if not workdir:
        raise InputError("no workdir: say where to keep this run with --workdir=FOLDER")
    path = as_path(workdir)
    path.mkdir(parents=True, exist_ok=True)
    if isinstance(path, Path) and not os.access(path, os.W_OK | os.X_OK):
        raise PermissionError(f"workdir {workdir} is not writable: choose another --workdir")
    lock = lock_workdir(path)
    read_starts(path)  # reports damage before anything is computed
    read_metrics(path)
    or_start_over(path, config, lambda: _check_state(path, config))
    return path, lock


def lock_workdir(path: Path) -> Lock | None:
    """Locks a folder on process 0. Raises OSError on all processes, with the owner, if in use."""
    check_holds_checkpoints(path)
    return on_main(lambda: Lock(path))


def or_start_over(path: Path, config: Any, check: Callable[[], list[str]]) -> list[str]:
    """Calls `check`, which raises ValueError if the run in the folder can't resume.

    With `config.start_over` the state is then moved to `started_over/`, and the run begins at step
    0. A run that can resume does so: the same command may be started again.
    """
    try:
        return check()
    except ValueError as error:
        if not config.start_over:
            raise InputError(
                f"{error}\nNothing was changed. To move this state to {path / _STARTED_OVER} "
                "and begin at step 0: --config.start_over=True"
            ) from error
        notes = [f"{error}\nstart_over: this is moved to {_move_state(path)}"]
    if is_main():
        print(*notes, sep="\n", file=sys.stderr, flush=True)
    return []


def _move_state(path: Path) -> Path:
    """Moves a run's whole state into a folder below `started_over/`; returns that folder."""
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
    """Raises ValueError if the folder's state has another config, or its checkpoints are lost."""
    steps = saved_steps(path)
    step = max(steps, default=0)
    if steps and not (path / CONFIG).exists():
        raise InputError(
            f"{path} holds a run at step {step}, and no {CONFIG}, which holds its recipe: copy "
            "it back"
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
    """Returns the last step that a run saved, according to `starts.json`; 0 if none."""
    return max((max(s.get("saved", 0), s["from_step"]) for s in read_starts(path)), default=0)


def keep_config(workdir: Path, config: dict[str, Any]) -> None:
    """Writes the resolved config to `config.json`, which `open_workdir` compares."""
    _keep(workdir / CONFIG, config)


def keep_same(file: Path, config: Any) -> None:
    """Writes a dataclass; raises ValueError, as `open_workdir`, if the file holds another."""
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
    # Files of earlier versions lack newer fields: those runs used what are now the defaults.
    with suppress(ValueError):  # a removed field is shown as a difference
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
    """Whether two paths name the same file of the run, whose folder has moved."""
    root = folder.absolute()
    if root.parent.name == "trials":  # a sweep's trial uses the run's data
        root = root.parents[1]
    if not (isinstance(before, str) and isinstance(now, str) and now.startswith(f"{root}/")):
        return False
    is_absolute = before.startswith("/") or "://" in before
    return is_absolute and before.endswith(now.removeprefix(str(root)))


@contextmanager
def compiled_kept(workdir: Path, where: str) -> Iterator[None]:
    """Inside the block, keeps programs that take over a second to compile for the next start.

    `where` is "workdir", another folder to share between runs, or "" for none. A cache that is
    already set for jax, such as by JAX_COMPILATION_CACHE_DIR, takes precedence.
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
    # jax decides at a process's first compilation whether there is a cache. jax.random.key has
    # already compiled, so it must decide again.
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
