"""Measures training steps beside timm's, and ours alone at other batch sizes.

All processes of a group of models start together, because compiling takes most of the time: timm's
compile side by side, ours one after the other, because XLA times its candidates for kernels on the
device. Then one model after the other, the two take turns.
"""

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

from experiments.benchmarks.gpu.bench import Bench
from experiments.benchmarks.gpu.worker import Failed, Worker

OURS, TIMM = "experiments.benchmarks.gpu.steps:Ours", "experiments.benchmarks.gpu.steps:Timm"
WINDOWS, WINDOW_SECONDS = 5, 1.0
MEASURE_SECONDS = 4 * WINDOWS * WINDOW_SECONDS  # both contestants, with warm-up


@dataclasses.dataclass(frozen=True)
class Case:
    """A step to measure.

    Attributes:
      variant: such as ViT-B/16.
      batch: images.
      scan: whether the layers are a loop, which compiles in a fraction of the time.
      group: of those beside timm's, models with the same number compile side by side.
      compile_seconds: what compiling ours takes, about.
      image_size: pixels.
      depth: replaces the variant's, unless None.
    """

    variant: str
    batch: int
    scan: bool = False
    group: int = 0
    compile_seconds: float = 25
    image_size: int = 224
    depth: int | None = None

    @property
    def start(self) -> dict[str, Any]:
        """The arguments of `steps.Ours`."""
        options = ({"scan": True} if self.scan else {}) | (
            {"depth": self.depth} if self.depth else {}
        )
        return {"variant": self.variant, "image_size": self.image_size, "options": options}

    def name(self, contestant: str) -> str:
        """The key in the results of a measurement beside timm's."""
        return f"train {self.variant} {contestant} {self.batch}"

    @property
    def names(self) -> list[str]:
        return [self.name("ours"), self.name("timm")]


# Beside timm's; the memory holds both.
CASES = (
    Case("ViT-S/16", 512),
    Case("ViT-B/16", 512),
    Case("ViT-L/16", 256, scan=True),
    Case("ViT-H/14", 64, scan=True, group=1),
    Case("ViT-g/14", 64, scan=True, group=1),
)
# Ours only, in order of worth.
BATCHES = (
    *(
        Case(v, n, compile_seconds=40)
        for v, n in (("ViT-L/16", 256), ("ViT-H/14", 64), ("ViT-g/14", 64))
    ),
    Case("ViT-B/16", 512, scan=True),
    *(Case(v, 1024) for v in ("ViT-B/16", "ViT-S/16")),
    *(Case(v, 128, scan=True) for v in ("ViT-H/14", "ViT-g/14", "ViT-L/16")),
    *(Case(v, 128) for v in ("ViT-B/16", "ViT-S/16")),
    *(Case(v, n, scan=True) for v, n in (("ViT-L/16", 512), ("ViT-H/14", 256), ("ViT-g/14", 256))),
)
REHEARSAL = (Case("ViT-Ti/16", 2, scan=True, compile_seconds=5, image_size=32),)


def measure(bench: Bench) -> None:
    """Measures each model beside timm's."""
    chosen, seconds = [], 20.0
    for case in REHEARSAL if bench.rehearsal else CASES:
        if all(map(bench.has, case.names)):
            continue
        seconds += case.compile_seconds + MEASURE_SECONDS
        if bench.room(case.names, seconds):
            chosen.append(case)
    with contextlib.ExitStack() as stack:
        pairs: dict[Case, dict[str, Worker]] = {case: {} for case in chosen}
        for case in chosen:
            device = {"device": "cpu"} if bench.rehearsal else {}
            size = {"variant": case.variant, "image_size": case.image_size}
            starts = {"ours": (OURS, case.start), "timm": (TIMM, {**size, **device})}
            for name, (what, arguments) in starts.items():
                if not bench.has(case.name(name)):  # as after a start without torch
                    worker = pairs[case][name] = stack.enter_context(bench.worker(what))
                    worker.tell("start", **arguments)
        ready: dict[Case, dict[str, dict]] = {case: {} for case in chosen}
        for group in sorted({case.group for case in chosen}):
            members = [case for case in chosen if case.group == group]
            for case in members:
                if timm := pairs[case].get("timm"):
                    timm.tell("compile", batch=case.batch)
            for name in ("ours", "timm"):
                for case in members:
                    if worker := pairs[case].get(name):
                        if name == "ours":
                            worker.tell("compile", batch=case.batch)
                        _hear_ready(bench, case, name, worker, ready[case])
        for case in chosen:
            began = time.monotonic()
            ours = ready[case].get("ours") or bench.values(case.name("ours")) or {}
            workers = {name: pairs[case][name] for name in ready[case]}
            found = in_turns(bench, workers, case.batch)
            for name, values in found.items():
                if isinstance(values, dict):
                    values.update(ready[case][name], **rates(values, ours))
                bench.record(case.name(name), values, time.monotonic() - began)
            for worker in pairs[case].values():
                worker.close()


def _hear_ready(bench: Bench, case: Case, name: str, worker: Worker, ready: dict) -> None:
    """Hears the answers of `start` and `compile`; a failure is the measurement's result."""
    began = time.monotonic()
    try:
        for _ in range(2):
            answer = worker.hear(bench.patience(2 * case.compile_seconds))
        ready[name] = answer
    except Failed as error:
        bench.record(case.name(name), error, time.monotonic() - began)


def in_turns(
    bench: Bench, workers: dict[str, Worker], batch: int
) -> dict[str, dict[str, Any] | Failed]:
    """Times windows of steps of each worker in turns.

    Returns for each {"batch", "seconds_per_step": a value for each window, and the peak memory},
    or why it failed.
    """
    windows: dict[str, list[float]] = {name: [] for name in workers}
    steps, found = {}, {}

    def attempt(name: str, method: Callable[[], Any]) -> Any:
        if name in found:
            return None
        try:
            return method()
        except Failed as error:
            found[name] = error
            return None

    def run(name: str, steps: int) -> float:
        patience = bench.patience(20 * WINDOW_SECONDS)
        return workers[name].call(patience, "run", batch=batch, steps=steps)

    for name in workers:  # the first steps are slower
        seconds = attempt(name, lambda name=name: run(name, 2) and run(name, 3))
        steps[name] = seconds and max(3, round(WINDOW_SECONDS / seconds))
    for _ in range(2 if bench.rehearsal else WINDOWS):
        for name in workers:
            if seconds := attempt(name, lambda name=name: run(name, steps[name])):
                windows[name].append(seconds)
    for name, worker in workers.items():
        memory = attempt(name, lambda worker=worker: worker.call(bench.patience(5), "memory"))
        if memory is not None:
            found[name] = {"batch": batch, "seconds_per_step": windows[name], **memory}
    return found


def rates(found: dict[str, Any], ours: dict[str, Any]) -> dict[str, float]:
    """Returns images a second, their spread over windows, and the MFU, of which timm's is by our
    count of FLOPs; no MFU for a device whose peak is unknown."""
    from vit_jax.costs.chips import PEAK_FLOPS

    seconds = found["seconds_per_step"]
    middle = statistics.median(seconds)
    result = {
        "img_per_sec": found["batch"] / middle,
        "spread": (max(seconds) - min(seconds)) / middle,
    }
    if peak := PEAK_FLOPS.get(ours.get("device", "")):
        result["mfu"] = ours["model_flops"] / middle / peak
    return result


def measure_batches(bench: Bench) -> None:
    """Measures ours alone: other batch sizes, and layers unrolled or as a loop."""
    for case in REHEARSAL if bench.rehearsal else BATCHES:
        name = f"batches {case.variant} {'scan' if case.scan else 'unrolled'} {case.batch}"
        seconds = 10 + case.compile_seconds + MEASURE_SECONDS / 2
        bench.measure(
            name, lambda case=case: alone(bench, case.start, case.batch, fit=True), seconds
        )


def alone(bench: Bench, start: dict[str, Any], batch: int, fit: bool = False) -> dict[str, Any]:
    """Measures one of ours in a process of its own, whose peak memory is then the step's.

    Args:
      bench: the results.
      start: the arguments of `steps.Ours`.
      batch: images.
      fit: see `steps.Ours.compile`.

    Raises Failed.
    """
    with bench.worker(OURS) as worker:
        worker.start(bench.patience(30), **start)
        ready = worker.call(bench.patience(60), "compile", batch=batch, fit=fit)
        found = in_turns(bench, {"ours": worker}, batch)["ours"]
    if isinstance(found, Failed):
        raise found
    return {**found, **ready, **rates(found, ready)}
