"""Measures the peak memory of restoring a sharded checkpoint on one device.

python -m experiments.benchmarks.restore_memory --variant=ViT-B/16

One process writes a model's train state (AdamW, random values) from a mesh of data=4 x fsdp=2 CPU
devices; another with a single device restores it. A streaming restore peaks at the state's size;
one that gathers first needs at least twice as much.
"""

import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from absl import app, flags, logging

from vit_jax.config import build
from vit_jax.parallel.mesh import make_mesh, use_mesh
from vit_jax.training.checkpoint import Checkpoints, restore
from vit_jax.training.recipe import TrainConfig, Training, build_training

VARIANT = flags.DEFINE_string("variant", "ViT-B/16", "The model.")
OUTPUT = flags.DEFINE_string("output", None, "JSON file to write.")
ROLE = flags.DEFINE_enum("role", "both", ["both", "write", "read"], "Internal.")
WORKDIR = flags.DEFINE_string("workdir", None, "Internal.")


def training(mesh: dict) -> Training:
    """Builds the model's training on all devices."""
    config = build(
        TrainConfig,
        {
            "model": {"variant": VARIANT.value},
            "data": {"dataset": "imagenet2012"},
            "image_size": 224,
            "batch_size": 8,
            "steps": 10,
            "schedule": {"peak": 1e-3, "warmup": 1},
            "mesh": mesh,
        },
    )
    return build_training(config, make_mesh(config.mesh), 1000, 1_281_167)


def write() -> None:
    """Saves a state with random values from all devices."""
    parts = training({"data": 4, "fsdp": 2})
    rng = np.random.default_rng(0)

    def fill(shape, sharding):
        if not np.issubdtype(shape.dtype, np.floating):
            value = np.full(shape.shape, 7, shape.dtype)
        else:
            value = rng.standard_normal(shape.shape, np.float32).astype(shape.dtype)
        return jax.make_array_from_callback(shape.shape, sharding, lambda index: value[index])

    state = jax.tree.map(fill, parts.shapes, parts.shardings)
    split = sum(not s.is_fully_replicated for s in jax.tree.leaves(parts.shardings))
    with Checkpoints(Path(WORKDIR.value), parts.config.checkpoint, lambda step: None) as saved:
        saved.save(state, parts.model.description)
    print(json.dumps({"tensors": len(jax.tree.leaves(parts.shapes)), "split_tensors": split}))


def read() -> None:
    """Restores the state on one device, and prints sizes in bytes."""
    parts = training({"data": 1, "fsdp": 1})
    as_placed = jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
        parts.shapes,
        parts.shardings,
    )
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, began = memory("VmRSS"), time.perf_counter()
    with use_mesh(parts.mesh):
        state = jax.block_until_ready(restore(Path(WORKDIR.value) / "checkpoints" / "7", as_placed))
    result = {
        "state_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(state)),
        "peak_bytes": memory("VmHWM") - before,
        "after_bytes": memory("VmRSS") - before,
        "seconds": time.perf_counter() - began,
    }
    print(json.dumps(result))


def memory(name: str) -> int:
    """Returns a memory figure of this process in bytes, such as VmHWM."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines[name].split()[0])


def main(_) -> None:
    """Runs both roles in separate processes and reports."""
    logging.set_verbosity(logging.WARNING)
    if ROLE.value != "both":
        write() if ROLE.value == "write" else read()
        return
    result = {"variant": VARIANT.value}
    with tempfile.TemporaryDirectory() as workdir:
        for role, devices in (("write", "8"), ("read", "1")):
            arguments = [f"--role={role}", f"--variant={VARIANT.value}", f"--workdir={workdir}"]
            out = subprocess.run(
                [sys.executable, "-m", "experiments.benchmarks.restore_memory", *arguments],
                env={**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": devices},
                check=True,
                stdout=subprocess.PIPE,
                text=True,
            ).stdout
            result |= json.loads(out.splitlines()[-1])
    result |= {
        "peak_over_state": result["peak_bytes"] / result["state_bytes"],
        "date": datetime.date.today().isoformat(),
        "hardware": f"{platform.machine()}, {os.cpu_count()} CPU cores",
        "jax": jax.__version__,
    }
    text = json.dumps(result, indent=2)
    print(text)
    if OUTPUT.value:
        Path(OUTPUT.value).write_text(text + "\n")


if __name__ == "__main__":
    app.run(main)
