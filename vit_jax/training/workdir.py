"""The folder of a run: whether it may be used, the config it was made with, compiled programs."""

import dataclasses
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from vit_jax.config import build, covered, fields_where
from vit_jax.parallel.multihost import is_main
from vit_jax.weights.trained import saved_steps


def open_workdir(workdir: str, config: Any) -> tuple[Path, int]:
    """Makes or finds a run's folder: (its path, the step of its newest checkpoint or 0).

    `config` is the run's, a dataclass, whose metadata say which fields a restart may set otherwise
    (`config.setting`). Raises ValueError for an empty name, and for a
    folder with checkpoints of a run whose config differs in anything else, showing the differences;
    OSError if it can't be written.
    """
    if not workdir:
        raise ValueError("no workdir: say where to keep this run with --workdir=FOLDER")
    if "://" in workdir:
        raise ValueError(
            f"workdir {workdir}: expected a folder. Checkpoints become complete by renaming one, "
            "which a bucket can't do at once: keep the run on a file system that all hosts share, "
            "such as Filestore, made by `gcloud filestore instances create` and mounted by `sudo "
            "mount -o hard IP:/SHARE /mnt/runs` (experiments/launch/README.md, step 2), then "
            "--workdir=/mnt/runs/NAME. For data alone a bucket will do: gcsfuse -o ro BUCKET FOLDER"
        )
    path = Path(workdir)
    path.mkdir(parents=True, exist_ok=True)
    if not os.access(path, os.W_OK | os.X_OK):
        raise PermissionError(f"workdir {workdir} is not writable: choose another --workdir")
    step = max(saved_steps(path), default=0)
    if step:
        _check_same(path / "config.json", config, f", at step {step}")
    return path, step


def keep_config(workdir: Path, config: dict[str, Any]) -> None:
    """Writes the resolved config to `config.json`, for `open_workdir` and for people."""
    _keep(workdir / "config.json", config)


def keep_same(file: Path, config: Any) -> None:
    """Writes a dataclass; ValueError if the file holds another one, as for `open_workdir`."""
    _check_same(file, config)
    _keep(file, dataclasses.asdict(config))


def _keep(file: Path, config: dict[str, Any]) -> None:
    if is_main():
        partial = file.with_name(f"{file.name}.partial")
        partial.write_text(json.dumps(config, indent=2) + "\n")
        partial.replace(file)


def _check_same(file: Path, config: Any, when: str = "") -> None:
    if not file.exists():
        return
    may_change = [
        name for what in ("speed", "records") for name in fields_where(type(config), changes=what)
    ]
    there = json.loads(file.read_text())
    # What an older version wrote lacks the fields that are newer: it ran as by their defaults.
    with suppress(ValueError):  # a field that there is no more is shown as a difference
        there = _as_json(build(type(config), there))
    changed = [
        f"  {name}: {before!r} there, {now!r} here"
        for name, before, now in _differences(there, _as_json(config))
        if not covered(name, may_change)
    ]
    if changed:
        raise ValueError(
            f"{file.parent} holds a run with another config{when}:\n"
            + "\n".join(changed)
            + "\nUse another --workdir, or the same config to resume."
        )


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
