"""Kills a command at random moments; started again, it must end as if it had never been killed."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from PIL import Image

from vit_jax.training.metrics import CLOCK, read_metrics
from vit_jax.weights.trained import saved_steps

ROOT = Path(__file__).parent.parent.parent
PRETRAIN = (
    "vit_jax.pretrain",
    "--config=pretrain/formula:classes=10,steps=40",
    "--config.model.depth=1",
    "--config.batch_size=8",
    "--config.checkpoint.every=5",
    "--config.log_every=1",
    "--config.eval_every=20",
    "--config.evaluators.validation.data.split=validation[:20]",
    "--config.evaluators.validation.batch_size=8",
)
TRANSFER = (
    "vit_jax.transfer",
    "--config=transfer/folder",
    "--config.data.dataset=digits",
    "--config.init=",
    "--config.model.variant=ViT-nano/8",
    "--config.image_size=16",
    "--config.batch_size=32",
    "--config.steps=20",
    "--config.eval_every=10",
    "--config.checkpoint.every=5",
    "--config.workflow.sweep.learning_rates=(0.01,0.03)",
    "--config.workflow.export=()",
)
COMMANDS = ("pretrain", "transfer", "prepare", "study")


def campaign(count: int, seed: int, folder: Path, command: str) -> dict[str, int]:
    """Counts outcomes of `count` kills: "equal", or "WRONG ...".

    Each run is killed up to three times, at moments drawn evenly over the time of a whole run.
    """
    arguments, digests = _COMMANDS[command](folder)
    reference = folder / f"{command}_whole"
    seconds = _whole(arguments(reference), reference)
    expected, outcomes = digests(reference), Counter()
    rng, killed, number = np.random.default_rng(seed), 0, 0
    while killed < count:
        workdir, number = folder / f"{command}_{number}", number + 1
        shutil.rmtree(workdir, ignore_errors=True)
        moments = []
        for moment in rng.uniform(0, seconds, min(3, count - killed)):
            if not _killed(arguments(workdir), moment):
                break
            moments.append(round(moment, 1))
        killed += len(moments)
        code, output = run_command(arguments(workdir))
        if code:
            outcome = f"WRONG: exit code {code}"
            print(output[-2000:])
        else:
            differing = _differing(expected, digests(workdir))
            outcome = f"WRONG: {differing[:3]}" if differing else "equal"
        print(
            json.dumps({"command": command, "killed_after": moments, "outcome": outcome}),
            flush=True,
        )
        outcomes[outcome] += max(len(moments), 1)
        if outcome == "equal":
            shutil.rmtree(workdir, ignore_errors=True)
    return dict(outcomes)


def _whole(arguments: list[str], workdir: Path) -> float:
    """Seconds of an uninterrupted run, with its programs in the compilation cache."""
    for _ in range(2):
        shutil.rmtree(workdir, ignore_errors=True)
        began = time.perf_counter()
        code, output = run_command(arguments)
        if code:
            raise RuntimeError(f"the uninterrupted run failed:\n{output}")
    return time.perf_counter() - began


def start_command(arguments: Sequence[str], **environment: str) -> subprocess.Popen:
    """Starts a module with its arguments in a session of its own; its output is piped."""
    return subprocess.Popen(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(ROOT / "runs" / "campaigns" / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            **environment,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def run_command(arguments: Sequence[str]) -> tuple[int, str]:
    """Runs a module to its end: (exit code, output)."""
    process = start_command(arguments)
    output, _ = process.communicate()
    return process.returncode, output


def _killed(arguments: list[str], moment: float) -> bool:
    """Whether the command was still running after so many seconds, and then killed."""
    process = start_command(arguments)
    try:
        process.communicate(timeout=moment)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return True
    return False


def _differing(expected: dict[str, str], found: dict[str, str]) -> list[str]:
    return [k for k in sorted(expected.keys() | found.keys()) if expected.get(k) != found.get(k)]


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def checkpoint_arrays(workdir: Path) -> dict[str, np.ndarray | str]:
    """Returns the arrays of the newest checkpoint, parameters and optimizer state, and its step."""
    step = max(saved_steps(workdir))
    newest = (workdir / "checkpoints" / str(step)).absolute()
    arrays: dict[str, np.ndarray | str] = {"step": str(step)}
    for item in ("params", "training"):
        handler = ocp.PyTreeCheckpointHandler()
        with ocp.Checkpointer(handler) as reader:
            tree = handler.metadata(newest / item).tree
            restore = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
            tree = reader.restore(newest / item, args=ocp.args.PyTreeRestore(restore_args=restore))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            arrays[item + jax.tree_util.keystr(path)] = leaf
    return arrays


def records(workdir: Path) -> list[dict]:
    """Returns the records of metrics.jsonl without what a clock measured."""
    return [{k: v for k, v in r.items() if k not in CLOCK} for r in read_metrics(workdir)]


def run_digests(workdir: Path) -> dict[str, str]:
    """Digests of every array of the newest checkpoint, and of the records without times."""
    arrays = checkpoint_arrays(workdir)
    found = {name: _digest(np.asarray(array).tobytes()) for name, array in arrays.items()}
    return {**found, "records": _digest(json.dumps(records(workdir)).encode())}


def _pretrain(folder: Path) -> tuple[Callable, Callable]:
    return lambda workdir: [*PRETRAIN, f"--workdir={workdir}"], run_digests


def _transfer(folder: Path) -> tuple[Callable, Callable]:
    def digests(workdir: Path) -> dict[str, str]:
        results = json.loads((workdir / "results.json").read_text())
        for measured in ("trials", "seconds_of_last_start", "peak_host_memory_gib"):
            del results[measured]
        return {**run_digests(workdir), "results": _digest(json.dumps(results).encode())}

    return lambda workdir: [*TRANSFER, f"--workdir={workdir}"], digests


def _prepare(folder: Path) -> tuple[Callable, Callable]:
    photos = folder / "photos"
    if not photos.exists():
        rng = np.random.default_rng(0)
        for i in range(3000):
            place = photos / f"class_{i % 5}"
            place.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(256, size=(64, 80, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((320, 240)).save(place / f"{i}.jpg")

    def digests(workdir: Path) -> dict[str, str]:
        files = (p for p in sorted(workdir.rglob("*")) if p.is_file())
        return {str(p.relative_to(workdir)): _digest(p.read_bytes()) for p in files}

    command = ("vit_jax.prepare", f"--input={photos}", "--name=photos", "--shards=20")
    return lambda workdir: [*command, f"--output={workdir}"], digests


STUDY = '''"""Two small models, two sizes of data, one task."""
from experiments.scaling.study import Budget, Grid, Model, PretrainingSet, Study, Task
DATA = {"dataset": "strokes/10", "preprocess": "resize", "num_threads": 1}
RECIPE = {
    "image_size": 16, "batch_size": 8, "data": DATA, "log_every": 1,
    "schedule": {"peak": 1e-3, "warmup": 2}, "optimizer": {"name": "adamw"},
    "checkpoint": {"every": 5},
    "evaluators": {"validation": {"data": {**DATA, "split": "validation[:20]"},
                                    "batch_size": 10}},
}
MODELS = tuple(
    Model(f"ViT {d}", "ViT", {"model.variant": "ViT-nano/8", "model.depth": d}) for d in (1, 2)
)


def get_study(_=None):
    sets = tuple(PretrainingSet(f"{n}", n, {"data.split": f"train[:{n}]"}) for n in (50, 100))
    return Study("killed", (Grid(RECIPE, MODELS, sets, (Budget(10),)),))
'''


def _study(folder: Path) -> tuple[Callable, Callable]:
    file = folder / "killed.py"
    file.write_text(STUDY)

    def digests(workdir: Path) -> dict[str, str]:
        found = {}
        for run in sorted((workdir / "runs").iterdir()):
            found |= {f"{run.name}/{k}": v for k, v in run_digests(run).items()}
        return found

    command = ("experiments.scaling", "run", f"--study={file}")
    return lambda workdir: [*command, f"--folder={workdir}"], digests


_COMMANDS = {"pretrain": _pretrain, "transfer": _transfer, "prepare": _prepare, "study": _study}
