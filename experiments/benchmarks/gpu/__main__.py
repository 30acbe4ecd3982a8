r"""Measures training on one NVIDIA GPU: speed, memory, where the time goes, input, correctness.

python -m experiments.benchmarks.gpu --output=FOLDER [--minutes=8] [--part=train,plan]
python -m experiments.benchmarks.gpu --rehearsal --output=FOLDER   # tiny sizes on a CPU

Each result is in FOLDER/gpu.json as soon as it is measured, so the command can be stopped at any
time. Started again, it measures what is missing. Parts, in the order of their worth:

- train: our steps beside timm's under torch.compile, in turns;
- attention: implementations of attention by number of tokens;
- plan: predicted memory and time of steps against measured ones;
- trace: kernels by kind, with sets of XLA's flags;
- input: training from JPEGs, transfer, time to the first step;
- correct: losses against a CPU's, a killed run, int8 and fp8 products;
- batches: other batch sizes;
- predict: the predictions for `plan`, which need no GPU and may be made elsewhere;
- study: the scaling study `h200`, as far as the time goes.

--part=choose only prints what the results say about the defaults of the package. Without torch,
timm or other packages, what needs them fails, and the rest is measured.
"""

import argparse
import signal
import sys
import tempfile
from pathlib import Path

import jax

from experiments.benchmarks.gpu import attention, correct, input, plan, study, trace, train
from experiments.benchmarks.gpu.bench import Bench, read_results
from experiments.benchmarks.gpu.choose import choices
from experiments.benchmarks.gpu.page import page
from experiments.benchmarks.machine import describe, shortcomings
from vit_jax.command_line import stoppable
from vit_jax.config import InputError, explained_errors, unknown
from vit_jax.parallel.run_files import Lock

# Function, and the share that it may use of what is left of the time when it begins.
PARTS = {
    "train": (train.measure, 0.6),
    "attention": (attention.measure, 0.4),
    "plan": (plan.measure, 0.8),
    "trace": (trace.measure, 0.6),
    "input": (input.measure, 0.8),
    "correct": (correct.measure, 1.0),
    "batches": (train.measure_batches, 1.0),
    "predict": (plan.predict, 1.0),
    "study": (study.measure, 1.0),
}
WITHOUT_GPU = ("predict",)
NEEDED = ("jax", "torch", "timm", "grain", "simplejpeg", "tensorflow-datasets")
PACKAGES = ("jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "nvidia-cudnn-cu13")
PACKAGES += ("nvidia-cudnn-cu12", "flax", "optax", "qwix", "triton")
GIB = 100  # of GPU memory, which the sizes are chosen for


def parse() -> argparse.Namespace:
    """Returns the options. Raises ValueError for those that make no sense."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="when to have ended")
    parser.add_argument("--part", default="", help="parts, by default all in order of worth")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"), help="folder of gpu.json")
    parser.add_argument("--rehearsal", action="store_true", help="tiny sizes on a CPU")
    options = parser.parse_args()
    if not 0 < options.minutes < 1e6:
        raise InputError(f"minutes = {options.minutes}: expected a positive number")
    options.part = [part.strip() for part in options.part.split(",") if part.strip()]
    for part in options.part:
        if part not in (*PARTS, "choose"):
            raise unknown("part", part, [*PARTS, "choose"])
    if "choose" in options.part and len(options.part) > 1:
        raise InputError("choose measures nothing: give it alone, after the other parts")
    return options


def measure(options: argparse.Namespace) -> None:
    """Measures the parts."""
    with_gpu = not options.rehearsal and not set(options.part or PARTS) <= set(WITHOUT_GPU)
    machine = describe((*NEEDED, *PACKAGES), with_gpu)
    if with_gpu:
        for line in shortcomings(machine, NEEDED, GIB):
            print(f"warning: {line}", flush=True)
    jax.config.update("jax_platforms", "cpu")  # only the workers use the GPU
    options.output.mkdir(parents=True, exist_ok=True)
    lock = Lock(options.output)
    with tempfile.TemporaryDirectory(prefix="vit_jax_gpu_") as scratch:
        seconds = 60 * options.minutes
        bench = Bench(options.output, Path(scratch), machine, options.rehearsal, seconds)
        for part in options.part or PARTS:
            function, share = PARTS[part]
            bench.until(1.0 if options.part else share)
            try:
                function(bench)
            except Exception as error:  # the other parts may still work
                bench.record(part, bench.explain(error), 0)
    del lock


def main() -> None:
    """Measures, and writes the page."""
    options = parse()
    if options.part != ["choose"]:
        measure(options)
    results = read_results(options.output / "gpu.json")
    print(choices(results))
    if options.part != ["choose"]:
        (options.output / "gpu.md").write_text(page(results))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("error: terminated"))
    with stoppable(), explained_errors():
        main()
