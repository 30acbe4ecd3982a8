"""Reads memory, cycles, FLOPs and collectives of one device from a compiled program.

XLA's cost analysis counts a loop's body once. Here everything is multiplied by the trip count.
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from vit_jax.config import InputError
from vit_jax.costs.chips import Chip
from vit_jax.costs.collectives import COLLECTIVES, Collective, first_group

_SHAPE = re.compile(r"\b([a-z]+)(\d+)?(?:e\d+m\d+\w*)?\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*?) ?\b([a-z][a-z0-9\-]*)\((.*)$")
# TPUs communicate between slices through their hosts.
_BETWEEN_SLICES = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_KERNEL = re.compile(
    r'custom_call_target="(tpu_custom_call|__cudnn\$fmha\w*|__gpu\$xla\.gpu\.triton)"'
)
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|branch_computations|true_computation|false_computation|"
    r"called_computations)=\{?(%[\w.\-]+(?:, %[\w.\-]+)*)"
)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Memory of one device's program, in bytes."""

    arguments: int
    temporaries: int
    outputs: int  # not aliased with arguments
    code: int

    @property
    def peak(self) -> int:
        return self.arguments + self.temporaries + self.outputs + self.code


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A custom call that XLA can't analyse: a Pallas kernel or cuDNN's attention.

    `flops` and `bytes` (device memory traffic) per call are its stated cost estimate; None without
    one. `times`: calls per step.
    """

    name: str
    flops: int | None
    bytes: int | None
    times: int = 1

    def seconds(self, chip: Chip) -> float | None:
        """Roofline time of all calls in seconds: at the peak or the full memory bandwidth."""
        if self.flops is None or self.bytes is None:
            return None
        compute = self.flops / chip.device_peak_flops
        return self.times * max(compute, self.bytes * chip.devices / chip.hbm_bandwidth)


class OutOfMemory(Exception):
    """The program needs more memory than the device has; both in GiB, from the compiler."""

    def __init__(self, needed: float, capacity: float):
        super().__init__(f"needs {needed:.2f} GiB of {capacity:.2f} GiB")
        self.needed, self.capacity = needed, capacity


def compile_for(lowered: Any) -> Any:
    """Compiles a lowered program; raises OutOfMemory if it doesn't fit the device."""
    try:
        return lowered.compile()
    except RuntimeError as error:
        if problem := out_of_memory(str(error)):
            raise problem from None
        raise


def out_of_memory(message: str) -> OutOfMemory | None:
    """Parses errors such as `Used 21.3G of 15.75G hbm`; returns None for other errors."""
    size = r"([\d.]+)([KMGT])"
    match = re.search(rf"Used {size} of {size} hbm", message) or re.search(
        rf"\({size}\) exceeds available HBM \({size}\)", message
    )
    if not match:
        return None
    gib = {"K": 2**-20, "M": 2**-10, "G": 1.0, "T": 2.0**10}
    return OutOfMemory(float(match[1]) * gib[match[2]], float(match[3]) * gib[match[4]])


def memory(compiled: Any) -> Memory:
    """Returns the compiler's memory analysis of one device."""
    stats = compiled.memory_analysis()
    return Memory(
        arguments=stats.argument_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        outputs=stats.output_size_in_bytes - stats.alias_size_in_bytes,
        code=stats.generated_code_size_in_bytes,
    )


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO text."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool
    computation: str

    def called(self) -> Iterator[str]:
        for match in _CALLED.finditer(self.attributes):
            yield from (name.strip().lstrip("%") for name in match[1].split(","))

    @property
    def cycles(self) -> int | None:
        """The TPU compiler's estimated cycles of one run; None if it has no estimate."""
        match = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
        cycles = int(match[1]) if match else 0
        return None if cycles == 2**63 - 1 else cycles

    def attribute(self, name: str) -> str | None:
        match = re.search(rf"\b{name}=([^\s,{{]+|\{{[^{{}}]*\}})", self.attributes)
        return match and match[1]


class Program:
    """A compiled program, parsed from `compiled.as_text()`.

    `slices`: the first device of each TPU slice.
    """

    def __init__(self, text: str, slices: tuple[int, ...] = (0,)):
        self._slices = slices
        self._computations: dict[str, dict[str, Instruction]] = {}
        self.unknown_loops = 0  # loops with an unknown trip count, counted as one trip
        self._entry = ""
        name, current = "", {}
        for line in text.splitlines():
            if match := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line):
                name = match[2]
                current = self._computations[name] = {}
                self._entry = name if match[1] else self._entry
            elif match := _INSTRUCTION.match(line):
                arguments, _, attributes = match[5].partition("), ")
                if match[4] in ("constant", "parameter"):
                    operands = (arguments.split(")")[0],)
                else:
                    operands = tuple(re.findall(r"%([\w.\-]+)", arguments))
                current[match[2]] = Instruction(
                    match[2], match[3], match[4], operands, attributes, bool(match[1]), name
                )
        if not self._entry:
            raise InputError("no ENTRY in the program's text: expected the result of as_text()")
        self._times: dict[str, int] = {}  # computation -> runs per step
        self._callers: dict[str, Instruction] = {}  # computation -> what runs it
        self._run(self._entry, 1)

    def _run(self, name: str, times: int) -> None:
        self._times[name] = self._times.get(name, 0) + times
        for instruction in self._computations[name].values():
            if instruction.opcode.endswith(("-done", "-update")):
                continue  # repeats the computation of its start
            trips = self._trips(name, instruction) if instruction.opcode == "while" else 1
            for called in instruction.called():
                self._callers[called] = instruction
                self._run(called, times * trips)

    def _trips(self, computation: str, loop: Instruction) -> int:
        """Returns a loop's trip count: as annotated, or from `i < b` and `i + c` in the text."""
        if match := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes):
            return int(match[1])
        scope, condition, body = (
            self._computations[name.lstrip("%")]
            for name in (computation, loop.attribute("condition"), loop.attribute("body"))
        )
        test = _root(condition)
        if test.opcode == "compare" and test.attribute("direction") == "LT":
            counter, limit = (condition[operand] for operand in test.operands)
            if counter.opcode == "get-tuple-element":
                index = int(counter.attribute("index"))
                start = _constant(scope, scope[loop.operands[0]].operands[index])
                added = body[_root(body).operands[index]]
                steps = [_constant(body, operand) for operand in added.operands]
                step = next((n for n in steps if n), None) if added.opcode == "add" else None
                stop = _constant(condition, limit.name)
                if None not in (start, stop, step):
                    return -(-(stop - start) // step)
        self.unknown_loops += 1
        return 1

    def instructions(self) -> Iterator[tuple[int, dict[str, Instruction], Instruction]]:
        """Yields runs per step, the enclosing computation (name -> instruction), and each one."""
        for name, times in self._times.items():
            for instruction in self._computations[name].values():
                yield times, self._computations[name], instruction

    @property
    def cycles(self) -> int:
        """The TPU compiler's estimated cycles of one device, without waiting and kernels."""
        return sum(times * (i.cycles or 0) for times, _, i in self.instructions())

    @property
    def without_estimate(self) -> int:
        """Number of executed instructions without an estimate, which `cycles` counts as 0."""
        return sum(times for times, _, i in self.instructions() if i.cycles is None)

    @property
    def flops(self) -> int:
        """FLOPs of one device's matrix products and convolutions, including recomputation.

        Includes the stated FLOPs of kernels.
        """
        total = 0
        for times, scope, instruction in self.instructions():
            if instruction.opcode == "convolution":
                total += times * convolution_flops(scope, instruction)
            elif instruction.opcode == "dot":
                total += times * dot_flops(scope, instruction)
        return total + sum(kernel.times * (kernel.flops or 0) for kernel in self.kernels)

    @property
    def kernels(self) -> list[Kernel]:
        """All calls of kernels, which `cycles` doesn't include."""
        found = []
        for times, _, instruction in self.instructions():
            attributes = instruction.attributes
            if instruction.opcode != "custom-call" or not (match := _KERNEL.search(attributes)):
                continue
            name = re.sub(r"\.\d+$", "", instruction.name)
            if match[1].startswith("__cudnn"):
                name = match[1].removeprefix("__cudnn$")
            costs = re.search(r'"cost_estimate":\{([^{}]*)\}', attributes)
            stated = dict(re.findall(r'"(\w+)":"(\d+)"', costs[1])) if costs else {}
            flops, size = (stated.get(key) for key in ("flops", "bytes_accessed"))
            found.append(Kernel(name, flops and int(flops), size and int(size), times))
        return found

    @property
    def collectives(self) -> list[Collective]:
        """All collectives; those that the compiler splits into parts count once."""
        found: dict[tuple, Collective] = {}
        for times, scope, instruction in self.instructions():
            kind = instruction.opcode.removesuffix("-start")
            group = None
            if match := _BETWEEN_SLICES.search(instruction.attributes):
                if kind != "send":  # its "recv" is the same transfer
                    continue
                kind, group = match[1].lower().replace("_", "-"), self._slices
            if kind in COLLECTIVES:
                channel = instruction.attribute("channel_id") or instruction.name
                size = sum(array_bytes(scope[operand].shape) for operand in instruction.operands)
                group = group or first_group(instruction.attributes)
                if kind == "all-gather":
                    size *= len(group)
                if instruction.computation.startswith(
                    "all-reduce-scatter"
                ):  # a reduce-scatter on TPUs
                    kind = "reduce-scatter"
                # Those that jax writes, as in `shard_map`, share a channel.
                source = re.search(r'op_name="([^"]*)"', instruction.attributes)
                key = (channel, group, source and source[1])
                beside = self._beside(instruction) + (found[key].beside if key in found else 0)
                found[key] = Collective(kind, size, group, times, beside)
        return list(found.values())

    def _beside(self, collective: Instruction) -> int:
        """Returns the cycles of the fusion that a part of a collective is in, or until its end."""
        if collective.computation.startswith("async_collective_fusion"):
            return self._callers[collective.computation].cycles or 0
        if not collective.opcode.endswith("-start"):
            return 0
        cycles, started = 0, False
        for other in self._computations[collective.computation].values():  # as scheduled
            if other.opcode.endswith("-done") and collective.name in other.operands:
                break
            cycles += started * (other.cycles or 0)
            started |= other is collective
        return cycles


def _root(computation: dict[str, Instruction]) -> Instruction:
    return next(i for i in computation.values() if i.is_root)


def _constant(scope: dict[str, Instruction], name: str) -> int | None:
    """Returns an integer constant, also through copies; None for computed values."""
    while scope[name].opcode in ("copy", "copy-done", "copy-start", "bitcast"):
        name = scope[name].operands[0]
    value = scope[name].operands[0] if scope[name].opcode == "constant" else ""
    return int(value) if re.fullmatch(r"-?\d+", value) else None


def array_bytes(shape: str) -> int:
    """Returns the bytes of an array or a tuple of arrays, written as in HLO."""
    total = 0
    for name, bits, dims in _SHAPE.findall(re.sub(r"\{[^{}]*\}", "", shape)):
        width = 8 if name == "pred" else int(bits or 0)
        total += width * math.prod(map(int, filter(None, dims.split(",")))) // 8
    return total


def dims(shape: str) -> list[int]:
    """Returns the shape of an array, or of the first of a tuple, written as in HLO."""
    return [int(n) for n in _SHAPE.search(shape)[3].split(",") if n]


def dot_flops(scope: dict[str, Instruction], dot: Instruction) -> int:
    """Counts 2 FLOPs per multiply-accumulate of a product."""
    lhs = dims(scope[dot.operands[0]].shape)
    contracted = re.findall(r"\d+", dot.attribute("lhs_contracting_dims") or "")
    return 2 * math.prod(dims(dot.shape)) * math.prod(lhs[int(d)] for d in contracted)


def convolution_flops(scope: dict[str, Instruction], conv: Instruction) -> int:
    """Counts 2 FLOPs per kernel tap on an element, none on padding, as XLA does.

    The TPU compiler writes matrix products as convolutions whose windows are mostly padding.
    """
    lhs_labels, kernel_labels, out_labels = re.split("_|->", conv.attribute("dim_labels"))
    lhs, kernel = (dims(scope[operand].shape) for operand in conv.operands)
    out = dims(conv.shape)
    window = dict(re.findall(r"(\w+)=([\dx_\-]+)", conv.attribute("window") or ""))

    def option(name: str, axis: int, default: int) -> int:
        return int(window[name].split("x")[axis]) if name in window else default

    taps = 1
    for axis in range(len(out) - 2):
        pad = int(window["pad"].split("x")[axis].split("_")[0]) if "pad" in window else 0
        places = np.arange(out[out_labels.index(str(axis))]) * option("stride", axis, 1) - pad
        steps = np.arange(kernel[kernel_labels.index(str(axis))]) * option("rhs_dilate", axis, 1)
        at = places[:, None] + steps
        spread = option("lhs_dilate", axis, 1)
        size = lhs[lhs_labels.index(str(axis))]
        taps *= int(((at >= 0) & (at % spread == 0) & (at // spread < size)).sum())
    batch = out[out_labels.index("b")] // int(conv.attribute("batch_group_count") or 1)
    return 2 * taps * batch * out[out_labels.index("f")] * kernel[kernel_labels.index("i")]
