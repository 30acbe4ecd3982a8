"""Says where the time of a step goes: kernels by kind, with sets of XLA's flags, and timm's.

XLA reads its flags when a process starts, so each set has a process of its own. The trace of the
whole step stays beside the results: XProf shows it.
"""

import gzip
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from experiments.benchmarks.gpu.bench import Bench
from experiments.benchmarks.gpu.train import OURS, TIMM, Case, in_turns, rates
from experiments.benchmarks.gpu.worker import Failed, Worker

# The first is also measured beside timm's, so that both have its compiled programs. Few layers are
# as good for comparing flags, and compile in a third of the time.
WHOLE, FEW = Case("ViT-B/16", 512), Case("ViT-B/16", 512, depth=4)
REHEARSAL = Case("ViT-Ti/16", 2, scan=True, image_size=32)
STEPS, SECONDS = 3, 30
FLAGS = {
    "default": "",
    "latency hiding": "--xla_gpu_enable_latency_hiding_scheduler=true",
    "without Triton products": "--xla_gpu_enable_triton_gemm=false",
    "deterministic": "--xla_gpu_deterministic_ops=true",
    "without command buffers": "--xla_gpu_enable_command_buffer=",
}
# The first pattern found in a kernel's name is its kind.
KINDS = (
    ("communication", r"nccl|all-?reduce|all-?gather"),
    ("attention", r"fmha|sdpa|flash|mha_|attention"),
    ("convolution", r"fprop|wgrad|dgrad|convolve|conv2d|convolution"),
    ("product", r"gemm|nvjet|cutlass|xmma|cublas|\bdot\b|_dot_|matmul|addmm"),
    ("copy", r"memcpy|memset|copy|transpose|concatenat|\bpad\b|_pad_"),
    ("reduction", r"reduce|norm"),
    ("elementwise", r"fusion|loop_|wrapped_|elementwise|triton_poi|multi_tensor"),
)


def kind(name: str) -> str:
    """Returns the kind of a kernel."""
    found = (kind for kind, pattern in KINDS if re.search(pattern, name, re.IGNORECASE))
    return next(found, "other")


def device_events(file: Path) -> list[tuple[str, float, float]]:
    """Reads (name, start, duration in ms) of the device's kernels from an xplane.pb file.

    On a CPU, which has no device plane, they are the operations of XLA's own threads.
    """
    import jax

    planes = list(jax.profiler.ProfileData.from_file(str(file)).planes)
    devices = [plane for plane in planes if plane.name.startswith("/device:GPU")]
    found = []
    for plane in devices or planes:
        for line in plane.lines:
            if devices and not line.name.startswith("Stream"):
                continue
            if not devices and not line.name.startswith("tf_XLA"):
                continue
            for event in line.events:
                if devices or "hlo_op" in dict(event.stats):
                    found.append((event.name, event.start_ns / 1e6, event.duration_ns / 1e6))
    return found


def summary(events: Iterable[tuple[str, float, float]], steps: int) -> dict[str, Any]:
    """Sums kernels by kind, in ms a step. Raises Failed without any.

    `idle_ms` is time between kernels, negative if several run at once. `longest` has the kernels
    that take the most time together: [name, ms a step, calls a step].
    """
    events = list(events)
    if not events:
        raise Failed("the trace has no kernels of the device")
    kinds, names, calls = Counter(), Counter(), Counter()
    for name, _, duration in events:
        kinds[kind(name)] += duration / steps
        names[name] += duration / steps
        calls[name] += 1 / steps
    begin, end = min(e[1] for e in events), max(e[1] + e[2] for e in events)
    busy = sum(kinds.values())
    return {
        "kinds_ms": {name: round(ms, 4) for name, ms in kinds.most_common()},
        "busy_ms": busy,
        "idle_ms": (end - begin) / steps - busy,
        "kernels": len(events) / steps,
        "longest": [[n[:120], round(ms, 4), calls[n]] for n, ms in names.most_common(15)],
    }


def measure(bench: Bench) -> None:
    """Times and traces the whole step, timm's, and a step of few layers with each set of flags."""
    whole, few = (REHEARSAL, REHEARSAL) if bench.rehearsal else (WHOLE, FEW)
    _measure_flags(bench, whole, f"trace {whole.variant}", "")
    bench.measure(f"trace {whole.variant} timm", lambda: _trace_timm(bench, whole), SECONDS)
    for title, flags in FLAGS.items():
        _measure_flags(bench, few, f"trace {few.variant}, few layers, {title}", flags)


def _measure_flags(bench: Bench, case: Case, title: str, flags: str) -> None:
    names = [f"{title} {what}" for what in ("time", "kernels")]
    if all(map(bench.has, names)) or not bench.room(names, SECONDS):
        return
    with bench.worker(OURS, {"XLA_FLAGS": flags}) as worker:
        bench.measure(names[0], lambda: _time(bench, worker, case, flags))
        bench.measure(names[1], lambda: _trace(bench, worker, case, title))


def _ready(bench: Bench, worker: Worker, case: Case) -> dict[str, Any]:
    worker.start(bench.patience(30), **case.start)
    return worker.call(bench.patience(2 * SECONDS), "compile", batch=case.batch)


def _time(bench: Bench, worker: Worker, case: Case, flags: str) -> dict[str, Any]:
    ready = _ready(bench, worker, case)
    found = in_turns(bench, {"ours": worker}, case.batch)["ours"]
    if isinstance(found, Failed):
        raise found
    return {"flags": flags, **found, **rates(found, ready), **ready}


def _trace(bench: Bench, worker: Worker, case: Case, title: str) -> dict[str, Any]:
    _ready(bench, worker, case)  # quick, if its time was measured
    folder = bench.scratch / title.replace("/", "")
    steps = {"batch": case.batch, "steps": STEPS}
    worker.call(bench.patience(SECONDS), "run", **steps)
    worker.call(bench.patience(SECONDS), "trace", folder=str(folder), **steps)
    file = next(folder.rglob("*.xplane.pb"), None)
    if file is None:
        raise Failed("jax wrote no trace")
    if title == f"trace {case.variant}":
        (bench.folder / "trace.xplane.pb.gz").write_bytes(gzip.compress(file.read_bytes()))
    return summary(device_events(file), STEPS)


def _trace_timm(bench: Bench, case: Case) -> dict[str, Any]:
    with bench.worker(TIMM) as worker:
        device = {"device": "cpu"} if bench.rehearsal else {}
        size = {"image_size": case.image_size}
        worker.start(bench.patience(30), variant=case.variant, **size, **device)
        worker.call(bench.patience(3 * SECONDS), "compile", batch=case.batch)
        found = in_turns(bench, {"timm": worker}, case.batch)["timm"]
        if isinstance(found, Failed):
            raise found
        steps = {"batch": case.batch, "steps": STEPS}
        events = worker.call(bench.patience(SECONDS), "kernels", **steps)
    return {**found, **rates(found, {}), **summary(events, STEPS)}
