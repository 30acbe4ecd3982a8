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
    """A model, and the batch sizes to measure it with.

    Attributes:
      variant: such as ViT-B/16.
      together: beside timm's; the memory holds both.
      alone: ours only.
      scan: whether the layers are a loop, which compiles in a fraction of the time.
      group: models with the same number compile side by side.
      compile_seconds: what compiling ours takes, about.
    """

    variant: str
    together: int
    alone: tuple[int, ...] = ()
    scan: bool = False
    group: int = 0
    compile_seconds: float = 25
    image_size: int = 224

    def name(self, contestant: str, batch: int | None = None) -> str:
        """The key in the results; the batch size is by default that beside timm's."""
        part = "train" if batch is None else "batches"
        return f"{part} {self.variant} {contestant} {batch or self.together}"

    @property
    def names(self) -> list[str]:
        return [self.name("ours"), self.name("timm")]

    @property
    def options(self) -> dict[str, Any]:
        return {"scan": True} if self.scan else {}


CASES = (
    Case("ViT-S/16", 512, (128, 1024)),
    Case("ViT-B/16", 512, (128, 1024)),
    Case("ViT-L/16", 256, (128, 512), scan=True),
    Case("ViT-H/14", 64, (128, 256), scan=True, group=1),
    Case("ViT-g/14", 64, (128, 256), scan=True, group=1),
)
REHEARSAL = (Case("ViT-Ti/16", 2, (4,), scan=True, compile_seconds=5, image_size=32),)


def cases(bench: Bench) -> tuple[Case, ...]:
    return REHEARSAL if bench.rehearsal else CASES


def measure(bench: Bench) -> None:
    """Measures each model beside timm's."""
    chosen, seconds = [], 20.0
    for case in cases(bench):
        if all(map(bench.has, case.names)):
            continue
        seconds += case.compile_seconds + MEASURE_SECONDS
        if bench.room(case.names, seconds):
            chosen.append(case)
    with contextlib.ExitStack() as stack:
        pairs = {}
        for case in chosen:
            ours, timm = (stack.enter_context(bench.worker(what)) for what in (OURS, TIMM))
            size = {"image_size": case.image_size}
            ours.tell("start", variant=case.variant, options=case.options, **size)
            device = {"device": "cpu"} if bench.rehearsal else {}
            timm.tell("start", variant=case.variant, **size, **device)
            pairs[case] = {"ours": ours, "timm": timm}
        ready = {case: {} for case in chosen}  # contestant -> what compiling returned
        for group in sorted({case.group for case in chosen}):
            members = [case for case in chosen if case.group == group]
            for case in members:
                pairs[case]["timm"].tell("compile", batch=case.together)
            for case in members:
                pairs[case]["ours"].tell("compile", batch=case.together)
                _hear_ready(bench, case, "ours", pairs, ready)
            for case in members:
                _hear_ready(bench, case, "timm", pairs, ready)
        for case in chosen:
            began = time.monotonic()
            workers = {name: pairs[case][name] for name in ready[case]}
            found = in_turns(bench, workers, case.together)
            for name, values in found.items():
                if isinstance(values, dict):
                    values.update(ready[case][name], **rates(values, ready[case].get("ours", {})))
                bench.record(case.name(name), values, time.monotonic() - began)
            for worker in pairs[case].values():
                worker.close()


def _hear_ready(bench: Bench, case: Case, name: str, pairs: dict, ready: dict) -> None:
    """Hears the answers of `start` and `compile`; a failure is the measurement's result."""
    began = time.monotonic()
    try:
        for _ in range(2):
            answer = pairs[case][name].hear(bench.patience(2 * case.compile_seconds))
        ready[case][name] = answer
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
    """Measures ours alone at other batch sizes, and unrolled or as a loop, up to what fits."""
    for case in cases(bench):
        others = [(case.options, batch) for batch in case.alone]
        if case.variant.endswith("B/16"):
            others.append(({"scan": not case.scan}, case.together))
        for options, batch in others:
            name = case.name("ours scan" if options.get("scan") else "ours", batch)
            seconds = 10 + case.compile_seconds + MEASURE_SECONDS / 2
            bench.measure(name, lambda c=case, o=options, b=batch: _alone(bench, c, o, b), seconds)


def _alone(bench: Bench, case: Case, options: dict, batch: int) -> dict[str, Any]:
    """Measures ours, with microbatches and remat that fit the device."""
    with bench.worker(OURS) as worker:
        size = {"image_size": case.image_size}
        patience = bench.patience(60)
        worker.call(patience, "start", variant=case.variant, options=options, **size)
        ready = worker.call(
            bench.patience(2 * case.compile_seconds), "compile", batch=batch, fit=True
        )
        found = in_turns(bench, {"ours": worker}, batch)["ours"]
    if isinstance(found, Failed):
        raise found
    return {**found, **ready, **rates(found, ready)}
