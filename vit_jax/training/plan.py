"""Plans a run: compiles its step for chips you needn't have; reports memory, time and price.

`plan` is the public function; `plan_step` plans one `Training`, `search` ranks meshes.
"""

import dataclasses
import math
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from vit_jax.config import build
from vit_jax.costs.chips import GIB
from vit_jax.costs.compiled import OutOfMemory, Program, memory
from vit_jax.costs.gpu_time import efficiency, take_apart
from vit_jax.costs.report import (
    collectives_report,
    kernels_report,
    memory_report,
    run_report,
    show,
)
from vit_jax.costs.topology import Topology, open_topology, parse_topology
from vit_jax.data.pipeline import dataset_size
from vit_jax.models.transformer import further_remat
from vit_jax.models.variants import build_model
from vit_jax.parallel.mesh import MeshConfig, batch_parts, check_batch_size, make_mesh
from vit_jax.training.memory import compile_init, compile_step
from vit_jax.training.recipe import TrainConfig, Training, build_training

# For GPUs, whose cycles XLA doesn't estimate, until `costs.gpu_time` has measurements.
ASSUMED_MFU = 0.4


@dataclasses.dataclass(frozen=True, repr=False)
class Plan(Mapping):
    """A plan's report: a mapping that JSON can hold; its repr is a table."""

    report: dict[str, Any]

    @property
    def fits(self) -> bool:
        """Whether the step and the initialisation fit into a device's memory."""
        return self.report["memory_gib"]["fits"]

    def __getitem__(self, name: str) -> Any:
        return self.report[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.report)

    def __len__(self) -> int:
        return len(self.report)

    def __repr__(self) -> str:
        return show(self.report)


def plan(
    config: Mapping[str, Any] | TrainConfig,
    topology: str,
    *,
    num_slices: int = 1,
    mfu: float | None = None,
    price: float | None = None,
    num_classes: int | None = None,
    num_examples: int | None = None,
) -> Plan:
    """Compiles a recipe's step for a topology, on any machine; reports memory, time and price.

    Args:
      config: a recipe, such as `vit_jax.recipe` returns, or the dataclass.
      topology: the chips: "v5e:16x16", "h100:8", "h100:32x8" (nodes x GPUs).
      num_slices: TPU slices, connected by the data center's network.
      mfu: estimates a step's time from this MFU instead of the compiler's cycles.
      price: per chip-hour, in any currency.
      num_classes, num_examples: of the dataset, if it is not prepared here.

    Raises ValueError for a recipe or topology that doesn't exist or fit, and if the compiler for
    the chips isn't installed.
    """
    prepared = prepare_plan(config, topology, num_slices, num_classes, num_examples)
    training = build_training(
        prepared.config, make_mesh(prepared.config.mesh, prepared.devices), *prepared.size
    )
    return Plan(plan_step(training, prepared.topology, mfu=mfu, price=price))


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A recipe, the chips to plan it for, and its data's (classes, examples)."""

    config: TrainConfig
    topology: Topology
    devices: list[jax.Device]
    size: tuple[int, int]


def prepare_plan(
    config: Mapping[str, Any] | TrainConfig,
    topology: str,
    num_slices: int = 1,
    num_classes: int | None = None,
    num_examples: int | None = None,
) -> Prepared:
    """Checks the arguments of `plan` and opens the topology, without compiling anything."""
    config = build(TrainConfig, config)
    chips = parse_topology(topology, num_slices)
    size = dataset_size(config.data, num_classes, num_examples)
    return Prepared(config, chips, open_topology(chips), size)


def check_recipe(config: TrainConfig, devices: str) -> None:
    """Builds a recipe's training step for a number of devices, without devices, data or compiler.

    Call it before any other use of jax. `devices` is a number, a topology, a TPU accelerator type
    or a product: "256", "v5litepod-256*2". Raises ValueError if the recipe doesn't fit.
    """
    counts = (
        int(part) if part.isdecimal() else parse_topology(part).num_devices
        for part in devices.split("*")
    )
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", math.prod(counts))
    try:
        size = dataset_size(config.data)
    except (ValueError, FileNotFoundError):  # the data is elsewhere: assume enough examples
        size = (1000, 100_000 * config.batch_size)
    build_training(config, make_mesh(config.mesh), *size)


def plan_step(
    training: Training,
    topology: Topology,
    mfu: float | None = None,
    price: float | None = None,
    whole: bool = True,
) -> dict:
    """Compiles a step of each stage; returns a report that JSON can hold.

    With several stages the report is of the stage with the most memory, `run` covers all stages,
    and `stages` has a row for each.

    `whole` also compiles the initialisation and, for GPUs, the step without flash attention.
    """
    reports = [
        _plan_stage(training.during(stage), topology, mfu, price, whole)
        for stage in training.stages
        if stage.start < training.steps
    ]
    if len(reports) == 1:
        return reports[0]
    report = max(reports, key=lambda report: report["memory_gib"]["peak"])
    rows = [
        {
            "image_size": stage.model.image_size[0],
            "steps": training.during(stage).steps,
            "tokens": stage.tokens,
            "flops": planned["flops"]["model"],
            "peak_gib": planned["memory_gib"]["peak"],
            "step_seconds": planned.get("run", {}).get("step_seconds"),
        }
        for stage, planned in zip(training.stages, reports, strict=False)
    ]
    seconds = [row["step_seconds"] for row in rows]
    run = {}
    if None not in seconds:
        total = sum(row["steps"] * row["step_seconds"] for row in rows)
        run["run"] = {"from": report["run"]["from"]} | run_report(
            topology,
            flops=training.flops(0, training.steps) / training.steps,
            batch_size=training.config.batch_size,
            steps=training.steps,
            seconds=total / training.steps,
            price=price,
        )
    elapsed = sum(planned["compile_seconds"] for planned in reports)
    side = training.config.image_size
    return {**report, **run, "image_size": side, "stages": rows, "compile_seconds": elapsed}


def _plan_stage(
    training: Training, topology: Topology, mfu: float | None, price: float | None, whole: bool
) -> dict:
    config, mesh = training.config, training.mesh
    start = time.perf_counter()

    def peak(compile_program, training):
        try:
            return memory(compile_program(training)).peak / GIB
        except OutOfMemory as error:
            return error.needed

    try:
        compiled = compile_step(training)
    except OutOfMemory as error:
        compiled = error
    first = training.stages[0].start
    flops = training.flops(first, first + 1)
    report = {
        "model": config.model.variant,
        "dataset": config.data.dataset,
        "num_classes": training.model.num_classes,
        "image_size": training.model.image_size[0],
        "batch_size": config.batch_size,
        "topology": str(topology),
        "chips": topology.num_chips,
        "devices": topology.num_devices,
        "mesh": dict(mesh.shape),
        "remat": config.model.remat,
        "attention": config.model.attention,
        "accumulation": config.accumulation,
        "jax": jax.__version__,
        "memory_gib": memory_report(
            training.shapes, training.shardings, compiled, topology.chip.device_hbm_gib
        ),
        "flops": {"model": flops},
    }
    sizes = report["memory_gib"]
    if whole:
        sizes["init_peak"] = peak(compile_init, training)
        sizes["fits"] &= sizes["init_peak"] <= sizes["capacity"]
    run = {"flops": flops, "batch_size": config.batch_size, "steps": training.steps, "price": price}
    if not isinstance(compiled, OutOfMemory):
        slices = range(0, topology.num_devices, topology.num_devices // topology.num_slices)
        program = Program(compiled.as_text(), tuple(slices))
        report["collectives"] = collectives_report(program.collectives, topology)
        waits = [row["roofline_seconds"] for row in report["collectives"]]
        report["collective_seconds"] = None if None in waits else sum(waits)
        report["loops_of_unknown_trips"] = program.unknown_loops
        report["kernels"] = kernels_report(program.kernels, topology.chip)
        if report["kernels"] and whole and not topology.chip.is_tpu:
            sizes["without_flash"] = peak(compile_step, without_flash(training))
        if topology.chip.is_tpu:  # GPUs' matmuls are cuBLAS calls, which have no estimate
            total = program.flops * topology.num_devices
            report["flops"] |= {"compiled": total, "recomputed": total / flops - 1}
            report["cycles"] = program.cycles
            report["instructions_without_estimate"] = program.without_estimate
            report["compute_seconds"] = program.cycles / topology.chip.clock
    if mfu is None and "cycles" in report:  # assumes no overlap
        kernels = sum(row["roofline_seconds"] or 0.0 for row in report["kernels"])
        waits = report["collective_seconds"] or 0.0
        run["seconds"] = report["compute_seconds"] + kernels + waits
        source = "the compiler's estimated cycles" + " and its kernels' rooflines" * (kernels > 0)
        report["run"] = {"from": source, **run_report(topology, **run)}
    elif mfu is not None or sizes["fits"]:
        measured = efficiency(topology.chip) if mfu is None else None
        if measured:  # assumes no overlap
            seconds = measured.seconds(take_apart(program), topology.chip)
            run["seconds"] = seconds + (report["collective_seconds"] or 0.0)
            source = measured.describe(topology.chip)
        else:
            run["mfu"] = mfu or ASSUMED_MFU
            source = f"an MFU of {mfu}" if mfu else f"an assumed MFU of {ASSUMED_MFU}: --mfu"
        report["run"] = {"from": source, **run_report(topology, **run)}
    return report | {"compile_seconds": time.perf_counter() - start}


def without_flash(training: Training) -> Training:
    """Returns the same stage with plain attention."""
    config = dataclasses.replace(
        training.config,
        model=dataclasses.replace(training.config.model, attention="xla"),
        steps=training.scheduled,
        epochs=None,
    )
    rebuilt = build_training(config, training.mesh, training.model.num_classes, num_examples=1)
    start = training.stages[0].start
    return rebuilt.during(next(stage for stage in rebuilt.stages if stage.start == start))


def search_meshes(
    config: TrainConfig, topology: Topology, num_classes: int
) -> Iterator[MeshConfig]:
    """Yields the recipe's mesh, then data only, all FSDP and halfway between, with tensor 1 and 2.

    FSDP and tensor stay inside a slice or node.
    """
    island = topology.num_devices // topology.islands
    size = (config.image_size, config.image_size)
    heads = build_model(config.model, num_classes, size).config.num_heads
    tensors = {1, config.mesh.tensor, 2} if heads and heads % 2 == 0 else {1, config.mesh.tensor}
    for tensor in sorted(n for n in tensors if island % n == 0):
        whole = island // tensor
        middle = 2 ** (int(math.log2(whole)) // 2)
        for fsdp in sorted({1, config.mesh.fsdp, middle, whole}):
            if whole % fsdp == 0:
                yield dataclasses.replace(config.mesh, data=-1, fsdp=fsdp, tensor=tensor)


def search(prepared: Prepared, **options: Any) -> Iterator[dict]:
    """Yields plans of meshes x remat x microbatches that may fit; `options` go to `plan_step`.

    More remat or accumulation is tried only where less doesn't fit, since both cost time.
    """
    config, topology = prepared.config, prepared.topology
    devices, size = prepared.devices, prepared.size
    check_batch_size(config.batch_size, make_mesh(config.mesh, devices))
    for mesh_config in search_meshes(config, topology, size[0]):
        mesh = make_mesh(mesh_config, devices)
        for remat in further_remat("none", config.model.scan):
            accumulation = 1
            while config.batch_size % (batch_parts(mesh) * accumulation) == 0:
                variant = dataclasses.replace(
                    config,
                    mesh=mesh_config,
                    model=dataclasses.replace(config.model, remat=remat),
                    accumulation=accumulation,
                )
                training = build_training(variant, mesh, *size)
                report = plan_step(training, topology, whole=False, **options)
                yield report
                sizes = report["memory_gib"]
                room = sizes["capacity"] - sizes["parameters"] - sizes["optimizer"]
                if sizes["fits"] or room <= 0:
                    break
                over = (sizes["peak"] - sizes["capacity"] + room) / room
                accumulation *= 2 ** max(1, math.ceil(math.log2(over)))
            if sizes["fits"] and accumulation == 1:
                break


def show_searched(report: dict) -> str:
    """Returns one plan of a search as a line of text."""
    fits = "fits" if report["memory_gib"]["fits"] else "does not fit"
    return (
        f"mesh {report['mesh']}, remat {report['remat']}, {report['accumulation']} "
        f"microbatch(es): {report['memory_gib']['peak']:.2f} GiB, {fits} "
        f"(compiled in {report['compile_seconds']:.0f} s)"
    )
