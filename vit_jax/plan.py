r"""Plans a run on chips that you don't have: does it fit, how fast is it, what does it cost.

python -m vit_jax.plan --config=configs/pretrain/paper.py:ViT-B/16 --topology=v5e:16x16
python -m vit_jax.plan --config=configs/pretrain/paper.py:ViT-L/16,dataset=imagenet21k \
    --topology=v4:8x8x16 --num_slices=2 --price_per_chip_hour=1.2 --output=plan.json

Compiles the recipe's own training step for the named chips, on any machine, without one and without
the data. It needs the compiler alone: pip install 'vit_jax[tpu]', and 'vit_jax[cuda]' for GPUs:
h100:8, or h100:32x8, nodes x GPUs. What it prints is the compiler's estimate and no measurement;
input, evaluations and checkpoints are not in it. `--search` compiles several meshes (data, FSDP,
tensor), ways of remat and microbatches, and ranks those that fit. `--mfu=0.45` takes the time from
a stated MFU instead. Any field of the recipe is a flag: --config.batch_size=512.

What the paper's own runs took, TPUv3-core-days of its Table 2 (device-days here; 2.5k, 0.68k and
0.23k there), at the MFU that they imply:

python -m vit_jax.plan --config=configs/pretrain/jft.py:ViT-H/14,epochs=14 --topology=v3:16x16 \
    --config.model.remat=full --mfu=0.32
python -m vit_jax.plan --config=configs/pretrain/jft.py:ViT-L/16,epochs=14 --topology=v3:16x16 \
    --mfu=0.43
python -m vit_jax.plan --config=configs/pretrain/paper.py:ViT-L/16,dataset=imagenet21k \
    --topology=v3:2x2 --config.accumulation=16 --config.model.remat=full --mfu=0.39
"""

import dataclasses
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from absl import app, flags

from vit_jax import config as configuration
from vit_jax.costs.chips import GIB
from vit_jax.costs.compiled import OutOfMemory, Program, memory
from vit_jax.costs.flops import training_flops
from vit_jax.costs.report import (
    collectives_report,
    kernels_report,
    memory_report,
    run_report,
    show,
    show_ranked,
)
from vit_jax.costs.topology import Topology, open_topology, parse_topology
from vit_jax.data.pipeline import dataset_size
from vit_jax.models.transformer import further_remat
from vit_jax.models.variants import build_model
from vit_jax.parallel.mesh import MeshConfig, batch_parts, check_batch_size, make_mesh
from vit_jax.training.memory import compile_init, compile_step
from vit_jax.training.recipe import TrainConfig, Training, build_training

CONFIG = configuration.define_config_flag()
TOPOLOGY = flags.DEFINE_string("topology", "", "The chips: v5e:16x16, v4:8x8x16, ...")
NUM_SLICES = flags.DEFINE_integer("num_slices", 1, "Slices, joined by the data center's network.")
SEARCH = flags.DEFINE_bool("search", False, "Rank meshes x remat x microbatches that fit.")
PRICE = flags.DEFINE_float("price_per_chip_hour", None, "In any currency.")
MFU = flags.DEFINE_float("mfu", None, "Take the time from this MFU, not the compiler's cycles.")
CLASSES = flags.DEFINE_integer("num_classes", None, "Of the dataset, if it is not prepared here.")
EXAMPLES = flags.DEFINE_integer("num_examples", None, "Of the split, if it is not prepared here.")
OUTPUT = flags.DEFINE_string("output", "", "JSON file to write.")

# Of GPUs, for which XLA estimates no cycles.
ASSUMED_MFU = 0.4


def plan(
    training: Training,
    topology: Topology,
    mfu: float | None = None,
    price: float | None = None,
    whole: bool = True,
) -> dict:
    """Compiles a step and says all there is to say of it, ready for JSON.

    `whole`: the making of the state too, and what a GPU would need without flash attention.
    """
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
    flops = training_flops(training.model) * config.batch_size
    report = {
        "model": config.model.variant,
        "dataset": config.data.dataset,
        "num_classes": training.model.num_classes,
        "image_size": config.image_size,
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
        if topology.chip.is_tpu:  # GPUs' matrix products are calls of cuBLAS, without an estimate
            total = program.flops * topology.num_devices
            report["flops"] |= {"compiled": total, "recomputed": total / flops - 1}
            report["cycles"] = program.cycles
            report["instructions_without_estimate"] = program.without_estimate
            report["compute_seconds"] = program.cycles / topology.chip.clock
    if mfu is None and "cycles" in report:  # as if nothing overlapped
        kernels = sum(row["roofline_seconds"] or 0.0 for row in report["kernels"])
        waits = report["collective_seconds"] or 0.0
        run["seconds"] = report["compute_seconds"] + kernels + waits
        source = "the compiler's estimated cycles" + " and its kernels' rooflines" * (kernels > 0)
        report["run"] = {"from": source, **run_report(topology, **run)}
    elif mfu is not None or sizes["fits"]:
        source = f"an assumed MFU of {ASSUMED_MFU}: --mfu" if mfu is None else f"an MFU of {mfu}"
        run["mfu"] = mfu or ASSUMED_MFU
        report["run"] = {"from": source, **run_report(topology, **run)}
    return report | {"compile_seconds": time.perf_counter() - start}


def without_flash(training: Training) -> Training:
    """The same with plain attention."""
    config = dataclasses.replace(
        training.config,
        model=dataclasses.replace(training.config.model, attention="xla"),
        steps=training.scheduled,
        epochs=None,
    )
    return build_training(config, training.mesh, training.model.num_classes, num_examples=1)


def search_meshes(
    config: TrainConfig, topology: Topology, num_classes: int
) -> Iterator[MeshConfig]:
    """The recipe's, and data alone, all FSDP and the middle between, with tensor 1 and 2.

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


def search(
    config: TrainConfig,
    topology: Topology,
    devices: list[jax.Device],
    size: tuple[int, int],
    **kwargs,
) -> Iterator[dict]:
    """Plans of what may fit, one after another: meshes x remat x microbatches.

    More remat or accumulation is tried only where less doesn't fit, since both cost time.
    """
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
                report = plan(training, topology, whole=False, **kwargs)
                yield report
                sizes = report["memory_gib"]
                room = sizes["capacity"] - sizes["parameters"] - sizes["optimizer"]
                if sizes["fits"] or room <= 0:
                    break
                over = (sizes["peak"] - sizes["capacity"] + room) / room
                accumulation *= 2 ** max(1, math.ceil(math.log2(over)))
            if sizes["fits"] and accumulation == 1:
                break


def main(_) -> None:
    """Plans the recipe of the flags, and prints."""
    with configuration.explained_errors():
        config = configuration.build(TrainConfig, CONFIG.value.to_dict())
        topology = parse_topology(TOPOLOGY.value, NUM_SLICES.value)
        size = dataset_size(config.data, CLASSES.value, EXAMPLES.value)
        devices = open_topology(topology)
        options = {"mfu": MFU.value, "price": PRICE.value}
        if SEARCH.value:
            reports = []
            for report in search(config, topology, devices, size, **options):
                reports.append(report)
                fits = "fits" if report["memory_gib"]["fits"] else "does not fit"
                print(
                    f"mesh {report['mesh']}, remat {report['remat']}, {report['accumulation']} "
                    f"microbatch(es): {report['memory_gib']['peak']:.2f} GiB, {fits} "
                    f"(compiled in {report['compile_seconds']:.0f} s)",
                    flush=True,
                )
            fitting = [report for report in reports if report["memory_gib"]["fits"]]
            print("\n" + (show_ranked(fitting) if fitting else "None fits: take a larger slice."))
            result: Any = reports
        else:
            training = build_training(config, make_mesh(config.mesh, devices), *size)
            result = plan(training, topology, **options)
            print(show(result))
        if OUTPUT.value:
            Path(OUTPUT.value).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    app.run(main, flags_parser=configuration.parse_flags)
