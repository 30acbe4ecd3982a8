"""What the compiler says of a program: memory, cycles, FLOPs and collectives of one device.

XLA counts the body of a loop once; here everything is multiplied by the loop's trips.
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from vit_jax.costs.chips import Chip

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_SHAPE = re.compile(r"\b([a-z]+)(\d+)?(?:e\d+m\d+\w*)?\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*?) ?\b([a-z][a-z0-9\-]*)\((.*)$")
# TPUs send what crosses from slice to slice through their hosts.
_BETWEEN_SLICES = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
_KERNEL = re.compile(
    r'custom_call_target="(tpu_custom_call|__cudnn\$fmha\w*|__gpu\$xla\.gpu\.triton)"'
)
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|branch_computations|true_computation|false_computation|"
    r"called_computations)=\{?(%[\w.\-]+(?:, %[\w.\-]+)*)"
)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device."""

    arguments: int
    temporaries: int
    outputs: int  # those that take no argument's place
    code: int

    @property
    def peak(self) -> int:
        return self.arguments + self.temporaries + self.outputs + self.code


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A program inside the program that XLA doesn't see into: of Pallas, or cuDNN's attention.

    `flops` and `bytes` (of the device's memory) of one call are what its author states to XLA;
    None: nothing.
    """

    name: str
    flops: int | None
    bytes: int | None
    times: int = 1

    def seconds(self, chip: Chip) -> float | None:
        """The least time of all calls: at the peak or at the memory's full bandwidth."""
        if self.flops is None or self.bytes is None:
            return None
        compute = self.flops / chip.device_peak_flops
        return self.times * max(compute, self.bytes * chip.devices / chip.hbm_bandwidth)


@dataclasses.dataclass(frozen=True)
class Collective:
    """A communication of every step. `bytes`: of the whole array of one device, gathered."""

    kind: str
    bytes: int
    group: tuple[int, ...]  # devices that take part; of several groups the first
    times: int = 1

    def seconds(self, chip: Chip, island: int) -> float | None:
        """The least time of all of them; `island`: devices joined by the chip's own links.

        A group that spans several islands reduces within each before it uses the network. None
        when the network's bandwidth is not known.
        """
        islands = len({device // island for device in self.group})
        inside = len(self.group) // islands
        factor = 2 if self.kind == "all-reduce" else 1
        if self.kind == "collective-permute":
            inside, links, network = 1, self.bytes, self.bytes * (islands > 1)
        else:
            links = factor * self.bytes * (inside - 1) / inside
            network = factor * self.bytes / inside * (islands - 1) / islands
        if network and chip.network_bandwidth is None:
            return None
        seconds = links * chip.devices / chip.link_bandwidth
        if network:
            seconds += network * chip.devices / chip.network_bandwidth
        return self.times * seconds


class OutOfMemory(Exception):
    """The program needs more memory than the device has: GiB of both, as the compiler says."""

    def __init__(self, needed: float, capacity: float):
        super().__init__(f"needs {needed:.2f} GiB of {capacity:.2f} GiB")
        self.needed, self.capacity = needed, capacity


def compile_for(lowered: Any) -> Any:
    """Compiles a lowered program; raises OutOfMemory where that is why it can't be."""
    try:
        return lowered.compile()
    except RuntimeError as error:
        if problem := out_of_memory(str(error)):
            raise problem from None
        raise


def out_of_memory(message: str) -> OutOfMemory | None:
    """Reads the compiler's error: `Used 21.3G of 15.75G hbm` and the like; None if it's another."""
    size = r"([\d.]+)([KMGT])"
    match = re.search(rf"Used {size} of {size} hbm", message) or re.search(
        rf"\({size}\) exceeds available HBM \({size}\)", message
    )
    if not match:
        return None
    gib = {"K": 2**-20, "M": 2**-10, "G": 1.0, "T": 2.0**10}
    return OutOfMemory(float(match[1]) * gib[match[2]], float(match[3]) * gib[match[4]])


def memory(compiled: Any) -> Memory:
    """The compiler's account of one device's memory."""
    stats = compiled.memory_analysis()
    return Memory(
        arguments=stats.argument_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        outputs=stats.output_size_in_bytes - stats.alias_size_in_bytes,
        code=stats.generated_code_size_in_bytes,
    )


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of HLO's text."""

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
        """The TPU compiler's estimate of one run; None where it says that it has none."""
        match = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
        cycles = int(match[1]) if match else 0
        return None if cycles == 2**63 - 1 else cycles

    def attribute(self, name: str) -> str | None:
        match = re.search(rf"\b{name}=([^\s,{{]+|\{{[^{{}}]*\}})", self.attributes)
        return match and match[1]


class Program:
    """A compiled program, read from `compiled.as_text()`.

    `slices`: the first device of each, where TPUs of several slices run it.
    """

    def __init__(self, text: str, slices: tuple[int, ...] = (0,)):
        self._slices = slices
        self._computations: dict[str, dict[str, Instruction]] = {}
        self.unknown_loops = 0  # loops whose trips could not be read, counted as one
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
            raise ValueError("no ENTRY in the program's text: expected what as_text() gives")
        self._times: dict[str, int] = {}  # each computation's runs in one step
        self._run(self._entry, 1)

    def _run(self, name: str, times: int) -> None:
        self._times[name] = self._times.get(name, 0) + times
        for instruction in self._computations[name].values():
            if instruction.opcode.endswith(("-done", "-update")):
                continue  # names again what its start has called
            trips = self._trips(name, instruction) if instruction.opcode == "while" else 1
            for called in instruction.called():
                self._run(called, times * trips)

    def _trips(self, computation: str, loop: Instruction) -> int:
        """Of `for i in range(a, b, c)`: as XLA notes it, or by `i < b` and `i + c` in its text."""
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
        """How often each runs in a step, its computation by name, and itself."""
        for name, times in self._times.items():
            for instruction in self._computations[name].values():
                yield times, self._computations[name], instruction

    @property
    def cycles(self) -> int:
        """The TPU compiler's estimated cycles of one device, but for waiting, and for kernels."""
        return sum(times * (i.cycles or 0) for times, _, i in self.instructions())

    @property
    def without_estimate(self) -> int:
        """How many of the instructions that run in a step `cycles` counts as 0 for want of one."""
        return sum(times for times, _, i in self.instructions() if i.cycles is None)

    @property
    def flops(self) -> int:
        """Of one device's matrix products and convolutions, those recomputed included.

        Those of kernels, where these state any, too.
        """
        total = 0
        for times, scope, instruction in self.instructions():
            if instruction.opcode == "convolution":
                total += times * _convolution_flops(scope, instruction)
            elif instruction.opcode == "dot":
                total += times * _dot_flops(scope, instruction)
        return total + sum(kernel.times * (kernel.flops or 0) for kernel in self.kernels)

    @property
    def kernels(self) -> list[Kernel]:
        """Every call of a kernel; of none of them `cycles` knows."""
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
        """Every communication, one for all the parts that the compiler may spread it over."""
        found: dict[str, Collective] = {}
        for times, scope, instruction in self.instructions():
            kind = instruction.opcode.removesuffix("-start")
            group = None
            if match := _BETWEEN_SLICES.search(instruction.attributes):
                if kind != "send":  # its "recv" says the same
                    continue
                kind, group = match[1].lower().replace("_", "-"), self._slices
            if kind in COLLECTIVES:
                channel = instruction.attribute("channel_id") or instruction.name
                size = sum(_bytes(scope[operand].shape) for operand in instruction.operands)
                group = group or _first_group(instruction.attributes)
                if kind == "all-gather":
                    size *= len(group)
                if instruction.computation.startswith("all-reduce-scatter"):  # as TPUs do it
                    kind = "reduce-scatter"
                found[channel] = Collective(kind, size, group, times)
        return list(found.values())


def _root(computation: dict[str, Instruction]) -> Instruction:
    return next(i for i in computation.values() if i.is_root)


def _constant(scope: dict[str, Instruction], name: str) -> int | None:
    """A whole number, or copies of it; None for what is computed."""
    while scope[name].opcode in ("copy", "copy-done", "copy-start", "bitcast"):
        name = scope[name].operands[0]
    value = scope[name].operands[0] if scope[name].opcode == "constant" else ""
    return int(value) if re.fullmatch(r"-?\d+", value) else None


def _bytes(shape: str) -> int:
    total = 0
    for name, bits, dims in _SHAPE.findall(re.sub(r"\{[^{}]*\}", "", shape)):
        width = 8 if name == "pred" else int(bits or 0)
        total += width * math.prod(map(int, filter(None, dims.split(",")))) // 8
    return total


def _dims(shape: str) -> list[int]:
    return [int(n) for n in _SHAPE.search(shape)[3].split(",") if n]


def _dot_flops(scope: dict[str, Instruction], dot: Instruction) -> int:
    lhs = _dims(scope[dot.operands[0]].shape)
    contracted = re.findall(r"\d+", dot.attribute("lhs_contracting_dims") or "")
    return 2 * math.prod(_dims(dot.shape)) * math.prod(lhs[int(d)] for d in contracted)


def _convolution_flops(scope: dict[str, Instruction], conv: Instruction) -> int:
    """2 for each tap that meets an element and not padding, as XLA counts them.

    The TPU compiler writes matrix products as convolutions whose windows are mostly padding.
    """
    lhs_labels, kernel_labels, out_labels = re.split("_|->", conv.attribute("dim_labels"))
    lhs, kernel = (_dims(scope[operand].shape) for operand in conv.operands)
    out = _dims(conv.shape)
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


def _first_group(attributes: str) -> tuple[int, ...]:
    """The first of `replica_groups`, in any of the ways that XLA writes them."""
    if match := re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}", attributes):
        return tuple(map(int, match[1].split(",")))
    if match := re.search(rf"replica_groups=\[(\d+),(\d+)\]<={_IOTA}", attributes):
        return tuple(_iota(match[3], match[4])[: int(match[2])].tolist())
    device_ids = rf"(?:, device_ids=\((?:{_IOTA}|([\d,]+))\))?"
    if match := re.search(rf"groups=mesh\[([^\]]*)\]{device_ids} \{{([^}}]*)\}}", attributes):
        axes = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", match[1])}
        ids = np.arange(math.prod(axes.values()))
        if match[2]:
            ids = _iota(match[2], match[3])
        elif match[4]:
            ids = np.array([int(n) for n in match[4].split(",")])
        inside = tuple(slice(None) if f"'{axis}'" in match[5] else 0 for axis in axes)
        if ":" not in match[5]:  # which would be a part of an axis
            return tuple(ids.reshape(*axes.values())[inside].reshape(-1).tolist())
    raise ValueError(f"cannot read the devices of a collective: {attributes[:200]}")


def _iota(dims: str, order: str | None) -> np.ndarray:
    """XLA's short form of a list of devices: [2,4]T(1,0) is 0 4 1 5 2 6 3 7."""
    shape = [int(n) for n in dims.split(",")]
    axes = [int(n) for n in order.split(",")] if order else range(len(shape))
    return np.arange(math.prod(shape)).reshape(shape).transpose(axes).reshape(-1)
