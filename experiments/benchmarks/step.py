r"""What a training step costs on chips that are not here: cycles, memory, FLOPs, collectives.

python -m experiments.benchmarks.step --model=ViT-B/16 --per_chip=64 --topology=v5e:4x4
python -m experiments.benchmarks.step --model=ViT-B/16 --yardstick --depths=1,2

Cycles of a step are the compiler's estimate for all that it schedules (loops times their trips),
and, apart, of each Pallas kernel the bundles of its final schedule times the trips of its loops, or
the time in which the memory moves its arguments and results where that is longer. Neither is a
measurement: stalls, and waiting for other chips, are in neither.

`--depths=1,2` compiles these depths alone and continues in a straight line to the variant's: an
unrolled model takes as long to compile as it is deep. `--yardstick` compiles a plain Flax ViT
(`yardstick.py`) for the same chips. Needs the compiler alone: pip install 'vit_jax[tpu]'.
"""

import collections
import datetime
import importlib.metadata
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import app, flags

from experiments.benchmarks.bundles import kernel_bundles
from experiments.benchmarks.yardstick import PlainViT, make_step
from vit_jax.analysis.chips import GIB, Chip
from vit_jax.analysis.compiled import Program, memory
from vit_jax.analysis.flops import training_flops
from vit_jax.analysis.report import collectives_report
from vit_jax.analysis.topology import open_topology, parse_topology
from vit_jax.data.pipeline import DataConfig
from vit_jax.models.variants import ModelConfig, build_model
from vit_jax.parallel.mesh import (
    MeshConfig,
    batch_sharding,
    make_mesh,
    replicated,
    use_mesh,
)
from vit_jax.training.memory import compile_step
from vit_jax.training.optimizer import OptimizerConfig, ScheduleConfig
from vit_jax.training.recipe import TrainConfig, build_training

MODEL = flags.DEFINE_string("model", "ViT-B/16", "The variant.")
PER_CHIP = flags.DEFINE_integer("per_chip", 64, "Images a device.")
TOPOLOGY = flags.DEFINE_string("topology", "v5e:4x4", "The chips.")
DEPTHS = flags.DEFINE_list("depths", [], "Two depths to continue from; none: the variant's own.")
YARDSTICK = flags.DEFINE_bool("yardstick", False, "The plain Flax ViT instead of ours.")
OPTIONS = flags.DEFINE_string("options", "{}", 'JSON of ModelConfig: {"scan": true}.')
MESH = flags.DEFINE_string("mesh", "{}", 'JSON of MeshConfig: {"fsdp": 16}.')
SIZE = flags.DEFINE_integer("image_size", 224, "Pixels.")
OUTPUT = flags.DEFINE_string("output", "", "JSON file to write.")

# What a line of the program belongs to: the first pattern in its name.
KINDS = (
    ("attention", r"dot_product_attention|MultiHeadDot\w+/(bhnm|bnhk|softmax|div|exp|shard_map)"),
    ("attention projections", r"MultiHeadDotProductAttention"),
    ("MLP", r"Mlp|Block_\d+/(Dense|gelu)"),
    ("norms", r"norm|LayerNorm"),
    ("patches", r"embedding|Conv_0"),
    ("model, other", r"ViT"),
    ("optimizer", r"."),
)


KERNELS = """
import functools, sys
import jax, jax.numpy as jnp
from vit_jax.analysis.topology import open_topology, parse_topology
from vit_jax.models.flash import flash_attention
from vit_jax.parallel.mesh import MeshConfig, batch_sharding, make_mesh, use_mesh
batch, tokens, heads, head_dim = map(int, sys.argv[2:])
mesh = make_mesh(MeshConfig(), open_topology(parse_topology(sys.argv[1]))[:1])
shape = batch, tokens, heads * head_dim
x = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=batch_sharding(mesh))
kernel = functools.partial(flash_attention, head_dim=head_dim)
with use_mesh(mesh):
    both = jax.jit(lambda q, k, v, dy: jax.vjp(kernel, q, k, v)[1](dy))
    both.lower(x, x, x, x).compile()
"""


def attention_bundles(topology: str, shape: tuple[int, int, int, int]) -> dict[str, int]:
    """Bundles of attention's two kernels for one device's [B, N, H, K], each compiled by itself.

    In a process of its own: the compiler writes schedules only if it was told so when it was
    loaded, and for whole models it would write for hours.
    """
    with tempfile.TemporaryDirectory() as folder:
        dump = (
            f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_mosaic_dump_to={folder}"
        )
        subprocess.run(
            [sys.executable, "-c", KERNELS, topology, *map(str, shape)],
            env={**os.environ, "LIBTPU_INIT_ARGS": dump},
            check=True,
            stderr=subprocess.DEVNULL,
        )
        found = {}
        for path in Path(folder).glob("*-final_bundles.txt"):
            name = re.search(r"(forward|backward)_attention", path.name)
            if name and "schedule-analysis" not in path.name:
                found[name[0]] = kernel_bundles(path.read_text())
    return found


def kernels(program: Program, bundles: dict[str, int], chip: Chip) -> list[dict]:
    """A row for each kernel of a step: bundles, and cycles of the memory."""
    rows = []
    for kernel in program.kernels:
        name = re.search(r"(forward|backward)_attention", kernel.name)[0]
        cores = 2 if chip.name in ("v4", "v5p") else 1  # the grid is split
        moves = round((kernel.bytes or 0) * chip.devices / chip.hbm_bandwidth * chip.clock)
        cycles = max(bundles[name] // cores, moves) * kernel.times
        row = {"name": name, "times": kernel.times, "memory_cycles": moves}
        rows.append({**row, "bundles": bundles[name] // cores, "cycles": cycles})
    return rows


def by_kind(program: Program) -> dict[str, int]:
    """The compiler's cycles of each kind of operation, forward and backward."""
    sums: collections.Counter[str] = collections.Counter()
    for times, _, instruction in program._instructions():
        cycles = re.search(r'"estimated_cycles":"(\d+)"', instruction.attributes)
        if cycles:
            name = re.search(r'op_name="([^"]*)"', instruction.attributes)
            name = name[1] if name else "-"
            kind = next(kind for kind, pattern in KINDS if re.search(pattern, name))
            if kind not in ("optimizer",):
                kind += ", backward" if "transpose(" in name else ", forward"
            sums[kind] += times * int(cycles[1])
    return dict(sums.most_common())


def compile_ours(devices: list, depth: int | None):
    """Our step with the yardstick's settings."""
    options = {**json.loads(OPTIONS.value), **({"depth": depth} if depth else {})}
    config = TrainConfig(
        model=ModelConfig(MODEL.value, **options),
        data=DataConfig("imagenet2012", "train"),
        image_size=SIZE.value,
        batch_size=PER_CHIP.value * len(devices),
        steps=1000,
        schedule=ScheduleConfig(1e-3, warmup=10),
        optimizer=OptimizerConfig(weight_decay=0.1, momentum_dtype="bfloat16"),
        mesh=MeshConfig(**json.loads(MESH.value)),
    )
    return compile_step(build_training(config, make_mesh(config.mesh, devices), 1000, 1_281_167))


def compile_yardstick(devices: list, depth: int | None):
    """The plain Flax ViT's step, data parallel."""
    model = PlainViT(MODEL.value.removeprefix("ViT-"), depth)
    optimizer, step = make_step(model)
    mesh = make_mesh(MeshConfig(), devices)
    images = jax.ShapeDtypeStruct(
        (PER_CHIP.value * len(devices), SIZE.value, SIZE.value, 3), jnp.uint8
    )
    params = jax.eval_shape(model.init, jax.random.key(0), images)
    state = jax.eval_shape(optimizer.init, params)

    def placed(tree, at):
        return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=at), tree)

    labels = jax.ShapeDtypeStruct(images.shape[:1], jnp.int32)
    batch = placed((images, labels), batch_sharding(mesh))
    with use_mesh(mesh):
        step = jax.jit(step, donate_argnums=(0, 1), out_shardings=replicated(mesh))
        return step.lower(*placed((params, state), replicated(mesh)), *batch).compile()


def measure(depth: int | None, bundles: dict[str, int]) -> dict:
    """Compiles, and counts."""
    topology = parse_topology(TOPOLOGY.value)
    devices = open_topology(topology)
    start = time.perf_counter()
    compiled = (compile_yardstick if YARDSTICK.value else compile_ours)(devices, depth)
    seconds = time.perf_counter() - start
    program = Program(compiled.as_text())
    rows = kernels(program, bundles, topology.chip)
    cycles = {"compiler": program.cycles, "kernels": sum(row["cycles"] for row in rows)}
    return {
        "depth": depth,
        "compile_seconds": seconds,
        "cycles": {**cycles, "step": sum(cycles.values())},
        "by_kind": by_kind(program),
        "kernels": rows,
        "temporary_gib": memory(compiled).temporaries / GIB,
        "peak_gib": memory(compiled).peak / GIB,
        "collectives": collectives_report(program.collectives, topology),
    }


def main(_) -> None:
    """Measures, prints and writes."""
    topology = parse_topology(TOPOLOGY.value)
    config = ModelConfig(MODEL.value, **json.loads(OPTIONS.value))
    model = build_model(config, 1000, (SIZE.value, SIZE.value))
    heads = model.config.num_heads // json.loads(MESH.value).get("tensor", 1)
    tokens = math.prod(model.grid) + model.config.registers + (model.config.pool == "token")
    shape = (PER_CHIP.value, tokens, heads, model.config.width // model.config.num_heads)
    ours = not YARDSTICK.value and model.config.attention != "xla"
    bundles = attention_bundles(TOPOLOGY.value, shape) if ours else {}
    depths = list(map(int, DEPTHS.value)) or [None]
    found = [measure(depth, bundles) for depth in depths]
    cycles = found[0]["cycles"]
    if len(found) == 2:
        (a, b), left = found, model.config.depth - found[0]["depth"]
        layers = left / (b["depth"] - a["depth"])
        cycles = {k: round(v + layers * (b["cycles"][k] - v)) for k, v in cycles.items()}
    flops = training_flops(model) * PER_CHIP.value
    report = {
        "what": "yardstick" if YARDSTICK.value else "vit_jax",
        "model": MODEL.value,
        "options": json.loads(OPTIONS.value),
        "mesh": json.loads(MESH.value),
        "topology": TOPOLOGY.value,
        "per_chip": PER_CHIP.value,
        "image_size": SIZE.value,
        "cycles": cycles,
        "model_flops": flops,
        "implied_mfu": flops / cycles["step"] / topology.chip.flops_per_cycle,
        "from_depths": DEPTHS.value,
        "compiled": found,
        "versions": {n: importlib.metadata.version(n) for n in ("jax", "libtpu", "flax", "optax")},
        "date": datetime.date.today().isoformat(),
    }
    text = json.dumps(report, indent=1)
    print(text)
    if OUTPUT.value:
        Path(OUTPUT.value).write_text(text + "\n")


if __name__ == "__main__":
    app.run(main)
