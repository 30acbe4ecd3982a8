"""Measures the whole path: JPEGs drawn by formula, prepared, read, cropped, trained on.

The images are 500 x 375, of about 60 KB, and a tenth of each class is the validation split. Each is
encoded without and with restart markers and their index, as `vit_jax prepare` writes them.
"""

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from experiments.benchmarks.gpu.bench import Bench
from experiments.benchmarks.gpu.drawing import CLASSES, draw, encode
from experiments.benchmarks.gpu.train import OURS
from experiments.benchmarks.gpu.worker import Failed, run_module

DATA = "experiments.benchmarks.gpu.input:Data"
RUN = "experiments.benchmarks.gpu.input:Pretraining"
KINDS = {"without markers": False, "with markers": True}
SIZE = (375, 500)
IMAGES, SECONDS = 20_000, {"draw": 30, "prepare": 15, "train": 45, "first": 25, "transfer": 60}
# Variant, batch size, steps.
CASES = (("ViT-B/16", 512, 60), ("ViT-S/16", 512, 100))
FIT = ("ViT-H/14", 1024)  # more than fits without microbatches


class Data:
    """Draws and prepares the images.

    Args:
      folder: of the images and the prepared datasets.
      size: (height, width) in pixels.
    """

    def __init__(self, folder: str, size: tuple[int, int]):
        self._folder, self._size = Path(folder), tuple(size)

    def draw(self, images: int) -> dict[str, float]:
        """Writes folder/KIND/SPLIT/CLASS/NUMBER.jpg for both kinds; returns the rate and sizes."""
        began, sizes = time.perf_counter(), dict.fromkeys(KINDS, 0)

        def write(index: int) -> dict[str, int]:
            pixels, found = draw(index, self._size), {}
            split = "validation" if index // CLASSES % 10 == 1 else "train"
            for kind, markers in KINDS.items():
                place = self._folder / kind / split / f"class_{index % CLASSES:02}"
                place.mkdir(parents=True, exist_ok=True)
                data = encode(pixels, markers)
                (place / f"{index:06}.jpg").write_bytes(data)
                found[kind] = len(data)
            return found

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for found in pool.map(write, range(images)):
                for kind, size in found.items():
                    sizes[kind] += size
        seconds = time.perf_counter() - began
        kilobytes = {f"kilobytes {kind}": size / images / 1000 for kind, size in sizes.items()}
        return {"images": images, "img_per_sec": images / seconds, **kilobytes}

    def prepare(self, kind: str) -> dict[str, float]:
        """Prepares a folder as ArrayRecord files; returns images a second."""
        from vit_jax.data.preparation import prepare

        began = time.perf_counter()
        prepare(str(self._folder / kind), str(self._folder / "prepared"), name=_name(kind))
        images = sum(1 for _ in (self._folder / kind).rglob("*.jpg"))
        return {"img_per_sec": images / (time.perf_counter() - began)}

    def decode(self, kind: str, images: int) -> dict[str, float]:
        """Runs the input pipeline alone; returns images a second of wall and of processor time."""
        from experiments.benchmarks.input import measure, ours

        files = sorted((self._folder / kind / "train").rglob("*.jpg"))[:1000]
        jpegs = [file.read_bytes() for file in files]
        processor, wall = measure(lambda: ours(jpegs, os.cpu_count()), images)
        return {"img_per_sec": wall, "img_per_processor_second": processor}


def _name(kind: str) -> str:
    return kind.replace(" ", "_")


class Pretraining:
    """Runs `vit_jax.pretrain` in a process of its own."""

    def run(
        self,
        variant: str,
        batch: int,
        image_size: int,
        steps: int,
        data: dict[str, Any],
        workdir: str,
        **fields: Any,
    ) -> dict[str, Any]:
        """Trains a few steps; returns the last record's speed and the seconds by state.

        `cores` is processor time over wall time while steps run or wait for input.
        `first_step_seconds` are from the start of the process to the end of a run of few steps.
        """
        import dataclasses

        from experiments.benchmarks.yardstick import recipe
        from vit_jax.data.pipeline import DataConfig
        from vit_jax.models.variants import ModelConfig
        from vit_jax.training.clock import process_age
        from vit_jax.training.loop import pretrain
        from vit_jax.training.metrics import read_metrics

        clock = _processor_clock(process_age())
        threads = os.cpu_count()
        pipeline = DataConfig(
            **data, preprocess="inception_crop|flip", num_threads=threads, prefetch=2 * threads
        )
        config = recipe(ModelConfig(variant), batch, image_size, "float32", **fields)
        config = dataclasses.replace(
            config,
            data=pipeline,
            steps=steps,
            schedule=dataclasses.replace(config.schedule, warmup=1),
            log_every=max(1, steps // 4),
        )
        pretrain(config, workdir, clock)
        seconds, last = clock.read(), read_metrics(Path(workdir))[-1]
        keys = ("img_per_sec", "input_wait", "mfu", "loss")
        running = seconds["train"] + seconds["input"]
        return {
            **{key: last[key] for key in keys if key in last},
            "cores": (clock.processor["train"] + clock.processor["input"]) / running,
            "seconds_by_state": {k: round(v, 2) for k, v in seconds.items() if v},
            "first_step_seconds": sum(seconds.values()) - seconds["save"],
        }


def _processor_clock(age: float):
    """Returns a `training.clock.Clock` that also counts processor seconds by state."""
    from vit_jax.training.clock import STATES, Clock

    class ProcessorClock(Clock):
        def __init__(self):
            super().__init__(age)
            self.processor, self._used = dict.fromkeys(STATES, 0.0), time.process_time()

        def turn(self, state: str) -> None:
            used = time.process_time()
            self.processor[self._state] += used - self._used
            self._used = used
            super().turn(state)

    return ProcessorClock()


def measure(bench: Bench) -> None:
    """Draws, prepares, trains, transfers."""
    small, folder = bench.rehearsal, bench.scratch / "images"
    cases = (("ViT-Ti/16", 8, 4),) if small else CASES
    image_size, images = (32, 60) if small else (224, IMAGES)
    # What the images are needed for, in order of worth.
    runs = [
        (f"input train {variant} {kind}", (variant, batch, steps, kind))
        for variant, batch, steps in cases
        for kind in reversed(KINDS)
    ]
    alone = [f"input pipeline {kind}" for kind in KINDS]
    names = [*alone, *(name for name, _ in runs), "input transfer images"]
    if not all(map(bench.has, names)) and bench.room("input draw", SECONDS["draw"]):
        _measure_images(bench, folder, images, runs, image_size)
    _measure_first_step(bench, cases[0], image_size)
    _measure_fit(bench, ("ViT-Ti/16", 8) if small else FIT, image_size)
    name = "input transfer digits"
    bench.measure(name, lambda: _transfer(bench, "digits", "digits"), SECONDS["transfer"])


def _measure_images(bench: Bench, folder: Path, images: int, runs: list, image_size: int) -> None:
    """Draws the images anew, since a start's scratch folder is its own, and measures with them."""
    with bench.worker(DATA, {"JAX_PLATFORMS": "cpu"}) as worker:
        size = (48, 64) if bench.rehearsal else SIZE
        try:
            worker.start(bench.patience(30), folder=str(folder), size=size)
            drawn = worker.call(bench.patience(2 * SECONDS["draw"]), "draw", images=images)
        except Failed as error:
            bench.record("input draw", error, 0)
            return
        bench.record("input draw", drawn, 0)
        for kind in KINDS:
            patience = bench.patience(SECONDS["prepare"])
            bench.measure(
                f"input pipeline {kind}",
                lambda kind=kind, p=patience: worker.call(
                    p, "decode", kind=kind, images=64 if bench.rehearsal else 20_000
                ),
                SECONDS["prepare"],
            )
        prepared = {}
        for kind in KINDS:
            began = time.monotonic()
            try:
                found = worker.call(bench.patience(2 * SECONDS["prepare"]), "prepare", kind=kind)
                prepared[kind] = {"dataset": _name(kind), "data_dir": str(folder / "prepared")}
            except Failed as error:  # the folder itself can be read, too
                found, prepared[kind] = error, {"dataset": str(folder / kind)}
            bench.record(f"input prepare {kind}", found, time.monotonic() - began)
    for name, (variant, batch, steps, kind) in runs:
        case = {"variant": variant, "batch": batch, "steps": steps, "image_size": image_size}
        bench.measure(
            name,
            lambda case=case, kind=kind: _pretrain(bench, data=prepared[kind], **case),
            SECONDS["train"],
        )
    name = "input transfer images"
    plain = str(folder / "without markers")
    bench.measure(name, lambda: _transfer(bench, plain, "images"), SECONDS["transfer"])


def _pretrain(
    bench: Bench, environment: dict[str, str] | None = None, **arguments: Any
) -> dict[str, Any]:
    with bench.worker(RUN, environment) as worker:
        worker.start(bench.patience(30))
        workdir = str(bench.scratch / f"run {time.monotonic_ns()}")
        patience = bench.patience(2 * SECONDS["train"])
        return worker.call(patience, "run", workdir=workdir, **arguments)


def _measure_first_step(bench: Bench, case: tuple, image_size: int) -> None:
    """Measures from a process's start to its second step, before and after its programs are kept.

    The images are drawn in no time.
    """
    variant, batch, _ = case
    cache = bench.scratch / "first step"

    def first_step() -> dict[str, Any]:
        return _pretrain(
            bench,
            {"JAX_COMPILATION_CACHE_DIR": ""},  # the recipe's, below, holds
            data={"dataset": "synthetic/100"},
            compilation_cache=str(cache),
            variant=variant,
            batch=batch,
            steps=2,
            image_size=image_size,
        )

    def again() -> dict[str, Any]:
        if not cache.exists():  # an earlier start measured the first
            first_step()
        return first_step()

    bench.measure("input first step cold", first_step, SECONDS["first"])
    bench.measure("input first step cached", again, SECONDS["first"])


def _measure_fit(bench: Bench, case: tuple[str, int], image_size: int) -> None:
    """Lets `fit_memory` choose for a batch that is too large, and runs the result."""
    variant, batch = case

    def fit() -> dict[str, Any]:
        with bench.worker(OURS) as worker:
            start = {"variant": variant, "image_size": image_size, "options": {"scan": True}}
            worker.start(bench.patience(30), **start)
            found = worker.call(bench.patience(120), "compile", batch=batch, fit=True)
            seconds = worker.call(bench.patience(60), "run", batch=batch, steps=2)
            return {**found, "seconds_per_step": seconds, **worker.call(20, "memory")}

    bench.measure(f"input fit_memory {variant} {batch}", fit, 90)


def _transfer(bench: Bench, data: str, title: str) -> dict[str, Any]:
    """Runs `vit_jax transfer` as users do; returns its seconds and the test accuracy."""
    workdir, patience = bench.scratch / f"transfer {title}", bench.patience(2 * SECONDS["transfer"])
    few = "steps=4,batch=8" if bench.rehearsal else "steps=200"
    command = ["vit_jax.transfer", f"--config=transfer/folder:resnet,head=probe,{few}"]
    command += ["--config.init=embedded", "--config.workflow.export=()"]  # needs no network
    command += [f"--config.data={data}", f"--workdir={workdir}"]
    began = time.monotonic()
    run_module(command, bench.folder / "log.txt", bench.environment, patience)
    results = json.loads((workdir / "results.json").read_text())
    return {"seconds": time.monotonic() - began, "accuracy": results["accuracy"]}
