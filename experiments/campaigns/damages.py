"""Damages checkpoints: whoever reads one gets the exact numbers or an error that says "damaged"."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from experiments.campaigns.kills import PRETRAIN, run_command
from vit_jax.weights.checksums import find_damage
from vit_jax.weights.trained import load, saved_steps

Damage = Callable[[Path, np.random.Generator], None]


def flip_bit(file: Path, rng: np.random.Generator) -> None:
    data = bytearray(file.read_bytes())
    data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
    file.write_bytes(data)


def zero_block(file: Path, rng: np.random.Generator) -> None:
    data = bytearray(file.read_bytes())
    at = int(rng.integers(len(data)))
    data[at : at + 512] = bytes(len(data[at : at + 512]))
    file.write_bytes(data)


def noise(file: Path, rng: np.random.Generator) -> None:
    data = bytearray(file.read_bytes())
    at = int(rng.integers(len(data)))
    data[at : at + 64] = rng.bytes(len(data[at : at + 64]))
    file.write_bytes(data)


def truncate(file: Path, rng: np.random.Generator) -> None:
    file.write_bytes(file.read_bytes()[: rng.integers(file.stat().st_size)])


def empty(file: Path, rng: np.random.Generator) -> None:
    file.write_bytes(b"")


def remove(file: Path, rng: np.random.Generator) -> None:
    file.unlink()


DAMAGES: tuple[Damage, ...] = (flip_bit, zero_block, noise, truncate, empty, remove)


def make_run(folder: Path) -> Path:
    """Returns a workdir with checkpoints of a small pretraining."""
    workdir = folder / "run"
    if not workdir.exists():
        code, output = run_command([*PRETRAIN, f"--workdir={workdir}"])
        if code:
            raise RuntimeError(output)
    return workdir


def campaign(count: int, seed: int, folder: Path) -> dict[str, int]:
    """Counts outcomes of damages to the newest checkpoint, as `vit_jax.load` and a resume see it.

    "equal": the damage changed no number that is read. "refused": a ValueError or OSError. "WRONG:
    other numbers": in silence. "WRONG: not noticed": a resume would take damaged optimizer state.
    """
    workdir = make_run(folder)
    checkpoint = workdir / "checkpoints" / str(max(saved_steps(workdir)))
    expected = jax.tree.map(np.asarray, load(checkpoint).params)
    rng, outcomes = np.random.default_rng(seed), Counter()
    copy = folder / "damaged" / checkpoint.name
    for number in range(count):
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(checkpoint, copy)
        files = sorted(p for p in copy.rglob("*") if p.is_file() and p.stat().st_size)
        file, damage = files[rng.integers(len(files))], DAMAGES[number % len(DAMAGES)]
        damage(file, rng)
        outcome, message = _outcome(copy, expected)
        if file.relative_to(copy).parts[0] == "training" and not find_damage(copy):
            outcome = "WRONG: not noticed"
        outcomes[outcome] += 1
        line = {"file": str(file.relative_to(copy)), "damage": damage.__name__, "outcome": outcome}
        print(json.dumps({**line, "message": message}), flush=True)
    return dict(outcomes)


def _outcome(checkpoint: Path, expected: dict) -> tuple[str, str]:
    try:
        found = load(checkpoint).params
    except (ValueError, OSError) as error:
        return "refused", str(error)[:200]
    except Exception as error:  # counted as wrong
        return f"WRONG: {type(error).__name__}", str(error)[:200]
    same = jax.tree.structure(found) == jax.tree.structure(expected) and all(
        np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    )
    return ("equal" if same else "WRONG: other numbers"), ""
