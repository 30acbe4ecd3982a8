"""What the results say about the package's defaults: attention by length, shares of the peaks."""

import json
import math
from typing import Any

from experiments.benchmarks.gpu.plan import chip_of

USABLE = ("xla", "cudnn")  # by the models
WORTH = 1.1  # a kernel of another kind must be this much faster to be mentioned


def values(results: dict, part: str) -> dict[str, dict[str, Any]]:
    """Returns the values of a part's measurements, by the rest of their names."""
    found = results["measurements"].items()
    part += " "
    return {
        n.removeprefix(part): m["values"] for n, m in found if n.startswith(part) and "values" in m
    }


def fastest_attention(results: dict) -> tuple[tuple[int, str], ...]:
    """Returns (most tokens, implementation), ascending: the fastest that the models can use.

    Only heads of 64 features count. A length between two measured ones takes the nearer's choice,
    by ratio. Empty without measurements.
    """
    times: dict[int, dict[str, float]] = {}
    for row in values(results, "attention").values():
        if row["implementation"] in USABLE and row["shape"][3] == 64:
            tokens = times.setdefault(row["shape"][1], {})
            tokens[row["implementation"]] = row["both_seconds"] / math.prod(row["shape"][:2])
    best = [(tokens, min(found, key=found.get)) for tokens, found in sorted(times.items())]
    merged: list[tuple[int, str]] = []
    for tokens, way in best:
        if merged and merged[-1][1] == way:
            merged.pop()
        elif merged:
            merged[-1] = math.isqrt(merged[-1][0] * tokens), merged[-1][1]
        merged.append((tokens, way))
    return tuple(merged)


def efficiency(results: dict) -> dict[str, Any] | None:
    """Returns the row of costs/measured.json; None without a measurement or the GPU's peaks."""
    plan, start = values(results, "plan"), (results["starts"] or [{}])[-1]
    products = sorted((v["side"], v["tflops"]) for n, v in plan.items() if n.startswith("product"))
    bandwidth = next((v["gb_per_second"] for v in plan.values() if "gb_per_second" in v), None)
    launch = next((v["microseconds"] for v in plan.values() if "microseconds" in v), None)
    attention = sorted(
        (row["shape"][1], row["both_tflops"])
        for row in values(results, "attention").values()
        if row["implementation"] == "cudnn" and row["shape"][3] == 64
    )
    chip = chip_of(results.get("gpu", ""))
    if not (chip and products and attention and bandwidth and launch):
        return None
    peak = chip.device_peak_flops / 1e12
    return {
        "chip": chip.name,
        "products": [[side, round(rate / peak, 4)] for side, rate in products],
        "attention": [[tokens, round(rate / peak, 4)] for tokens, rate in attention],
        "bandwidth": round(bandwidth * 1e9 / chip.hbm_bandwidth, 4),
        "launch_seconds": round(launch / 1e6, 9),
        "source": f"{results['gpu']}, {start['date'][:10]}, jax {start['versions'].get('jax')}",
    }


def choices(results: dict) -> str:
    """Says what the results would change in the package; or that they say nothing yet."""
    lines = []
    if table := fastest_attention(results):
        shown = ", ".join(f'({tokens}, "{way}")' for tokens, way in table)
        lines += [f'_MEASURED of models/hardware.py:  "{results["gpu"]}": ({shown},),']
        lines += _faster_kernels(results)
    if row := None if results.get("rehearsal") else efficiency(results):
        lines += ["a row of costs/measured.json:", json.dumps(row, indent=1)]
    return "\n".join(lines) or "The results say nothing about the defaults yet."


def _faster_kernels(results: dict) -> list[str]:
    """Returns lines about kernels that the models can't use and that are faster."""
    rows = values(results, "attention").values()
    shapes = {tuple(row["shape"]) for row in rows}
    lines = []
    for shape in sorted(shapes):
        times = {r["implementation"]: r["both_seconds"] for r in rows if tuple(r["shape"]) == shape}
        usable = min((times[way] for way in USABLE if way in times), default=0.0)
        lines += [
            f"{way} is {usable / seconds:.2f} times as fast for {shape[1]} tokens of {shape[3]}"
            for way, seconds in times.items()
            if way not in USABLE and usable > WORTH * seconds
        ]
    return lines
