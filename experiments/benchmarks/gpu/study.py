"""Runs the scaling study `h200` in the time that is left, and resumes it at the next start.

The study's folders are in runs/scaling/ and take up to 20 GB. The results are beside gpu.json, to
be kept with it: from them a machine without the folders makes what is missing, and again the runs
that are still to be fine-tuned.
"""

import os
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from experiments.benchmarks.gpu.bench import LEAST_SECONDS, Bench
from experiments.benchmarks.gpu.worker import ROOT, Failed, run_module
from experiments.scaling.runner import Store, statuses
from experiments.scaling.study import load_study

COMMAND = "experiments.scaling"
STUDIES = ("h200:rates", "h200")
# A run draws 7,000 images a second with one core, and a GPU waits while it compiles. So several
# runs share the GPU.
PROCESSES = min(8, os.cpu_count() or 1)
ENDED = {"done", "failed", "blocked"}  # a run that diverged has failed
LONGEST = 60  # seconds of a long run: with less time left none begins


def measure(bench: Bench) -> None:
    """Runs the proxies of the learning rates, then the study with the best ones."""
    for name in ("h200:rehearsal",) if bench.rehearsal else STUDIES:
        if not bench.measure(f"study {name}", partial(_run, bench, name), LONGEST):
            return
        if name.endswith(":rates"):
            results, rates = _results(bench, name), ROOT / "experiments/scaling/results/h200"
            draw = [COMMAND, "figures", f"--study={name}", f"--results={results}"]
            log, patience = bench.folder / "log.txt", bench.patience(LEAST_SECONDS)
            run_module([*draw, f"--output={rates}"], log, bench.environment, patience)


def _results(bench: Bench, name: str) -> Path:
    return bench.folder.absolute() / f"{name.replace(':', '_')}.jsonl"


def _run(bench: Bench, name: str) -> dict[str, Any]:
    """Runs a study in several processes; returns what its runs took together.

    Raises Failed if some haven't ended, or all failed.
    """
    study, results = load_study(name), _results(bench, name)
    folder = (bench.scratch if bench.rehearsal else ROOT / "runs/scaling").absolute()
    store = Store(folder / study.name, results)
    minutes = max(bench.left - LONGEST, 0) / 60
    arguments = [COMMAND, "run", f"--study={name}", f"--folder={store.folder}"]
    arguments += [f"--results={results}", f"--minutes={minutes:.2f}", "--retry_failed"]
    compiled = {"JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")}
    environment, patience = {**bench.environment, **compiled}, bench.patience(bench.left)
    stopped = threading.Event()

    def work(_: int) -> str:
        try:
            log = bench.folder / "log.txt"
            run_module(arguments, log, environment, patience, stopped.is_set)
        except Failed as error:  # the other processes' runs count
            return str(error)
        return ""

    with ThreadPoolExecutor(PROCESSES) as pool:
        try:
            errors = [error for error in pool.map(work, range(PROCESSES)) if error]
        finally:
            stopped.set()  # ends the processes if this one is told to end
    states = Counter(status.state for status in statuses(study, store))
    runs = [run for run in store.records().values() if run["status"] == "done"]
    if not runs or not set(states) <= ENDED:
        counts = ", ".join(f"{count} {state}" for state, count in states.items())
        raise Failed("; ".join([f"runs: {counts}. Start again for the rest", *errors[:1]]))
    images = [run["steps"] * run["batch_size"] for run in runs]
    flops = sum(n * run["flops_per_image"] for n, run in zip(images, runs, strict=True))
    return {
        "runs": len(runs),
        "failed": states.total() - states["done"],
        "images": sum(images),
        "exaflops": flops / 1e18,
        "seconds_of_runs": sum(run["seconds"] for run in runs),
        "processes": PROCESSES,
    }
