"""Measures what `vit_jax plan` predicts for GPUs, and the shares of the peaks that it needs.

The cases were not used to tune the prediction. `predict` compiles them as `plan` does, which needs
no GPU.
"""

import contextlib
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarks.gpu.attention import time_calls
from experiments.benchmarks.gpu.bench import Bench
from experiments.benchmarks.gpu.train import alone
from vit_jax.config import InputError
from vit_jax.costs.chips import CHIPS, Chip

CALIBRATION = "experiments.benchmarks.gpu.plan:Calibration"
PLANNER = "experiments.benchmarks.gpu.plan:Planner"
ROWS, SIDES = 32768, (64, 192, 384, 768, 1024, 1280, 1408, 2048, 4096)
CASE_SECONDS, SECONDS = 45, 3


@dataclasses.dataclass(frozen=True)
class Case:
    """A step: options of the model, and the number of microbatches."""

    variant: str
    batch: int
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    accumulation: int = 1
    image_size: int = 224

    def name(self, what: str) -> str:
        """The key in the results."""
        settings = [f"{key}={value}" for key, value in self.options.items()]
        if self.accumulation > 1:
            settings.append(f"accumulation={self.accumulation}")
        return " ".join((what, self.variant, str(self.batch), f"{self.image_size} px", *settings))

    @property
    def start(self) -> dict[str, Any]:
        """The arguments of `steps.Ours`."""
        fields = {"accumulation": self.accumulation}
        size = self.image_size
        return {
            "variant": self.variant,
            "image_size": size,
            "options": self.options,
            "fields": fields,
        }


CASES = (
    Case("ViT-S/16", 256),
    Case("ViT-B/16", 192, {"remat": "full"}),
    Case("ViT-B/16", 1024, {}, accumulation=4),
    Case("ViT-B/16", 64, {}, image_size=384),
    Case("ViT-L/16", 192, {"scan": True, "remat": "dots"}),
    Case("ViT-H/14", 96, {"scan": True, "remat": "full"}),
)
REHEARSAL = (Case("ViT-Ti/16", 4, {"scan": True}, accumulation=2, image_size=32),)


class Calibration:
    """Measures shares of the device's peaks; small sizes if it is a CPU."""

    def __init__(self):
        self._seconds = 0.02 if jax.default_backend() == "cpu" else 0.3
        self._rows = 256 if jax.default_backend() == "cpu" else ROWS

    def product(self, side: int) -> dict[str, float]:
        """Times [rows, side] @ [side, 4 side] and the product of its gradient, in bfloat16.

        Returns TFLOP/s.
        """
        keys = jax.random.split(jax.random.key(0))
        x = jax.random.normal(keys[0], (self._rows, side), jnp.bfloat16)
        w = jax.random.normal(keys[1], (side, 4 * side), jnp.bfloat16)

        def products(x, w):
            y = x @ w
            return y, x.T @ y

        seconds = time_calls(jax.jit(products), [x, w], self._seconds)
        return {"side": side, "tflops": 4 * x.size * w.shape[1] / seconds / 1e12}

    def bandwidth(self, mebibytes: int) -> dict[str, float]:
        """Times an addition that reads and writes an array of this size; returns GB/s."""
        x = jnp.ones(mebibytes * 2**19, jnp.bfloat16)
        seconds = time_calls(jax.jit(lambda x: x + 1), [x], self._seconds)
        return {"gb_per_second": 2 * x.nbytes / seconds / 1e9}

    def launch(self, kernels: int) -> dict[str, float]:
        """Times a chain of the smallest kernels; returns microseconds each."""

        def chain(x):
            for _ in range(kernels):
                x = jax.lax.optimization_barrier(x + 1)
            return x

        seconds = time_calls(jax.jit(chain), [jnp.zeros(8)], self._seconds)
        return {"microseconds": seconds / kernels * 1e6}


class Planner:
    """Compiles steps for a GPU that needn't be there."""

    def __init__(self, chip: str):
        from vit_jax.costs.topology import open_topology, parse_topology

        self._devices = open_topology(parse_topology(f"{chip}:1"))

    def predict(self, batch: int, **start: Any) -> dict[str, Any]:
        """Returns the peak in GiB and rows [kind, size, FLOPs, bytes, calls] of the kernels."""
        from experiments.benchmarks.gpu.steps import Ours
        from vit_jax.costs.gpu_time import take_apart

        step = Ours(**start, devices=self._devices)
        compiled = step.compile(batch)
        kernels = take_apart(step.program(batch))
        return {
            "peak_gib": compiled["predicted_gib"],
            "model_flops": compiled["model_flops"],
            "kernels": [[*dataclasses.astuple(k), calls] for k, calls in kernels.items()],
        }


def chip_of(gpu: str) -> Chip | None:
    """Returns the chip of a GPU's name; None for one whose peaks aren't known."""
    return next((chip for chip in CHIPS.values() if gpu in chip.device_kinds), None)


def measure(bench: Bench) -> None:
    """Measures the shares of the peaks, then memory and time of the cases."""
    with bench.worker(CALIBRATION) as worker:

        def calibrate(method: str, **arguments: int) -> None:
            def ask() -> dict:
                worker.start(bench.patience(30))
                return worker.call(bench.patience(5 * SECONDS), method, **arguments)

            size = " ".join(str(value) for value in arguments.values())
            bench.measure(f"plan {method} {size}", ask, SECONDS)

        for side in SIDES[:2] if bench.rehearsal else SIDES:
            calibrate("product", side=side)
        calibrate("bandwidth", mebibytes=8 if bench.rehearsal else 2048)
        calibrate("launch", kernels=20 if bench.rehearsal else 300)
    for case in REHEARSAL if bench.rehearsal else CASES:
        bench.measure(
            case.name("plan"), lambda c=case: alone(bench, c.start, c.batch), CASE_SECONDS
        )


def predict(bench: Bench) -> None:
    """Predicts the cases for the GPU of the results, side by side, without using a GPU."""
    chip = CHIPS["h200"] if bench.rehearsal else chip_of(bench.results["gpu"])
    if chip is None:
        raise InputError(f"{bench.results['gpu']} is not in vit_jax/costs/chips.py: add its peaks")
    cases = REHEARSAL if bench.rehearsal else CASES
    cases = [case for case in cases if not bench.has(case.name("predict"))]
    with contextlib.ExitStack() as stack:
        planners = {}
        for case in cases:
            if bench.room(case.name("predict"), CASE_SECONDS):
                host = {"JAX_PLATFORMS": "cpu"}
                planners[case.name("predict")] = stack.enter_context(bench.worker(PLANNER, host))
                planners[case.name("predict")].tell("start", chip=chip.name)
                planners[case.name("predict")].tell("predict", batch=case.batch, **case.start)
        for name, planner in planners.items():

            def hear(planner=planner) -> dict:
                planner.hear(bench.patience(CASE_SECONDS))
                return planner.hear(bench.patience(10 * CASE_SECONDS))

            bench.measure(name, hear)
