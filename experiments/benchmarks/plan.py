r"""Plans of the paper's and larger models on pods and GPUs: what compilers alone say of them.

python -m experiments.benchmarks.plan --rows='v5e|v4|tpu7x|v3'  # pip install 'vit_jax[tpu]'
python -m experiments.benchmarks.plan --rows='h100|h200|a100|b200'  # pip install 'vit_jax[cuda]'

Each row is one `python -m vit_jax.plan`, whose whole report goes to results/plan.json; the table of
all rows that are there goes to results/plan.md. No chip is used: these are estimates of the
compilers and no measurements. A row takes one to ten minutes of two cores, and 3 GB.
"""

import datetime
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from absl import app, flags

from experiments.benchmarks.step_table import compiled_by

ROWS_FLAG = flags.DEFINE_string("rows", ".*", "Which rows to compile: a regex, searched in names.")
TABLE = flags.DEFINE_bool("table", False, "Only write the table again.")
RESULTS = Path(__file__).parent / "results"

PAPER, JFT, SCALING, AUGREG, PLAIN, BIT, MASKED = (
    f"configs/pretrain/{name}.py"
    for name in ("paper", "jft", "scaling_vit", "augreg", "better_plain_vit", "bit", "masked")
)
MODELS = {
    "B/16": f"{PAPER}:ViT-B/16",
    "L/16": f"{PAPER}:ViT-L/16,dataset=imagenet21k",
    "H/14": f"{JFT}:ViT-H/14",
    "g/14": f"{SCALING}:ViT-g/14",
    "G/14": f"{SCALING}:ViT-G/14",
    "S/16": f"{PLAIN}:ViT-S/16",
    "AugReg B/16": f"{AUGREG}:ViT-B/16",
    "masked B/16": f"{MASKED}:ViT-B/16",
    "R50x1": f"{BIT}:R50x1",
    "R50+B/16": f"{JFT}:R50+ViT-B/16",
}
FULL = ("--config.model.remat=full",)
SCAN = ("--config.model.scan=true",)
# Model, topology, how it is run there: what `--search` or the plan of the recipe itself led to.
ROWS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("B/16", "v5e:16x16", ()),
    ("B/16", "v5e:16x16", SCAN),
    ("L/16", "v5e:16x16", ()),
    ("L/16", "v5e:16x16", ("--config.mesh.fsdp=16",)),
    ("H/14", "v5e:16x16", ()),
    ("H/14", "v5e:16x16", ("--config.mesh.fsdp=16",)),
    ("G/14", "v5e:16x16", (*FULL, "--config.mesh.fsdp=64")),
    ("g/14", "v5e:16x16", (*FULL, "--config.mesh.fsdp=16")),
    ("S/16", "v5e:4x4", ()),
    ("S/16", "v5e:4x4", SCAN),
    ("B/16", "v5e:4x4", ("--config.mesh.fsdp=16", "--config.batch_size=1024")),
    ("AugReg B/16", "v5e:16x16", ()),
    ("masked B/16", "v5e:16x16", ()),
    ("R50x1", "v5e:16x16", ()),
    ("R50+B/16", "v5e:16x16", ()),
    ("B/16", "v4:8x8x16", ()),
    ("L/16", "v4:8x8x16", ()),
    ("H/14", "v4:8x8x16", SCAN),
    ("G/14", "v4:8x8x16", (*FULL, "--config.mesh.fsdp=64")),
    ("B/16", "tpu7x:4x4x8", ()),
    ("L/16", "tpu7x:4x4x8", ()),
    ("H/14", "tpu7x:4x4x8", ()),
    ("G/14", "tpu7x:4x4x8", (*FULL, "--config.mesh.fsdp=32")),
    ("H/14", "v3:16x16", (*FULL, "--mfu=0.32")),
    ("B/16", "h100:8", ("--config.batch_size=1024",)),
    ("B/16", "h100:8", (*SCAN, "--config.batch_size=1024")),
    ("L/16", "h100:8", ("--config.batch_size=1024",)),
    ("H/14", "h100:8", ("--config.batch_size=512",)),
    ("G/14", "h100:8", (*FULL, "--config.batch_size=256", "--config.mesh.fsdp=8")),
    ("B/16", "a100:8", ("--config.batch_size=1024",)),
    ("B/16", "h200:8", ("--config.batch_size=1024",)),
    ("B/16", "b200:8", ("--config.batch_size=1024",)),
)

HEADER = """# Plans: what the compilers say before a chip is bought

ESTIMATES, no measurements. Memory is the compilers' own account. Times on TPUs are the TPU
compiler's cycles at the chip's clock, with kernels and collectives added at their rooflines, as if
nothing overlapped; times on GPUs assume the MFU that is shown. `mesh` is data x FSDP x tensor;
`state` parameters and optimizer, GiB of a device; `init` the most that a device holds while the
state is born; `without flash` a GPU's peak with plain attention.

Again: `python -m experiments.benchmarks.plan`, with the compilers of the extras `tpu` and `cuda`,
and no chip. Every command, and all that the plans say, is in plan.json.
"""


def name_of(row: tuple[str, str, tuple[str, ...]]) -> str:
    """Its key in the results: what differs from the recipe, without the flags' prefixes."""
    model, topology, options = row
    return " ".join(
        (model, topology, *(o.removeprefix("--").split("config.")[-1] for o in options))
    )


def run(row: tuple[str, str, tuple[str, ...]]) -> dict:
    """One plan: its report, or the error."""
    model, topology, options = row
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "plan.json"
        arguments = [f"--config={MODELS[model]}", f"--topology={topology}", *options]
        command = [sys.executable, "-m", "vit_jax.plan", *arguments]
        done = subprocess.run(
            [*command, f"--output={output}"],
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}:\n{done.stderr[-3000:]}")
        report = json.loads(output.read_text())
    return {
        "command": " ".join(["python -m vit_jax.plan", *arguments]),
        "date": datetime.date.today().isoformat(),
        "versions": versions(topology),
        "wall_seconds": round(time.perf_counter() - start, 1),
        **report,
    }


def versions(topology: str) -> dict[str, str]:
    """Of what compiled it."""
    gpu = topology.startswith(("a100", "h100", "h200", "b200"))
    names = ("jax", "jaxlib", *(("jax-cuda12-plugin", "nvidia-cudnn-cu12") if gpu else ("libtpu",)))
    return {name: importlib.metadata.version(name) for name in names}


def table(results: dict[str, dict]) -> str:
    """The results as Markdown."""
    columns = (
        *("plan", "batch", "mesh", "state", "peak", "of GiB", "init", "without flash"),
        *("step ms", "MFU", "img/s", "days", "chip-hours"),
    )
    lines = [HEADER, f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in ROWS:
        if not (report := results.get(name_of(row))):
            continue
        sizes, mesh = report["memory_gib"], report["mesh"]
        cells = [
            name_of(row),
            f"{report['batch_size']:,}",
            "x".join(str(n) for n in mesh.values()),
            f"{sizes['parameters'] + sizes['optimizer']:.2f}",
            f"{sizes['peak']:.2f}" + ("" if sizes["fits"] else " (!)"),
            f"{sizes['capacity']:.2f}",
            f"{sizes['init_peak']:.2f}",
            f"{sizes['without_flash']:.2f}" if "without_flash" in sizes else "",
        ]
        if plan := report.get("run"):
            cells += [
                f"{plan['step_seconds'] * 1e3:.1f}",
                f"{plan['mfu']:.1%}" + (" assumed" if "MFU" in plan["from"] else ""),
                f"{plan['img_per_sec']:,.0f}",
                f"{plan['days']:.2f}",
                f"{plan['chip_hours']:,.0f}",
            ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", compiled_by(results.values()), ""])


def main(_) -> None:
    """Compiles the rows that are asked for, one after another, and writes after each."""
    path = RESULTS / "plan.json"
    for row in ROWS:
        if TABLE.value or not re.search(ROWS_FLAG.value, name_of(row)):
            continue
        report = run(row)
        results = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(results | {name_of(row): report}, indent=1) + "\n")
        print(f"{name_of(row)}: {report['memory_gib']['peak']:.2f} GiB", flush=True)
    (RESULTS / "plan.md").write_text(table(json.loads(path.read_text())))


if __name__ == "__main__":
    app.run(main)
