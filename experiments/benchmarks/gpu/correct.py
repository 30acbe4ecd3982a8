"""Measures whether a GPU computes the same as a CPU, resumes exactly, and gains from 8 bits."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from experiments.benchmarks.gpu.bench import Bench
from experiments.benchmarks.gpu.train import OURS, in_turns, rates
from experiments.benchmarks.gpu.worker import Failed, run_module

QUANTIZED = "experiments.benchmarks.gpu.steps:Quantized"
SECONDS = {"checks": 90, "eight bits": 45}
# Title: options of the model, environment. The first is what the others are compared with.
EXACT = {"JAX_DEFAULT_MATMUL_PRECISION": "highest"}
LOSSES = {
    "float32 on the CPU": ({"dtype": "float32"}, {**EXACT, "JAX_PLATFORMS": "cpu"}),
    "float32": ({"dtype": "float32"}, EXACT),
    "bfloat16": ({"attention": "auto"}, {}),
    "bfloat16, plain attention": ({"attention": "xla"}, {}),
}
RESUMED = {"default flags": "", "deterministic": "--xla_gpu_deterministic_ops=true"}
STEPS = 20
EIGHT_BITS = {"bfloat16": (OURS, {})} | {
    dtype: (QUANTIZED, {"dtype": dtype}) for dtype in ("int8", "float8_e4m3fn")
}
PRETRAIN = (
    "vit_jax.pretrain",
    "--config=pretrain/formula:classes=10,steps=200",
    "--config.model.variant=ViT-Ti/8",
    "--config.model.dtype=bfloat16",
    "--config.image_size=64",
    "--config.batch_size=64",
    "--config.checkpoint.every=20",
    "--config.log_every=1",
    "--config.eval_every=200",
)
TINY = ("--config.model.variant=ViT-nano/8", "--config.image_size=16", "--config.batch_size=8")


def measure(bench: Bench) -> None:
    """Compares losses, kills and resumes runs, all side by side; then times products of 8 bits."""
    variant, batch, size = ("ViT-Ti/16", 4, 32) if bench.rehearsal else ("ViT-Ti/16", 32, 224)
    checks = {}
    for title, (options, environment) in LOSSES.items():
        case = {"variant": variant, "image_size": size, "options": {"scan": True, **options}}
        checks[f"correct losses {title}"] = partial(_losses, bench, case, environment, batch)
    for title, flags in RESUMED.items():
        checks[f"correct resume {title}"] = partial(_resume, bench, bench.scratch / title, flags)
    checks = {name: check for name, check in checks.items() if not bench.has(name)}
    if checks and bench.room(list(checks), SECONDS["checks"]):
        with ThreadPoolExecutor(len(checks)) as pool:
            began = {name: pool.submit(check) for name, check in checks.items()}
            for name, check in began.items():
                bench.measure(name, check.result)
    for title, (what, arguments) in EIGHT_BITS.items():
        name = f"correct eight bits {title}"
        bench.measure(
            name, lambda w=what, a=arguments: _eight_bits(bench, w, a), SECONDS["eight bits"]
        )


def _losses(bench: Bench, case: dict, environment: dict, batch: int) -> dict[str, Any]:
    with bench.worker(OURS, environment) as worker:
        worker.start(bench.patience(30), **case)
        ready = worker.call(bench.patience(SECONDS["checks"]), "compile", batch=batch)
        patience = bench.patience(2 * SECONDS["checks"])
        losses = worker.call(patience, "losses", batch=batch, steps=STEPS)
    return {"losses": losses, "attention": ready["attention"], "batch": batch}


def _eight_bits(bench: Bench, what: str, arguments: dict) -> dict[str, Any]:
    """Times H/14's step with a quarter of its layers, and trains it on drawn images."""
    variant, batch, size, steps = ("ViT-H/14", 64, 224, 300)
    options = {"scan": True, "depth": 8}
    if bench.rehearsal:
        variant, batch, size, steps, options = "ViT-Ti/16", 4, 32, 6, {"scan": True, "depth": 1}
    patience = bench.patience(SECONDS["eight bits"])
    with bench.worker(what) as worker:
        start = {"variant": variant, "image_size": size, "options": options}
        worker.start(bench.patience(30), **start, **arguments)
        ready = worker.call(patience, "compile", batch=batch)
        found = in_turns(bench, {"ours": worker}, batch)["ours"]
        if isinstance(found, Failed):
            raise found
        losses = worker.call(patience, "losses", batch=batch, steps=steps, batches=16)
    return {**found, **rates(found, ready), **ready, "losses": losses}


def _resume(bench: Bench, folder: Path, flags: str) -> dict[str, Any]:
    """Runs a recipe twice, once killed after its first checkpoint; compares all arrays and records.

    Raises Failed if a run doesn't end well.
    """
    from experiments.campaigns.kills import run_digests
    from vit_jax.training.metrics import read_metrics

    whole, killed = folder / "whole", folder / "killed"
    began = time.monotonic()
    _run(bench, whole, flags)
    seconds = time.monotonic() - began

    def has_saved() -> bool:
        saved = (killed / "checkpoints" / "20").exists()
        return saved and read_metrics(killed)[-1]["step"] > 20

    _run(bench, killed, flags, has_saved)
    at = read_metrics(killed)[-1]["step"]
    if at == read_metrics(whole)[-1]["step"]:
        raise Failed("the run ended before it was killed: it is too short for this device")
    _run(bench, killed, flags)
    expected, found = run_digests(whole), run_digests(killed)
    differing = [key for key in sorted(expected | found) if expected.get(key) != found.get(key)]
    return {
        "flags": flags,
        "killed_after_step": at,
        "equal": not differing,
        "differing": differing[:5],
        "arrays": len(expected),
        "seconds": seconds,
    }


def _run(bench: Bench, workdir: Path, flags: str, stop: Callable = lambda: False) -> None:
    arguments = [*PRETRAIN, *(TINY if bench.rehearsal else ()), f"--workdir={workdir}"]
    environment = {**bench.environment, "XLA_FLAGS": flags}
    patience = bench.patience(SECONDS["checks"])
    run_module(arguments, bench.folder / "log.txt", environment, patience, stop)
