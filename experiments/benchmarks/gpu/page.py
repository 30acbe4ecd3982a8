"""Formats gpu.json as a page of Markdown tables."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from experiments.benchmarks.gpu.choose import efficiency, values
from experiments.benchmarks.gpu.plan import chip_of
from vit_jax.costs.gpu_time import Efficiency, Kernel

HEADER = """# Measured on a GPU

Made from gpu.json by `python -m experiments.benchmarks.gpu`, which `--help` explains. On a machine
with one NVIDIA GPU of 100 GiB or more:

    python -m experiments.benchmarks.gpu --output=runs/gpu --minutes=8   # again for what is missing

Needed: the package, and for the comparison torch and timm; for int8 and fp8 qwix. A machine without
a network takes wheels along:

    pip download --no-deps --python-version=3.12 --platform=manylinux_2_28_x86_64 \\
        --platform=manylinux_2_24_x86_64 --platform=manylinux2014_x86_64 \\
        --only-binary=:all: -d wheels \\
        ml_collections grain array_record simplejpeg portpicker qwix tensorflow-datasets \\
        dm-tree immutabledict simple_parsing tensorflow-metadata termcolor toml \\
        docstring-parser importlib_resources googleapis-common-protos
    pip wheel --no-deps -w wheels promise    # 11 MB in all; there: pip install --no-deps wheels/*

`--part=study` runs the scaling study `h200`, in about eight minutes of its own. Keep its results,
h200_rates.jsonl and h200.jsonl, with gpu.json: the next start makes what they lack. Its figures:

    python -m experiments.scaling figures --study=h200 --results=runs/gpu/h200.jsonl

On a machine without a GPU, `--part=predict` adds the predictions of `vit_jax plan`. gpu.json and
gpu.md are then copied here, and what `--part=choose` prints into the package. Rates are medians of
five windows of a second; spread is the largest minus the smallest window over the median. MFU is
the share of the published dense bfloat16 peak that the model's FLOPs take, forward and backward,
without recomputation; timm's by the same count. Memory is the peak of arrays on the device.
"""
NOTHING = "Not measured yet.\n"
# Images a second: our target, and the highest published rate a GPU that we know.
TARGETS = {
    "ViT-S/16": (12_000, "8,003: ViT-5-S, compiled, H100"),
    "ViT-B/16": (4_200, "2,119: 8 H100, with input; 1,459: JAX"),
    "ViT-L/16": (1_300, ""),
    "ViT-H/14": (480, ""),
    "ViT-g/14": (280, "178: NeMo"),
}
RATIO = 1.3  # of ours to timm's, the target


def table(columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> list[str]:
    """Returns the lines of a Markdown table."""
    rows = [[str(cell) for cell in row] for row in rows]
    if not rows:
        return [NOTHING]
    columns = list(columns)
    lines = [f"| {' | '.join(cells)} |" for cells in (columns, *rows)]
    return [lines[0], "|---" * len(columns) + "|", *lines[1:], ""]


def _rate(found: dict | None) -> list[str]:
    """Cells: images a second, MFU, spread, GiB."""
    if not found:
        return [""] * 4
    mfu = f"{found['mfu']:.1%}" if "mfu" in found else ""
    gib = f"{found['peak_gib']:.1f}" if "peak_gib" in found else ""
    return [f"{found['img_per_sec']:,.0f}", mfu, f"{found['spread']:.1%}", gib]


def _train(results: dict) -> list[str]:
    found, rows = values(results, "train"), []
    for name, ours in found.items():
        variant, contestant, batch = name.split(" ")
        if contestant != "ours":
            continue
        timm = found.get(f"{variant} timm {batch}")
        ratio = f"{ours['img_per_sec'] / timm['img_per_sec']:.2f}" if timm else ""
        target, published = TARGETS.get(variant, ("", ""))
        target = f"{target:,}" if target else ""
        rows.append([variant, batch, *_rate(ours), *_rate(timm), ratio, target, published])
    columns = ["model", "batch", "img/s", "MFU", "spread", "GiB"]
    columns += [f"timm's {name}" for name in ("img/s", "MFU", "spread", "GiB")]
    columns += ["ratio", "target", "published img/s a GPU"]
    return [
        f"## Training steps in bfloat16, 224 px, and timm's. The target of the ratio is {RATIO}",
        "",
        *table(columns, rows),
    ]


def _batches(results: dict) -> list[str]:
    rows = []
    for name, ours in values(results, "batches").items():
        variant, how, batch = name.split(" ")
        how = [how, f"{ours['accumulation']} microbatch(es), remat {ours['remat']}"]
        rows.append(
            [variant, batch, ", ".join(how), *_rate(ours), f"{ours['compile_seconds']:.0f}"]
        )
    columns = ["model", "batch", "how", "img/s", "MFU", "spread", "GiB", "compiled in s"]
    return [
        "## Ours alone: other batch sizes, and layers unrolled or as a loop",
        "",
        *table(columns, rows),
    ]


def _attention(results: dict) -> list[str]:
    rows = []
    for found in values(results, "attention").values():
        cells = [found["implementation"], *found["shape"]]
        for key in ("forward", "both"):
            cells += [f"{found[f'{key}_seconds'] * 1e3:.3f}", f"{found[f'{key}_tflops']:.0f}"]
        rows.append([*cells, f"{found['error']:.1e}", f"{found['gradients_error']:.1e}"])
    columns = ["kernel", "images", "tokens", "heads", "features", "forward ms", "TFLOP/s"]
    columns += ["with backward ms", "TFLOP/s", "error", "of gradients"]
    return [
        "## Attention: errors are relative to float32",
        "",
        *table(columns, sorted(rows, key=lambda row: (row[2], row[4], row[0]))),
    ]


def predicted_seconds(results: dict, kernels: list[list]) -> float | None:
    """Returns the predicted time of a step, of rows [kind, size, FLOPs, bytes, calls]."""
    if not (row := efficiency(results)):
        return None
    steps = Counter({Kernel(*fields): calls for *fields, calls in kernels})
    return Efficiency(**row).seconds(steps, chip_of(results["gpu"]))


def _plan(results: dict) -> list[str]:
    rows, predictions = [], values(results, "predict")
    for name, found in values(results, "plan").items():
        if "seconds_per_step" not in found:
            continue
        prediction = predictions.get(name, {})
        seconds = prediction and predicted_seconds(results, prediction["kernels"])
        ms = found["batch"] / found["img_per_sec"] * 1e3
        rows.append(
            [
                name,
                *_beside(found.get("peak_gib"), prediction.get("peak_gib"), ".2f"),
                *_beside(ms, seconds and seconds * 1e3, ".1f"),
            ]
        )
    shares = [["", NOTHING.strip()]]
    if row := efficiency(results):
        shares = [
            ["products by smallest side", ", ".join(f"{n}: {s:.0%}" for n, s in row["products"])]
        ]
        shares += [
            ["cuDNN's attention by tokens", ", ".join(f"{n}: {s:.0%}" for n, s in row["attention"])]
        ]
        shares += [["bandwidth", f"{row['bandwidth']:.0%}"]]
        shares += [["the smallest kernel", f"{row['launch_seconds'] * 1e6:.1f} microseconds"]]
    columns = ["case", "GiB", "predicted", "off by", "ms", "predicted", "off by"]
    return [
        "## Plans against measurements. The targets are 5% for memory and 10% for time",
        "",
        *table(columns, rows),
        "Shares of the published peaks, from which the times are predicted:",
        "",
        *table(["of", "share"], shares),
    ]


def _beside(measured: float | None, predicted: float | None, form: str) -> list[str]:
    """Cells: measured, predicted, relative difference."""
    cells = [format(value, form) if value else "" for value in (measured, predicted)]
    return [*cells, f"{predicted / measured - 1:+.1%}" if measured and predicted else ""]


def _trace(results: dict) -> list[str]:
    times, kernels = {}, {}
    for name, found in values(results, "trace").items():
        for ending, group in ((" time", times), (" kernels", kernels), (" timm", times)):
            if name.endswith(ending):
                group[name.removesuffix(ending) + ending * (ending == " timm")] = found
    kernels |= {name: found for name, found in times.items() if "kinds_ms" in found}
    kinds = Counter()
    for found in kernels.values():
        kinds.update(found["kinds_ms"])
    kinds = [kind for kind, _ in kinds.most_common()]
    rows = []
    for name in times | kernels:
        time, found = times.get(name), kernels.get(name, {})
        traced = ["kernels", "busy_ms", "idle_ms"]
        cells = [f"{found[key]:,.1f}" if found else "" for key in traced]
        cells += [f"{found['kinds_ms'].get(kind, 0):.2f}" if found else "" for kind in kinds]
        rows.append([name, f"{time['img_per_sec']:,.0f}" if time else "", *cells])
    columns = ["step", "img/s", "kernels", "busy ms", "idle ms", *(f"{kind} ms" for kind in kinds)]
    return ["## Where the time of a step goes", "", *table(columns, rows)]


def _input(results: dict) -> list[str]:
    columns = ["what", "img/s", "waiting for input", "cores", "seconds", "more"]
    found, rows = values(results, "input"), []
    for name, row in found.items():
        kind = name.split(" ", 1)[-1]
        alone = found.get(f"pipeline {kind}", {}).get("img_per_processor_second")
        cores = f"{row['cores']:.1f}" if "cores" in row else ""
        if name.startswith("pipeline") and alone:
            cores = f"{row['img_per_sec'] / alone:.1f}"
        seconds = row.get("first_step_seconds") if "first step" in name else row.get("seconds")
        more = row.get("fitted", "")
        more = f"accuracy {row['accuracy']:.1%}" if "accuracy" in row else more
        rows.append(
            [
                name,
                f"{row['img_per_sec']:,.0f}" if "img_per_sec" in row else "",
                f"{row['input_wait']:.0%}" if "input_wait" in row else "",
                cores,
                f"{seconds:.1f}" if seconds else "",
                more,
            ]
        )
    return ["## The whole path: 20,000 JPEGs of 500 x 375", "", *table(columns, rows)]


def _correct(results: dict) -> list[str]:
    found = values(results, "correct")
    losses = {n.removeprefix("losses "): v["losses"] for n, v in found.items() if "losses " in n}
    pairs = (
        ("float32", "float32 on the CPU"),
        ("bfloat16", "float32"),
        ("bfloat16, plain attention", "float32"),
        ("bfloat16", "bfloat16, plain attention"),
    )
    rows = []
    for a, b in pairs:
        if a in losses and b in losses:
            apart = max(abs(x - y) / abs(y) for x, y in zip(losses[a], losses[b], strict=True))
            rows.append(
                [f"losses of {len(losses[a])} steps: {a} against {b}", f"{apart:.1e} apart"]
            )
    for name, row in found.items():
        if name.startswith("resume"):
            said = "bit-identical" if row["equal"] else f"DIFFERENT: {', '.join(row['differing'])}"
            rows.append(
                [f"killed after step {row['killed_after_step']} and resumed, {name[7:]}", said]
            )
    for name, row in found.items():
        if name.startswith("eight bits"):
            last = row["losses"][-16:]
            text = f"{row['img_per_sec']:,.0f} img/s, loss {sum(last) / len(last):.4f} at the end"
            rows.append(
                [f"MLP of H/14, 8 of 32 layers, {len(row['losses'])} steps: {name[11:]}", text]
            )
    return ["## Correctness, and products of 8 bits", "", *table(["what", "result"], rows)]


def _studies(results: dict) -> list[str]:
    rows = []
    for name, found in values(results, "study").items():
        minutes = f"{found['seconds_of_runs'] / 60:.1f}"
        counts = [found["runs"], found["failed"], f"{found['images']:,}"]
        rows.append([name, *counts, f"{found['exaflops']:.3g}", minutes, found["processes"]])
    columns = ["study", "runs", "failed", "images", "exaFLOPs", "minutes of all runs"]
    columns += ["at the same time"]
    return ["## A scaling study. STUDY.jsonl has its results", "", *table(columns, rows)]


def _missing(results: dict) -> list[str]:
    rows = [
        [name, kind.replace("_", " "), found[kind].replace("|", "\\|")]
        for name, found in results["measurements"].items()
        for kind in ("failed", "out_of_memory", "skipped")
        if kind in found
    ]
    if not rows:
        return []
    return ["## What has no number, and why", "", *table(["measurement", "", "reason"], rows)]


def _machines(results: dict) -> list[str]:
    rows = []
    for start in results["starts"]:
        versions = ", ".join(f"{name} {version}" for name, version in start["versions"].items())
        memory = f", {int(start['memory_mib']) / 1024:.0f} GiB" if "memory_mib" in start else ""
        cpu = f"{start['cpu']}, {start['cores']} cores, {start['memory_gib']:.0f} GiB"
        gpu = start["gpu"] + memory
        rows.append([start["date"], gpu, start.get("driver", ""), cpu, start["python"], versions])
    columns = ["start", "GPU", "driver", "host", "Python", "packages"]
    return ["## Hardware and software", "", *table(columns, rows)]


SECTIONS = (
    _train,
    _attention,
    _plan,
    _trace,
    _input,
    _correct,
    _batches,
    _studies,
    _missing,
    _machines,
)


def page(results: dict) -> str:
    """Returns the page; a section without measurements says so."""
    lines = [HEADER]
    if results.get("rehearsal"):
        lines.append("**A rehearsal: tiny sizes on a CPU. None of these numbers is a result.**\n")
    for section in SECTIONS:
        lines += section(results)
    return "\n".join(lines).rstrip() + "\n"
