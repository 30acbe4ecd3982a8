r"""Estimates a training step on chips that aren't attached: cycles, memory, FLOPs, collectives.

python -m experiments.benchmarks.step --model=ViT-B/16 --per_chip=64 --topology=v5e:4x4
python -m experiments.benchmarks.step --model=ViT-B/16 --step=experiments.benchmarks.yardstick:plain

Cycles are estimates without stalls and waiting for other chips, not measurements:

- the compiler's estimate for everything that it schedules, with loops' trip counts;
- separately for each Pallas kernel, the larger of the bundles of its final schedule and the time to
  transfer its arguments and results.

For GPUs (`h100:8`) the compiler estimates no time; the report has memory and counts of kernels.

`--step` names a function that builds another step for the same chips, to compare with ours; see
`yardstick.plain`. `--depths=1,2` compiles only these depths and extrapolates linearly to the
variant's, because compile time grows with the depth of an unrolled model. `--write` adds the report
to results/step.json and rewrites results/step.md. Needs only a compiler: pip install 'jax[tpu]'
or 'vit_jax[cuda]'.
"""

import collections
import datetime
import importlib
import json
import math
import re
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import app, flags

from experiments.benchmarks.bundles import attention_bundles, kernel_name
from experiments.benchmarks.machine import versions
from experiments.benchmarks.step_table import table
from experiments.benchmarks.yardstick import recipe
from vit_jax.costs.chips import GIB
from vit_jax.costs.compiled import Instruction, Program, memory
from vit_jax.costs.flops import training_flops
from vit_jax.costs.report import collectives_report
from vit_jax.costs.topology import Topology, open_topology, parse_topology
from vit_jax.models.variants import ModelConfig, build_model
from vit_jax.parallel.mesh import (
    MeshConfig,
    batch_sharding,
    make_mesh,
    replicated,
    use_mesh,
)
from vit_jax.training.memory import compile_step
from vit_jax.training.recipe import build_training

MODEL = flags.DEFINE_string("model", "ViT-B/16", "The variant.")
PER_CHIP = flags.DEFINE_integer("per_chip", 64, "Images per device.")
TOPOLOGY = flags.DEFINE_string("topology", "v5e:4x4", "The chips.")
DEPTHS = flags.DEFINE_list(
    "depths", [], "Two depths to extrapolate from; default: compile the variant's."
)
STEP = flags.DEFINE_string("step", "", "module:function that builds another step.")
OPTIONS = flags.DEFINE_string("options", "{}", 'JSON of ModelConfig: {"scan": true}.')
MESH = flags.DEFINE_string("mesh", "{}", 'JSON of MeshConfig: {"fsdp": 16}.')
SIZE = flags.DEFINE_integer("image_size", 224, "Pixels.")
WRITE = flags.DEFINE_bool("write", False, "Add the report to results/.")
RESULTS = Path(__file__).parent / "results"

# Kind of an operation: the first regex found in its name.
KINDS = (
    (
        "attention",
        r"dot_product_attention|MultiHeadDot\w+/(bhnm|bnhk|\.\.\.|softmax|div|exp|shard_map)",
    ),
    ("attention projections", r"MultiHeadDotProductAttention"),
    ("MLP", r"Mlp|Block_\d+/(Dense|gelu)"),
    ("norms", r"norm|LayerNorm"),
    ("patches", r"embedding|Conv_0"),
    ("model, other", r"ViT"),
    ("optimizer", r"."),
)


def kernels(program: Program, bundles: dict[str, int], topology: Topology) -> list[dict]:
    """Returns a row per kernel of a step: bundles per call, and cycles of memory traffic."""
    rows: dict[str, dict] = {}
    chip = topology.chip
    cores = 2 if chip.name in ("v4", "v5p") else 1  # the grid is split over both
    for kernel in program.kernels:
        name = kernel_name(kernel.name)
        moves = round((kernel.bytes or 0) * chip.devices / chip.hbm_bandwidth * chip.clock)
        row = {"name": name, "times": 0, "bundles": bundles[name] // cores, "memory_cycles": moves}
        row = rows.setdefault(name, {**row, "cycles": 0})
        row["times"] += kernel.times
        row["cycles"] += max(row["bundles"], moves) * kernel.times
    return list(rows.values())


def cycles_by(program: Program) -> tuple[dict[str, int], dict[str, int]]:
    """Sums the compiler's cycles by kind of operation (forward, backward) and by layer.

    A loop over layers counts as one layer, "all".
    """
    kinds: collections.Counter[str] = collections.Counter()
    layers: collections.Counter[str] = collections.Counter()
    for times, _, instruction in program.instructions():
        if not (cycles := instruction.cycles):
            continue
        name = re.search(r'op_name="([^"]*)"', instruction.attributes)
        name = name[1] if name else "-"
        kind = next(kind for kind, pattern in KINDS if re.search(pattern, name))
        if kind != "optimizer":
            kind += ", backward" if "transpose(" in name else ", forward"
        kinds[kind] += times * cycles
        layer = re.search(r"\b(?:encoderblock|Block)(?:_(\d+))?\b", name)
        layers[(layer[1] or "all") if layer else "none"] += times * cycles
    return dict(kinds.most_common()), dict(layers)


def started(program: Program) -> dict[str, int]:
    """Counts a GPU step's launches: fusions by kind, library calls, collectives."""
    counts: collections.Counter[str] = collections.Counter()

    def name(instruction: Instruction) -> str | None:
        if instruction.opcode == "fusion":
            return f"fusion {instruction.attribute('kind')}"
        if instruction.opcode == "custom-call":
            return re.search(r'custom_call_target="([^"]*)"', instruction.attributes)[1]
        kind = instruction.opcode.removesuffix("-start")
        return kind if kind.startswith(("all-", "reduce-scatter", "collective-", "copy")) else None

    instructions = list(program.instructions())
    fused = {name for _, _, i in instructions if i.opcode == "fusion" for name in i.called()}
    for times, _, instruction in instructions:
        if instruction.computation in fused:
            continue
        if (found := name(instruction)) and not instruction.opcode.endswith("-done"):
            counts[found] += times
    return dict(counts.most_common())


def compile_ours(devices: list, depth: int | None):
    """Compiles our step with the yardstick's settings."""
    options = {**json.loads(OPTIONS.value), **({"depth": depth} if depth else {})}
    model = ModelConfig(MODEL.value, **options)
    mesh = MeshConfig(**json.loads(MESH.value))
    config = recipe(model, PER_CHIP.value * len(devices), SIZE.value, mesh=mesh)
    return compile_step(build_training(config, make_mesh(config.mesh, devices), 1000, 1_281_167))


def compile_other(devices: list, depth: int | None):
    """Compiles the step of `--step`, data parallel."""
    module, _, function = STEP.value.partition(":")
    build = getattr(importlib.import_module(module), function)
    mesh = make_mesh(MeshConfig(), devices)
    size = PER_CHIP.value * len(devices)
    images = jax.ShapeDtypeStruct((size, SIZE.value, SIZE.value, 3), jnp.uint8)
    step, state = build(MODEL.value, depth, images)

    def placed(tree, at):
        return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=at), tree)

    labels = jax.ShapeDtypeStruct((size,), jnp.int32)
    batch = placed((images, labels), batch_sharding(mesh))
    with use_mesh(mesh):
        step = jax.jit(step, donate_argnums=0, out_shardings=replicated(mesh))
        return step.lower(placed(state, replicated(mesh)), *batch).compile()


def measure(depth: int | None, bundles: dict[str, int], topology: Topology) -> dict:
    """Compiles a step and returns its counts."""
    devices = open_topology(topology)
    start = time.perf_counter()
    compiled = (compile_other if STEP.value else compile_ours)(devices, depth)
    seconds = time.perf_counter() - start
    program, sizes = Program(compiled.as_text()), memory(compiled)
    report = {
        "depth": depth,
        "compile_seconds": round(seconds, 1),
        "arguments_gib": sizes.arguments / GIB,
        "temporary_gib": sizes.temporaries / GIB,
        "peak_gib": sizes.peak / GIB,
        "collectives": collectives_report(program.collectives, topology),
    }
    if not topology.chip.is_tpu:
        return {**report, "started": started(program)}
    rows = kernels(program, bundles, topology)
    cycles = {"compiler": program.cycles, "kernels": sum(row["cycles"] for row in rows)}
    kinds, layers = cycles_by(program)
    return {
        **report,
        "flops": program.flops,
        # XLA's count of all operands and results, with loop bodies counted once.
        "bytes": (compiled.cost_analysis() or {}).get("bytes accessed"),
        "cycles": {**cycles, "step": sum(cycles.values())},
        "by_kind": kinds,
        "by_layer": layers,
        "kernels": rows,
    }


def bundles_of_step(model, topology: Topology) -> dict[str, int]:
    """Counts the bundles of the attention kernels in our step for `model`."""
    if STEP.value or not topology.chip.is_tpu or model.config.attention == "xla":
        return {}
    heads = model.config.num_heads // json.loads(MESH.value).get("tensor", 1)
    tokens = math.prod(model.grid) + model.config.registers + (model.config.pool == "token")
    shape = (PER_CHIP.value, tokens, heads, model.config.width // model.config.num_heads)
    return attention_bundles(f"{topology.chip.name}:2x2", shape)


def main(_) -> None:
    """Measures, prints and writes."""
    if len(DEPTHS.value) not in (0, 2):
        raise app.UsageError(f"depths={','.join(DEPTHS.value)}: expected two depths, or none")
    topology = parse_topology(TOPOLOGY.value)
    config = ModelConfig(MODEL.value, **json.loads(OPTIONS.value))
    model = build_model(config, 1000, (SIZE.value, SIZE.value))
    bundles = bundles_of_step(model, topology)
    depths = list(map(int, DEPTHS.value)) or [None]
    found = [measure(depth, bundles, topology) for depth in depths]
    flops = training_flops(model) * PER_CHIP.value
    compilers = ("libtpu",) if topology.chip.is_tpu else ("jax-cuda12-plugin", "jax-cuda13-plugin")
    report = {
        "what": STEP.value or "vit_jax",
        "model": MODEL.value,
        "options": json.loads(OPTIONS.value),
        "mesh": json.loads(MESH.value),
        "topology": TOPOLOGY.value,
        "per_chip": PER_CHIP.value,
        "image_size": SIZE.value,
        "from_depths": DEPTHS.value,
        "model_flops": flops,
        "compiled": found,
        "versions": versions(("jax", *compilers, "flax", "optax")),
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python -m experiments.benchmarks.step", *sys.argv[1:]]),
    }
    if topology.chip.is_tpu:
        cycles = found[0]["cycles"]
        if len(found) == 2:
            (a, b), left = found, model.config.depth - found[0]["depth"]
            layers = left / (b["depth"] - a["depth"])
            cycles = {k: round(v + layers * (b["cycles"][k] - v)) for k, v in cycles.items()}
        mfu = flops / cycles["step"] / topology.chip.flops_per_cycle
        report |= {"cycles": cycles, "implied_mfu": mfu}
    print(json.dumps(report, indent=1))
    if WRITE.value:
        path = RESULTS / "step.json"
        reports = json.loads(path.read_text()) if path.exists() else {}
        name = (report["what"], MODEL.value, TOPOLOGY.value, f"{PER_CHIP.value} a device")
        settings = {**report["options"], **report["mesh"]}
        name += tuple(f"{k}={v}" for k, v in settings.items())
        if DEPTHS.value:
            name += ("depths " + ",".join(DEPTHS.value),)
        reports[" ".join(name)] = report
        path.write_text(json.dumps(reports, indent=1) + "\n")
        (RESULTS / "step.md").write_text(table(reports))


if __name__ == "__main__":
    app.run(main)
