"""Formats the step benchmark's reports as Markdown."""

from collections.abc import Iterable

HEADER = """# Training steps estimated by compilers

ESTIMATES, not measurements, from `python -m experiments.benchmarks.step`. step.json has the full
reports: commands, cycles by kind of operation and layer, collectives and versions. `compiler` and
`kernels` are million cycles per step and device. `compiler` is the TPU compiler's estimate of
everything that it schedules. `kernels` is, for Pallas kernels, which it can't analyse, the bundles
of their final schedules or their memory traffic. `ratio` is the sum relative to a plain Flax ViT
(yardstick.py) on the same chips.
"""
PLAIN = "experiments.benchmarks.yardstick:plain"


def compiled_by(reports: Iterable[dict]) -> str:
    """Returns a line with the distinct versions and dates of all reports."""
    seen = {
        f"{', '.join(f'{k} {v}' for k, v in report['versions'].items())} ({report['date']})"
        for report in reports
    }
    return f"Compiled by {'; '.join(sorted(seen))}."


def _place(report: dict) -> tuple:
    keys = ("model", "topology", "per_chip", "image_size")
    return tuple(report[key] for key in keys)


def _row(cells: list) -> str:
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def _settings(report: dict) -> str:
    settings = {**report["options"], **report["mesh"]}
    cells = ["plain Flax" if report["what"] == PLAIN else report["what"]]
    cells += [f"{key}={value}" for key, value in settings.items()]
    if report["from_depths"]:
        cells.append(f"from depths {' and '.join(report['from_depths'])}")
    return ", ".join(cells)


def _tpu_table(reports: list[dict]) -> list[str]:
    columns = ("step", "model", "chips", "images a device", "compiler", "kernels", "sum", "ratio")
    columns += ("implied MFU", "temporary GiB", "peak GiB", "compiled in s", "collectives")
    yardsticks = {_place(r): r["cycles"]["step"] for r in reports if r["what"] == PLAIN}
    lines = [_row(columns), "|---" * len(columns) + "|"]
    for report in reports:
        cycles, last = report["cycles"], report["compiled"][-1]
        yardstick = yardsticks.get(_place(report))
        whole = not report["from_depths"]  # memory of fewer layers isn't meaningful
        collectives = (
            f"{row['count']} {row['kind']} of {row['gib']:.2f} GiB" for row in last["collectives"]
        )
        lines.append(
            _row(
                [
                    _settings(report),
                    report["model"],
                    report["topology"],
                    report["per_chip"],
                    *(f"{cycles[key] / 1e6:.1f}" for key in ("compiler", "kernels", "step")),
                    f"{cycles['step'] / yardstick:.2f}" if yardstick else "",
                    f"{report['implied_mfu']:.1%}",
                    f"{last['temporary_gib']:.2f}" if whole else "",
                    f"{last['peak_gib']:.2f}" if whole else "",
                    last["compile_seconds"] if whole else "",
                    "; ".join(collectives),
                ]
            )
        )
    return lines


def _gpu_table(reports: list[dict]) -> list[str]:
    columns = ("step", "model", "GPUs", "images a device", "temporary GiB", "peak GiB")
    columns += ("what a step starts, how often",)
    lines = [_row(columns), "|---" * len(columns) + "|"]
    for report in reports:
        last = report["compiled"][-1]
        sizes = [f"{last[key]:.2f}" for key in ("temporary_gib", "peak_gib")]
        counts = ", ".join(f"{count} {name}" for name, count in last["started"].items())
        place = [report[key] for key in ("model", "topology", "per_chip")]
        lines.append(_row([_settings(report), *place, *sizes, counts]))
    return lines


def table(reports: dict[str, dict]) -> str:
    """Formats all reports: TPUs, then GPUs."""
    ordered = sorted(reports.values(), key=lambda r: (*_place(r), r["what"], str(r["mesh"])))
    tpus = [report for report in ordered if "cycles" in report]
    gpus = [report for report in ordered if "cycles" not in report]
    lines = [HEADER]
    if tpus:
        lines += _tpu_table(tpus)
    if gpus:
        lines += ["", *_gpu_table(gpus)]
    return "\n".join([*lines, "", compiled_by(ordered), ""])
