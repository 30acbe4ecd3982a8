r"""Compares training and inference on a CPU in float32: ours, a plain Flax ViT, timm.

pip install torch timm
python -m experiments.benchmarks.cpu --output=experiments/benchmarks/results/cpu.json

Each contestant is a separate process, compiled and warmed up before the first round. They run one
at a time, in an order that rotates with the rounds. All use the same uint8 images, normalise them
in the step, and train with softmax cross-entropy, gradient clipping to norm 1 and AdamW in float32.
Ours trains with scan, which on CPUs saves memory at the same speed. timm runs in torch's eager mode
with fused AdamW. Ratios are medians over rounds of images per second; memory is the process's peak,
including compilation.
"""

import datetime
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from absl import app, flags

from experiments.benchmarks.machine import processor, versions

CASES = flags.DEFINE_list("cases", ["S/16:16", "B/16:8"], "Variant:batch size.")
TASKS = flags.DEFINE_list("tasks", ["train", "infer"], "What to measure.")
ROUNDS = flags.DEFINE_integer("rounds", 5, "Rounds.")
STEPS = flags.DEFINE_integer("steps", 3, "Steps per round.")
OUTPUT = flags.DEFINE_string("output", "", "JSON file to add these cases to.")
WORKER = flags.DEFINE_string("worker", "", "Internal: the contestant of this process.")

TIMM = {"Ti/16": "vit_tiny_patch16_224", "S/16": "vit_small_patch16_224"}
TIMM["B/16"] = "vit_base_patch16_224"


def batch_of(size: int) -> dict[str, np.ndarray]:
    """Returns the images and labels of all contestants."""
    rng = np.random.default_rng(0)
    return {
        "image": rng.integers(0, 256, (size, 224, 224, 3), np.uint8),
        "label": rng.integers(0, 1000, size, np.int32),
    }


def weights(shapes):
    """Returns random weights for inference, in separate host arrays as from a file."""
    import jax
    import jax.numpy as jnp

    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.02 * rng.standard_normal(leaf.shape, np.float32)), shapes
    )


def ours(variant: str, batch: dict, task: str) -> Callable[[], object]:
    """Returns a run of the package's training step or model."""
    import jax
    import jax.numpy as jnp

    from experiments.benchmarks.yardstick import recipe
    from vit_jax.models.variants import ModelConfig, build_model
    from vit_jax.parallel.mesh import MeshConfig, batch_sharding, make_mesh, use_mesh
    from vit_jax.training.initial import fresh_state
    from vit_jax.training.memory import return_freed_memory
    from vit_jax.training.recipe import build_training

    model = ModelConfig(f"ViT-{variant}", dtype="float32", scan=task == "train")
    config = recipe(model, len(batch["label"]), momentum_dtype="float32")
    if task == "infer":
        model = build_model(config.model, 1000, (224, 224))
        params = weights(jax.eval_shape(model.init, jax.random.key(0)))
        images = jnp.asarray(batch["image"])
        apply = jax.jit(lambda params, x: model.apply(params, x / 127.5 - 1.0).logits)
        return lambda: apply(params, images).block_until_ready()
    mesh = make_mesh(MeshConfig(), jax.devices())
    training = build_training(config, mesh, 1000, 1_281_167)
    with use_mesh(mesh):
        state = fresh_state(training)(jax.random.key(0))
        images = jax.device_put(batch, batch_sharding(mesh))
        step = training.lower(state, images).compile()
        return_freed_memory()  # as the loop does
    peak = jnp.float32(1e-3)

    def run():
        nonlocal state
        state, metrics = step(state, images, peak)
        return jax.block_until_ready(metrics)

    return run


def flax(variant: str, batch: dict, task: str) -> Callable[[], object]:
    """Returns a run of the plain Flax ViT (yardstick.py)."""
    import jax
    import jax.numpy as jnp

    from experiments.benchmarks.yardstick import PlainViT, make_step

    model = PlainViT(variant, dtype=jnp.float32)
    images, labels = jnp.asarray(batch["image"]), jnp.asarray(batch["label"])
    key = jax.random.key(0)
    if task == "infer":
        params = weights(jax.eval_shape(model.init, key, images))
        apply = jax.jit(lambda params, x: model.apply(params, x / 127.5 - 1.0))
        return lambda: apply(params, images).block_until_ready()
    params = jax.jit(model.init)(key, images)
    optimizer, step = make_step(model, momentum_dtype=jnp.float32)
    state = jax.jit(optimizer.init)(params)
    step = jax.jit(step, donate_argnums=(0, 1))

    def run():
        nonlocal params, state
        params, state, loss = step(params, state, images, labels)
        return loss.block_until_ready()

    return run


def timm(variant: str, batch: dict, task: str) -> Callable[[], object]:
    """Returns a run of timm's model with torch's fused AdamW, eager."""
    import timm as library
    import torch

    torch.manual_seed(0)
    torch.set_num_threads(os.cpu_count())
    model = library.create_model(TIMM[variant])
    images, labels = torch.from_numpy(batch["image"]), torch.from_numpy(batch["label"]).long()

    def normalised():
        return images.permute(0, 3, 1, 2).float() / 127.5 - 1.0

    if task == "infer":
        model.eval()

        def run():
            with torch.inference_mode():
                return model(normalised())

        return run
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-4, fused=True)

    def run():
        optimizer.zero_grad(set_to_none=True)
        loss = torch.nn.functional.cross_entropy(model(normalised()), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return run


CONTESTANTS = {"ours": ours, "flax": flax, "timm": timm}


def work() -> None:
    """Runs as a contestant: warms up, then times as many steps as each input line says."""
    name, variant, size, task = WORKER.value.split(",")
    start = time.perf_counter()
    run = CONTESTANTS[name](variant, batch_of(int(size)), task)
    run()
    print(time.perf_counter() - start, flush=True)
    run()
    for line in sys.stdin:
        times = []
        for _ in range(int(line)):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        print(json.dumps(times), flush=True)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, flush=True)


def compete(variant: str, size: int, task: str) -> dict:
    """Measures one case: images per second and memory per contestant, and ratios."""
    workers, ready = {}, {}
    for name in CONTESTANTS:
        command = [sys.executable, "-m", "experiments.benchmarks.cpu"]
        workers[name] = subprocess.Popen(
            [*command, f"--worker={name},{variant},{size},{task}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
            text=True,
        )
        ready[name] = float(workers[name].stdout.readline())
    rates: dict[str, list[float]] = {name: [] for name in workers}
    names = list(workers)
    for turn in range(ROUNDS.value):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            workers[name].stdin.write(f"{STEPS.value}\n")
            workers[name].stdin.flush()
            times = json.loads(workers[name].stdout.readline())
            rates[name].append(size / statistics.median(times))
    memory = {name: int(worker.communicate()[0]) / 2**20 for name, worker in workers.items()}
    return {
        "variant": variant,
        "batch": size,
        "task": task,
        "img_per_sec": {name: statistics.median(found) for name, found in rates.items()},
        "rounds": rates,
        "ratio": {
            name: statistics.median(a / b for a, b in zip(rates["ours"], rates[name], strict=True))
            for name in names
            if name != "ours"
        },
        "peak_mib": memory,
        "seconds_to_first_step": ready,
    }


def main(_) -> None:
    """Measures all cases and writes the report."""
    if WORKER.value:
        work()
        return
    names = ("jax", "jaxlib", "flax", "optax", "torch", "timm")
    report = {
        "machine": f"{processor()}, {os.cpu_count()} cores",
        "versions": versions(names),
        "python": platform.python_version(),
        "cases": {},
    }
    path = Path(OUTPUT.value) if OUTPUT.value else None
    if path and path.exists():
        report["cases"] = json.loads(path.read_text())["cases"]
    for case in CASES.value:
        variant, _, size = case.partition(":")
        for task in TASKS.value:
            row = compete(variant, int(size), task)
            print(json.dumps({k: v for k, v in row.items() if k != "rounds"}), flush=True)
            date = datetime.date.today().isoformat()
            report["cases"][f"{task} {case}"] = {**row, "date": date}
            if path:  # after each case, in case a later one fails
                path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    app.run(main)
