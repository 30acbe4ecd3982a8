"""Formats plans as JSON values and as text. Estimates are labelled as such."""

import math
from typing import Any

import jax

from vit_jax.costs.chips import GIB, Chip
from vit_jax.costs.collectives import Collective
from vit_jax.costs.compiled import Kernel, OutOfMemory, memory
from vit_jax.costs.topology import Topology


def device_bytes(shapes: Any, shardings: Any) -> int:
    """Returns the bytes of one device's shards of a tree, without layout padding."""
    parts = jax.tree.map(
        lambda s, at: s.dtype.itemsize * math.prod(at.shard_shape(s.shape)), shapes, shardings
    )
    return sum(jax.tree.leaves(parts))


def memory_report(
    shapes: Any, shardings: Any, compiled: Any | OutOfMemory, capacity: float
) -> dict:
    """Returns the compiler's memory analysis of one device, in GiB.

    Args:
      shapes: of the train state.
      shardings: of the train state.
      compiled: the compiled step, or the error if it doesn't fit.
      capacity: memory of one device, in GiB.

    Returns:
      "capacity", "fits", "parameters", "optimizer" (with the parameters' average) and "peak". If
      it fits, also "arguments" (state and batch, padded), "temporaries" and "program".
    """
    parameters = device_bytes(shapes.params, shardings.params)
    report = {
        "capacity": capacity,
        "parameters": parameters / GIB,
        "optimizer": (device_bytes(shapes, shardings) - parameters) / GIB,
    }
    if isinstance(compiled, OutOfMemory):
        return {**report, "fits": False, "capacity": compiled.capacity, "peak": compiled.needed}
    used = memory(compiled)
    return {
        **report,
        "fits": used.peak <= capacity * GIB,
        "arguments": used.arguments / GIB,
        "temporaries": used.temporaries / GIB,
        "program": (used.outputs + used.code) / GIB,
        "peak": used.peak / GIB,
    }


def collectives_report(collectives: list[Collective], topology: Topology) -> list[dict]:
    """Sums one device's collectives of a step by kind and group size.

    "asynchronous" of the "count" run beside computations, which take "beside_seconds" by the TPU
    compiler's estimate.
    """
    island = topology.num_devices // topology.islands
    rows: dict[tuple[str, int], dict] = {}
    for collective in collectives:
        kind, size = collective.kind, len(collective.group)
        row = rows.setdefault(
            (kind, size),
            {"kind": kind, "devices": size, "count": 0, "gib": 0.0, "roofline_seconds": 0.0}
            | ({"asynchronous": 0, "beside_seconds": 0.0} if topology.chip.is_tpu else {}),
        )
        seconds = collective.seconds(topology.chip, island)
        row["count"] += collective.times
        row["gib"] += collective.times * collective.bytes / GIB
        if topology.chip.is_tpu:
            row["asynchronous"] += collective.times * (collective.beside > 0)
            row["beside_seconds"] += collective.times * collective.beside / topology.chip.clock
        if seconds is None or row["roofline_seconds"] is None:
            row["roofline_seconds"] = None
        else:
            row["roofline_seconds"] += seconds
    return list(rows.values())


def kernels_report(kernels: list[Kernel], chip: Chip) -> list[dict]:
    """Sums one device's kernels of a step by name; values are None without a cost estimate.

    The compiler's cycles don't include kernels; `roofline_seconds` is their minimum time.
    """
    rows: dict[str, dict] = {}
    for kernel in kernels:
        row = rows.setdefault(
            kernel.name,
            {"name": kernel.name, "count": 0, "flops": 0, "gib": 0.0, "roofline_seconds": 0.0},
        )
        row["count"] += kernel.times
        seconds = kernel.seconds(chip)
        if seconds is None or row["flops"] is None:
            row |= {"flops": None, "gib": None, "roofline_seconds": None}
        else:
            row["flops"] += kernel.times * kernel.flops
            row["gib"] += kernel.times * kernel.bytes / GIB
            row["roofline_seconds"] += seconds
    return list(rows.values())


def run_report(
    topology: Topology,
    *,
    flops: float,
    batch_size: int,
    steps: int,
    seconds: float | None = None,
    mfu: float | None = None,
    price: float | None = None,
) -> dict:
    """Computes time and price of a run from either the seconds per step or an MFU.

    Args:
      topology: the chips.
      flops: model FLOPs of a step over all chips, without recomputation.
      batch_size: images per step.
      steps: steps of the run.
      seconds: per step.
      mfu: model FLOPs utilisation, in [0, 1].
      price: per chip-hour. A chip of v2, v3 or TPU7x has two devices.
    """
    peak = topology.chip.peak_flops * topology.num_chips
    seconds = flops / (mfu * peak) if seconds is None else seconds
    hours = steps * seconds / 3600
    report = {
        "step_seconds": seconds,
        "mfu": flops / seconds / peak,
        "img_per_sec": batch_size / seconds,
        "img_per_sec_per_chip": batch_size / seconds / topology.num_chips,
        "steps": steps,
        "days": hours / 24,
        "chip_hours": hours * topology.num_chips,
        "device_days": hours / 24 * topology.num_devices,
    }
    return report | ({} if price is None else {"price": price * report["chip_hours"]})


def remedies(report: dict) -> list[str]:
    """Suggests options that may make a step fit, by proportion; `--search` verifies them."""
    sizes, mesh, devices = report["memory_gib"], report["mesh"], report["devices"]
    state = sizes["parameters"] + sizes["optimizer"]
    activations = sizes["peak"] - state
    room = sizes["capacity"] - state
    found = []
    if report["remat"] != "full":
        found.append("remat: --config.model.remat=full saves only the input of each layer")
    per_device = report["batch_size"] // (mesh["data"] * mesh["fsdp"])
    for times in range(2, per_device + 1):
        if per_device % times == 0 and activations / times <= room:
            total = report["accumulation"] * times
            found.append(f"accumulation: --config.accumulation={total}")
            break
    for split in (2**n for n in range(1, 12)):
        over = mesh["fsdp"] * split
        if (devices // mesh["tensor"]) % over == 0 and state / split + activations <= sizes[
            "capacity"
        ]:
            found.append(f"FSDP: --config.mesh.fsdp={over}")
            break
    if room > 0:
        chips = 2 ** math.ceil(math.log2(activations / room)) * report["chips"]
        found.append(f"a larger slice: {chips} chips with the same global batch")
    return found or ["no single option: combine FSDP and remat, or use a smaller batch"]


def show(report: dict) -> str:
    """Formats a plan as a table."""
    sizes = report["memory_gib"]
    mesh = " x ".join(f"{axis}={n}" for axis, n in report["mesh"].items())
    lines = [
        f"{report['model']} at {report['image_size']} px, {report['dataset']} "
        f"({report['num_classes']:,} classes), batch {report['batch_size']:,}",
        f"{report['topology']}: {report['chips']:,} chips, {report['devices']:,} devices, "
        f"mesh {mesh}, remat {report['remat']}, {report['accumulation']} microbatch(es)",
        "",
        "Memory of a device, GiB, as compiled",
    ]
    notes = {
        "arguments": "  the two above and the batch, padded",
        "init_peak": "  during initialisation",
        "without_flash": "  peak with --config.model.attention=xla",
    }
    for name in (
        *("parameters", "optimizer", "arguments", "temporaries", "program", "peak"),
        *("without_flash", "init_peak"),
    ):
        if name in sizes:
            note = notes.get(name, "")
            lines.append(f"  {name:13} {sizes[name]:9.2f}{note}")
    verdict = "fits" if sizes["fits"] else "DOES NOT FIT"
    lines.append(f"  {'capacity':13} {sizes['capacity']:9.2f}  {verdict}")
    if not sizes["fits"]:
        lines += ["", "Options that may make it fit, by proportion (--search compiles them):"]
        lines += [f"  {remedy}" for remedy in remedies(report)]
    lines += ["", "FLOPs of a step, all chips", f"  {'model':13} {report['flops']['model']:9.3g}"]
    if "compiled" in report["flops"]:
        total, recomputed = report["flops"]["compiled"], report["flops"]["recomputed"]
        lines.append(f"  {'compiled':13} {total:9.3g}  {recomputed:+.1%}: recomputed, if more")
    if "collectives" in report:
        lines += ["", "Communication of a device in a step, at full link bandwidth"]
        for row in report["collectives"]:
            seconds = row["roofline_seconds"]
            shown = "unknown network bandwidth" if seconds is None else f"{seconds * 1e3:9.2f} ms"
            if beside := row.get("asynchronous"):
                shown += f", {beside} beside {row['beside_seconds'] * 1e3:.2f} ms of computation"
            lines.append(
                f"  {row['count']:4} x {row['kind']:18} of {row['devices']:4} devices "
                f"{row['gib']:8.3f} GiB {shown}"
            )
        if report["loops_of_unknown_trips"]:
            lines.append(f"  {report['loops_of_unknown_trips']} loops of unknown length count as 1")
    if "cycles" in report:
        lines += [
            "",
            f"Cycles of a device, estimated by the compiler: {report['cycles']:,}: "
            f"{report['compute_seconds'] * 1e3:.1f} ms",
        ]
        if unknown := report["instructions_without_estimate"]:
            lines.append(f"  {unknown} instruction(s) without an estimate count as 0")
    if report.get("kernels"):
        lines += [
            "",
            "Kernels, not in the compiler's estimate: roofline time",
        ]
        for row in report["kernels"]:
            cost = "states no costs" + ": NOT in the time" * ("cycles" in report)
            if row["roofline_seconds"] is not None:
                cost = f"{row['flops']:9.3g} FLOPs {row['gib']:8.3f} GiB"
                cost += f" {row['roofline_seconds'] * 1e3:9.2f} ms at least"
            lines.append(f"  {row['count']:4} x {row['name']:30} {cost}")
    if stages := report.get("stages"):
        lines += ["", "Stages; what is above is of the one that takes the most memory"]
        for row in stages:
            seconds = row["step_seconds"]
            lines.append(
                f"  {row['steps']:9,} steps at {row['image_size']:4} px, {row['tokens'] or '':5} "
                f"patches: {row['flops']:9.3g} FLOPs, {row['peak_gib']:6.2f} GiB"
                + ("" if seconds is None else f", {seconds * 1e3:9.1f} ms")
            )
    if run := report.get("run"):
        lines += [
            "",
            f"The run, an ESTIMATE from {run['from']}",
            f"  step         {run['step_seconds'] * 1e3:9.1f} ms, MFU {run['mfu']:.1%}",
            f"  images/s     {run['img_per_sec']:9,.0f}, a chip {run['img_per_sec_per_chip']:,.0f}",
            f"  {run['steps']:,} steps: {run['days']:.2f} days ({run['days'] * 24:.1f} h), "
            f"{run['chip_hours']:,.0f} chip-hours, {run['device_days']:,.0f} device-days",
        ]
        if "price" in run:
            lines.append(f"  price        {run['price']:9,.0f}")
    return "\n".join(lines)


def show_ranked(reports: list[dict]) -> str:
    """Formats the plans that fit as a table, fastest first."""
    lines = ["  step ms    MFU  peak GiB  remat  microbatches  mesh"]
    for report in sorted(reports, key=lambda r: r["run"]["step_seconds"]):
        mesh = " x ".join(f"{axis}={n}" for axis, n in report["mesh"].items())
        run = report["run"]
        lines.append(
            f"{run['step_seconds'] * 1e3:9.1f} {run['mfu']:6.1%} "
            f"{report['memory_gib']['peak']:9.2f}  "
            f"{report['remat']:5}  {report['accumulation']:12}  {mesh}"
        )
    return "\n".join(lines)
