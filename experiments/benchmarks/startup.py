r"""Measures the time from a command's start to the first step of ViT-B/16, on a CPU.

python -m experiments.benchmarks.startup --output=experiments/benchmarks/results/startup.json

Each start is a new process that imports `vit_jax.pretrain`, initialises the state, compiles the
step and runs it once, with 8 images in float32: first with an empty compilation cache, then with a
full one. Import times per package are from Python's `-X importtime`, without imported packages.
"""

import collections
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

from absl import app, flags

REPEATS = flags.DEFINE_integer("repeats", 3, "Imports to take the minimum of.")
MODEL = flags.DEFINE_string("model", "ViT-B/16", "The variant.")
OUTPUT = flags.DEFINE_string("output", "", "JSON file to write.")

# The parts of vit_jax.pretrain before its loop, timed.
FIRST_STEP = """
import json, sys, time
from vit_jax.training.clock import process_age
marks = {"python": process_age()}
import vit_jax.pretrain
marks["import"] = process_age()
import jax
from vit_jax.data.pipeline import DataConfig
from vit_jax.models.variants import ModelConfig
from vit_jax.parallel.mesh import batch_sharding, make_mesh, MeshConfig, use_mesh
from vit_jax.training.initial import fresh_state
from vit_jax.training.optimizer import OptimizerConfig, ScheduleConfig
from vit_jax.training.recipe import TrainConfig, build_training
jax.config.update("jax_compilation_cache_dir", sys.argv[2])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
import numpy as np
config = TrainConfig(
    model=ModelConfig(sys.argv[1], dtype="float32"), data=DataConfig("strokes/10", "train"),
    image_size=224, batch_size=8, steps=100, schedule=ScheduleConfig(1e-3, warmup=10),
    optimizer=OptimizerConfig(weight_decay=0.1),
)
mesh = make_mesh(MeshConfig(), jax.devices())
training = build_training(config, mesh, 1000, 10_000)
with use_mesh(mesh):
    batch = {"image": np.zeros((8, 224, 224, 3), np.uint8), "label": np.zeros(8, np.int32)}
    batch = jax.device_put(batch, batch_sharding(mesh))
    state = jax.block_until_ready(fresh_state(training)(jax.random.key(0)))
    marks["state"] = process_age()
    lowered = training.lower(state, batch)
    marks["trace"] = process_age()
    step = lowered.compile()
    marks["compile"] = process_age()
    jax.block_until_ready(step(state, batch, jax.numpy.float32(1e-3)))
    marks["step"] = process_age()
print(json.dumps(marks))
"""


def python(*arguments: str) -> subprocess.CompletedProcess:
    """Runs Python in a new process; raises CalledProcessError if it fails."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True)


def first_step(cache: str) -> dict[str, float]:
    """Returns the seconds of each part of a start, and `total`."""
    marks = json.loads(python("-c", FIRST_STEP, MODEL.value, cache).stdout.splitlines()[-1])
    times = list(marks.values())
    parts = {
        name: end - start for name, start, end in zip(marks, [0.0, *times], times, strict=False)
    }
    return {name: round(seconds, 2) for name, seconds in {**parts, "total": times[-1]}.items()}


def imports() -> dict[str, float]:
    """Returns the seconds of `import vit_jax.pretrain` and of the slowest packages in it."""
    text = python("-X", "importtime", "-c", "import vit_jax.pretrain").stderr
    packages: collections.Counter[str] = collections.Counter()
    for line in text.splitlines()[1:]:
        own, _, name = line.removeprefix("import time:").split("|")
        if own.strip().isdigit():
            packages[name.strip().partition(".")[0]] += int(own)
    total = sum(packages.values())
    found = {"total": total, **dict(packages.most_common(12))}
    return {name: round(microseconds / 1e6, 3) for name, microseconds in found.items()}


def main(_) -> None:
    """Measures, prints and writes the results."""
    imported = min((imports() for _ in range(REPEATS.value)), key=lambda found: found["total"])
    with tempfile.TemporaryDirectory() as cache:
        cold, cached = first_step(cache), first_step(cache)
    report = {
        "model": MODEL.value,
        "import_seconds": imported,
        "cold": cold,
        "cached": cached,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "versions": {n: importlib.metadata.version(n) for n in ("jax", "jaxlib", "flax", "optax")},
        "date": datetime.date.today().isoformat(),
    }
    text = json.dumps(report, indent=1)
    print(text)
    if OUTPUT.value:
        Path(OUTPUT.value).write_text(text + "\n")


if __name__ == "__main__":
    app.run(main)
