"""Starts the commands as their users do, and reads what they left behind."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from vit_jax.training.metrics import CLOCK, read_metrics

ROOT = Path(__file__).parent.parent
TINY = (
    "--config.model.depth=1",
    "--config.batch_size=8",
    "--config.checkpoint.every=4",
    "--config.log_every=1",
    "--config.eval_every=10",
    "--config.classification.validation.data.split=validation[:20]",
    "--config.classification.validation.batch_size=8",
)


def start(module, *arguments, **environment):
    """A command on its way."""
    return subprocess.Popen(
        [sys.executable, "-m", f"vit_jax.{module}", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def command(module, *arguments):
    """A command run to its end: (exit code, output, errors)."""
    process = start(module, *arguments)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def pretrain(workdir, steps, *arguments):
    """Arguments of a small pretraining."""
    config = f"--config=configs/pretrain/formula.py:classes=10,steps={steps}"
    return ("pretrain", config, f"--workdir={workdir}", *TINY, *arguments)


def checkpoint_arrays(workdir):
    """Every array of the newest checkpoint: parameters and optimizer state."""
    folder = workdir / "checkpoints"
    newest = folder / max((p.name for p in folder.iterdir() if p.name.isdigit()), key=int)
    arrays = {"step": newest.name}
    for item in ("params", "training"):
        handler = ocp.PyTreeCheckpointHandler()
        with ocp.Checkpointer(handler) as reader:
            tree = handler.metadata(newest / item).tree
            restore = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
            tree = reader.restore(newest / item, args=ocp.args.PyTreeRestore(restore_args=restore))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            arrays[item + jax.tree_util.keystr(path)] = leaf
    return arrays


def records(workdir):
    """What metrics.jsonl has, without what the clock measured."""
    clock = {*CLOCK, "seconds"}
    return [{k: v for k, v in r.items() if k not in clock} for r in read_metrics(workdir)]
