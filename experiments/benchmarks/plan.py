r"""Plans of the paper's and larger models on TPU pods and GPUs, estimated by compilers.

python -m experiments.benchmarks.plan --rows='v5e|v4|tpu7x|v3'  # pip install 'jax[tpu]'
python -m experiments.benchmarks.plan --rows='h100|h200|a100|b200'  # pip install 'jax[cuda12]'

Each row is one call of `python -m vit_jax.plan`. Reports go to results/plan.json, and a table of
all of them to results/plan.md. No chip is used: these are estimates, not measurements. A row takes
one to ten minutes on two cores, and 3 GB.
"""

import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from absl import app, flags

from experiments.benchmarks.machine import versions
from experiments.benchmarks.step_table import compiled_by

ROWS_FLAG = flags.DEFINE_string("rows", ".*", "Regex of names of rows to compile.")
MISSING = flags.DEFINE_bool("missing", False, "Only rows without a result, to go on after a stop.")
TABLE = flags.DEFINE_bool("table", False, "Only rewrite the table.")
RESULTS = Path(__file__).parent / "results"
CUDA = ("jax-cuda12-plugin", "jax-cuda13-plugin", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13")

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
SLICES = ("--num_slices=2",)
# Model, topology, and options, chosen by `--search` or the recipe's own plan. v6e and two slices
# have the options of v5e, not searched again.
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
    ("S/16", "v6e:16x16", ()),
    ("B/16", "v6e:16x16", ()),
    ("L/16", "v6e:16x16", ("--config.mesh.fsdp=16",)),
    ("H/14", "v6e:16x16", ("--config.mesh.fsdp=16",)),
    ("g/14", "v6e:16x16", (*FULL, "--config.mesh.fsdp=16")),
    ("G/14", "v6e:16x16", (*FULL, "--config.mesh.fsdp=16")),
    ("S/16", "tpu7x:4x4x8", ()),
    ("g/14", "tpu7x:4x4x8", (*FULL, "--config.mesh.fsdp=32")),
    ("S/16", "v5e:16x16", SLICES),
    ("B/16", "v5e:16x16", SLICES),
    ("L/16", "v5e:16x16", (*SLICES, "--config.mesh.fsdp=16")),
    ("H/14", "v5e:16x16", (*SLICES, "--config.mesh.fsdp=16")),
    ("g/14", "v5e:16x16", (*SLICES, *FULL, "--config.mesh.fsdp=16")),
    ("G/14", "v5e:16x16", (*SLICES, *FULL, "--config.mesh.fsdp=64")),
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

HEADER = """# Plans estimated by compilers

ESTIMATES, not measurements. Memory is the compilers' analysis. Times on TPUs are the TPU compiler's
cycles at the chip's clock, plus kernels and collectives at their rooflines, without overlap. Times
on GPUs assume the MFU shown. `mesh` is data x FSDP x tensor. `state` is parameters and optimizer,
`init` the peak during initialisation, `without flash` a GPU's peak with plain attention; all in GiB
per device.

Reproduce with `python -m experiments.benchmarks.plan` and the compilers of the extras `tpu` and
`cuda`, without a chip. plan.json has all commands and full reports.
"""


def name_of(row: tuple[str, str, tuple[str, ...]]) -> str:
    """Returns a row's key in the results: model, topology and options without prefixes."""
    model, topology, options = row
    return " ".join(
        (model, topology, *(o.removeprefix("--").split("config.")[-1] for o in options))
    )


def run(row: tuple[str, str, tuple[str, ...]]) -> dict:
    """Runs one plan and returns its report; raises RuntimeError with the command's error."""
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
        "versions": compiler_versions(topology),
        "wall_seconds": round(time.perf_counter() - start, 1),
        **report,
    }


def compiler_versions(topology: str) -> dict[str, str]:
    """Returns the versions of the compiler's packages."""
    gpu = topology.startswith(("a100", "h100", "h200", "b200"))
    return versions(("jax", "jaxlib", *(CUDA if gpu else ("libtpu",))))


def table(results: dict[str, dict]) -> str:
    """Formats the results as Markdown."""
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


def _results(path: Path) -> dict[str, dict]:
    return json.loads(path.read_text()) if path.exists() else {}


def main(_) -> None:
    """Compiles the selected rows one by one, and writes the results after each."""
    path = RESULTS / "plan.json"
    for row in ROWS:
        if TABLE.value or not re.search(ROWS_FLAG.value, name_of(row)):
            continue
        if MISSING.value and name_of(row) in _results(path):
            continue
        report = run(row)
        results = _results(path)
        path.write_text(json.dumps(results | {name_of(row): report}, indent=1) + "\n")
        print(f"{name_of(row)}: {report['memory_gib']['peak']:.2f} GiB", flush=True)
    (RESULTS / "plan.md").write_text(table(_results(path)))


if __name__ == "__main__":
    app.run(main)
