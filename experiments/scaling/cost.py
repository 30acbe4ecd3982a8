"""Estimates exaFLOPs, chip-hours and price of every run of a study."""

import argparse
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from experiments.scaling.study import Run, Study, expand
from vit_jax.config import InputError, build
from vit_jax.costs.report import run_report
from vit_jax.costs.topology import Topology, open_topology, parse_topology
from vit_jax.data.pipeline import DataConfig, dataset_size
from vit_jax.models.variants import ModelConfig, build_model
from vit_jax.training.stages import StageConfig, build_stages


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of one run. A branch doesn't include its trunk, which is another run."""

    run: Run
    steps: int
    exaflops: float
    chip_hours: float
    days: float
    price: float | None
    fits: bool | None = None  # whether it fits in memory; None without the compiler


def estimate(
    run: Run,
    topology: Topology,
    mfu: float,
    price: float | None,
    compiled: dict[str, dict] | None = None,
) -> Cost:
    """Estimates a run from formula FLOPs and an MFU, or from the compiler's cycles.

    Needs no data if the number of images is known. Leaves out the head if the number of classes
    isn't known, because a fine-tuning dataset isn't prepared.

    Args:
      run: the run.
      topology: the chips.
      mfu: assumed model FLOPs utilisation, in (0, 1].
      price: per chip-hour.
      compiled: None uses `mfu`; otherwise uses the compiler, with this cache of its reports.

    Raises:
      ValueError, FileNotFoundError: epochs of an unknown dataset, or an mfu out of range.
    """
    if not 0 < mfu <= 1:
        raise InputError(f"mfu = {mfu:g}: expected more than 0 and at most 1")
    config = run.config
    classes, examples = dataset_of(config)
    model = build_model(build(ModelConfig, config["model"]), classes, (config["image_size"],) * 2)
    batch_size = config["batch_size"]
    steps = config.get("steps") or math.ceil(config["epochs"] * examples / batch_size)
    configs = [build(StageConfig, values) for values in config.get("stages", ())]
    stages = build_stages(configs, model, steps)
    total = batch_size * sum(stage.flops(run.trunk_steps, steps) for stage in stages)
    steps -= run.trunk_steps
    flops = total / max(steps, 1)
    fits = None
    if compiled is not None:
        planned = _compile(run, topology, classes, examples, compiled)
        fits = planned["memory_gib"]["fits"]
        report = planned.get("run")
        if report:
            report = run_report(
                topology, flops=flops, batch_size=batch_size, steps=steps,
                seconds=report["step_seconds"], price=price,
            )  # fmt: skip
    else:
        report = run_report(
            topology, flops=flops, batch_size=batch_size, steps=steps, mfu=mfu, price=price
        )
    if not report:  # doesn't fit
        report = {"chip_hours": math.nan, "days": math.nan, "price": None}
    exaflops = flops * steps / 1e18
    hours, days = report["chip_hours"], report["days"]
    return Cost(run, steps, exaflops, hours, days, report.get("price"), fits)


def dataset_of(config: Mapping[str, Any]) -> tuple[int, int]:
    """Returns classes and images of a config's dataset; zeros if unknown and not needed."""
    data = build(DataConfig, config["data"])
    try:
        return dataset_size(data)
    except (ValueError, FileNotFoundError):
        if config.get("steps") is None:
            raise
        return 0, 0


def _compile(
    run: Run, topology: Topology, classes: int, examples: int, compiled: dict[str, dict]
) -> dict[str, Any]:
    """Returns the report of vit_jax.plan, also for fine-tuning, which has the same step."""
    from vit_jax.parallel.mesh import make_mesh
    from vit_jax.training.plan import plan_step
    from vit_jax.training.recipe import TrainConfig, build_training

    names = {field.name for field in dataclasses.fields(TrainConfig)} - {"resume"}
    fields = {k: v for k, v in run.config.items() if k in names}
    fields |= {"seed": 0, "data": {"dataset": run.config["data"]["dataset"]}}
    fields |= {"evaluators": {}}
    fields |= {"steps": 1000, "epochs": None, "schedule": {"peak": 1.0, "warmup": 0}}
    config = build(TrainConfig, fields)
    program = f"{config} {classes} {topology}"  # shared by learning rates, seeds, budgets
    if program not in compiled:
        mesh = make_mesh(config.mesh, open_topology(topology))
        training = build_training(config, mesh, classes or 1000, max(examples, 1))
        compiled[program] = plan_step(training, topology)
    return compiled[program]


def show_cost(study: Study, options: argparse.Namespace) -> None:
    """Prints one line per group of runs, and sums."""
    topology = parse_topology(options.topology, options.num_slices)
    source = "the compiler's cycles" if options.compile else f"an MFU of {options.mfu:.0%}"
    print(f"{study.name} on {topology}, time from {source}; evaluations and input not counted\n")
    compiled = {} if options.compile else None
    price = options.price_per_chip_hour
    costs = [estimate(run, topology, options.mfu, price, compiled) for run in expand(study)]
    lines: dict[str, list[Cost]] = {}
    for cost in costs:  # one line for all points and seeds of a sweep
        labels = cost.run.labels | {"kind": cost.run.kind}
        names = [labels.get(k) for k in ("model", "set", "budget", "task")]
        names.append("trunk" if cost.run.kind == "trunk" else None)
        lines.setdefault(" | ".join(filter(None, names)), []).append(cost)
    for name, some in lines.items():
        times = f" x {len(some)}" if len(some) > 1 else ""
        print(line(name + times, total(some)))
    print()
    for kind in ("trunk", "pretrain", "transfer"):
        some = [cost for cost in costs if cost.run.kind == kind]
        if some:
            print(line(f"{len(some)} {kind} runs", total(some)))
    print(line(f"{len(costs)} runs", total(costs)))


def total(costs: list[Cost]) -> Cost:
    """Sums costs of runs in sequence."""
    prices = [cost.price for cost in costs]
    return Cost(
        costs[0].run,
        steps=sum(cost.steps for cost in costs),
        exaflops=sum(cost.exaflops for cost in costs),
        chip_hours=sum(cost.chip_hours for cost in costs),
        days=sum(cost.days for cost in costs),
        price=None if None in prices else sum(prices),
        fits=None if any(c.fits is None for c in costs) else all(c.fits for c in costs),
    )


def line(name: str, cost: Cost) -> str:
    price = "" if cost.price is None else f"  price {cost.price:12,.2f}"
    fits = {None: "", True: "  fits", False: "  DOES NOT FIT"}[cost.fits]
    return (
        f"{name:60} {cost.steps:10,} steps {cost.exaflops:12,.4g} exaFLOPs "
        f"{cost.chip_hours:12,.4g} chip-hours {cost.days:9,.3g} days{price}{fits}"
    )
