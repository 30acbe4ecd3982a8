"""Estimates a step's time on a GPU from measured shares of its peaks.

XLA estimates no cycles for GPUs. A step is instead taken apart into matrix products, fused
attention and other kernels. A product's time is its FLOPs over the share of the peak that products
of its size reach; another kernel's time is its memory traffic over the share of the bandwidth.
Kernels run one after the other, and none is shorter than a launch.

measured.json holds the shares, a row for each chip that was measured. The command
`python -m experiments.benchmarks.gpu` measures them and prints the row. For other NVIDIA GPUs the
shares of the measured chip are taken, of their own peak and bandwidth.
"""

import dataclasses
import functools
import json
import math
import re
from collections import Counter
from pathlib import Path

import numpy as np

from vit_jax.costs.chips import Chip
from vit_jax.costs.compiled import (
    COLLECTIVES,
    Instruction,
    Program,
    array_bytes,
    convolution_flops,
    dims,
    dot_flops,
)

Scope = dict[str, Instruction]  # the instructions of a computation by name

_FUSIONS = ("fusion", "fusion-start")
# These run the computations that they call as kernels of their own.
_CONTROL = ("while", "call", "conditional", "async-start")
_FREE = (
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "partition-id",
    *_CONTROL,
)
_ATTENTION = re.compile(r'custom_call_target="__cudnn\$fmha\w*?(Backward)?"')
_PRODUCT = re.compile(r'custom_call_target="__cublas\$')
_CONVOLUTION = re.compile(r'custom_call_target="__cudnn\$conv')


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel of a step: its FLOPs, and the bytes that it reads and writes.

    `kind`: "product", whose `size` is its smallest side; "attention", with the number of tokens; or
    "other", without FLOPs.
    """

    kind: str
    size: int
    flops: int
    moved: int

    def seconds(self, measured: "Efficiency", chip: Chip) -> float:
        """Returns the time of a call: of its FLOPs, its traffic, or a launch, if it is longer."""
        bandwidth = measured.bandwidth * chip.hbm_bandwidth / chip.devices
        compute = self.flops / (chip.device_peak_flops * measured.share(self))
        return max(compute, self.moved / bandwidth, measured.launch_seconds)


@dataclasses.dataclass(frozen=True)
class Efficiency:
    """Measured shares of a chip's published peaks.

    Attributes:
      chip: the chip that was measured, of `CHIPS`.
      products: [smallest side of a product, share of the peak FLOP/s], ascending.
      attention: [tokens, share of the peak FLOP/s, forward and backward], ascending.
      bandwidth: share of the memory bandwidth.
      launch_seconds: of the smallest kernel.
      source: date, hardware and versions.
    """

    chip: str
    products: list[list[float]]
    attention: list[list[float]]
    bandwidth: float
    launch_seconds: float
    source: str

    def describe(self, chip: Chip) -> str:
        """Says what an estimate for `chip` is made from."""
        scaled = "" if chip.name == self.chip else f", scaled to {chip.name}'s peaks"
        return f"shares of the peaks measured on {self.chip} ({self.source}){scaled}"

    def share(self, kernel: Kernel) -> float:
        """Returns the share of the peak FLOP/s that a kernel reaches; 1 for other kernels."""
        rows = {"product": self.products, "attention": self.attention}.get(kernel.kind)
        return _between(rows, kernel.size) if rows else 1.0

    def seconds(self, kernels: Counter[Kernel], chip: Chip) -> float:
        """Returns the time of a step on one device, without waiting for others."""
        return sum(calls * kernel.seconds(self, chip) for kernel, calls in kernels.items())


def efficiency(chip: Chip) -> Efficiency | None:
    """Returns what was measured on `chip`, else on another GPU; None without measurements."""
    rows = [] if chip.is_tpu else _measured()
    return min(rows, key=lambda row: row.chip != chip.name, default=None)


@functools.cache
def _measured() -> list[Efficiency]:
    file = Path(__file__).parent / "measured.json"
    return [Efficiency(**row) for row in json.loads(file.read_text())]


def take_apart(program: Program) -> Counter[Kernel]:
    """Returns the kernels of a step compiled for GPUs, with their calls per step.

    Collectives are left out: see `compiled.Collective`.
    """
    rows = list(program.instructions())
    within = {name for _, _, i in rows if i.opcode not in _CONTROL for name in i.called()}
    bodies = {i.computation: scope for _, scope, i in rows}
    found: Counter[Kernel] = Counter()
    for times, scope, instruction in rows:
        if instruction.computation in within or instruction.opcode in _FREE:
            continue
        kind = instruction.opcode.removesuffix("-start")
        if kind not in COLLECTIVES and not kind.endswith("-done"):  # counted with its start
            found[_kernel(scope, instruction, bodies)] += times
    return found


def _kernel(scope: Scope, instruction: Instruction, bodies: dict[str, Scope]) -> Kernel:
    moved = _traffic(scope, instruction, bodies)
    products = [_product(scope, instruction)] if _is_product(instruction) else []
    for name in instruction.called() if instruction.opcode in _FUSIONS else ():
        body = bodies[name]  # fusions that are a Triton or cuDNN product
        products += [_product(body, i) for i in body.values() if i.opcode in ("dot", "convolution")]
    if products:
        side, _ = max(products, key=lambda product: product[1])
        return Kernel("product", side, sum(flops for _, flops in products), moved)
    if match := _ATTENTION.search(instruction.attributes):
        batch, tokens, heads, features = dims(scope[instruction.operands[0]].shape)
        product = 2 * batch * heads * tokens**2 * features
        return Kernel("attention", tokens, (5 if match[1] else 2) * product, moved)
    return Kernel("other", 0, 0, moved)


def _traffic(scope: Scope, instruction: Instruction, bodies: dict[str, Scope]) -> int:
    """Returns the bytes that a kernel reads and writes: of what it slices, only the slices."""
    if instruction.opcode.endswith("-start") and instruction.opcode not in _FUSIONS:  # copies
        return 2 * sum(array_bytes(scope[name].shape) for name in instruction.operands)
    if instruction.opcode not in _FUSIONS:
        inside = dict.fromkeys(instruction.operands)
        read = [_read({**inside, instruction.name: instruction}, scope[n]) for n in inside]
        return sum(read) + _written(scope, instruction)
    body = next(bodies[name] for name in instruction.called())
    root = next(i for i in body.values() if i.is_root)
    read = [_read(body, i) for i in body.values() if i.opcode == "parameter"]
    return sum(read) + _written(body, root)


def _read(body: Scope, source: Instruction) -> int:
    """Returns the bytes of `source` that the computation reads."""
    whole, total = array_bytes(source.shape), 0
    for user in body.values():
        if not user or source.name not in user.operands:
            continue
        if user.opcode == "bitcast":
            total += _read(body, user)
        elif user.opcode in ("dynamic-slice", "slice"):
            total += array_bytes(user.shape)
        elif user.opcode != "dynamic-update-slice" or user.operands[0] != source.name:
            return whole
    return min(whole, total)


def _written(body: Scope, root: Instruction) -> int:
    """Returns the bytes that `root` writes: an update in place writes the update."""
    if root.opcode == "tuple":
        return sum(_written(body, body[name]) for name in root.operands)
    if root.opcode == "bitcast" and root.operands[0] in body:
        return _written(body, body[root.operands[0]])
    if root.opcode == "dynamic-update-slice":
        return array_bytes(body[root.operands[1]].shape)
    return array_bytes(root.shape)


def _is_product(instruction: Instruction) -> bool:
    if instruction.opcode == "custom-call":
        text = instruction.attributes
        return bool(_PRODUCT.search(text) or _CONVOLUTION.search(text))
    return instruction.opcode in ("dot", "convolution")


def _product(scope: Scope, instruction: Instruction) -> tuple[int, int]:
    """Returns the smallest side and the FLOPs of a product or convolution."""
    out = dims(instruction.shape)
    if "dim_labels" in instruction.attributes:
        two = dataclasses.replace(instruction, operands=instruction.operands[:2])
        flops = convolution_flops(scope, two)
        kernel = dims(scope[instruction.operands[1]].shape)
        return min(max(out), max(kernel)), flops
    lhs = dims(scope[instruction.operands[0]].shape)
    if instruction.opcode == "dot":
        flops = dot_flops(scope, instruction)
        batch = instruction.attribute("lhs_batch_dims") or ""
    else:
        contracted, batch = (
            re.search(rf'"lhs_{kind}_dimensions":\[([^\]]*)\]', instruction.attributes)[1]
            for kind in ("contracting", "batch")
        )
        flops = 2 * math.prod(out) * math.prod(lhs[int(d)] for d in re.findall(r"\d+", contracted))
    batches = math.prod(lhs[int(d)] for d in re.findall(r"\d+", batch))
    inner = flops // (2 * math.prod(out))
    rows = math.prod(lhs) // (inner * batches)
    return min(inner, rows, math.prod(out) // (batches * rows)), flops


def _between(rows: list[list[float]], at: float) -> float:
    """Interpolates linearly over the logarithm of the first column; constant outside."""
    x, y = zip(*rows, strict=True)
    return float(np.interp(math.log(at), np.log(x), y))
