"""Opens topologies such as `v5e:16x16` for ahead-of-time compilation, without the devices."""

import dataclasses
import importlib.util
import math
import os
import re

import jax
from jax.experimental import topologies

from vit_jax.config import InputError, unknown
from vit_jax.costs.chips import CHIPS, GIB, Chip

# The first keeps libtpu from querying the metadata server of TPU VMs. The others allow a second
# process and silence warnings outside TPU VMs.
LIBTPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5e-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}
CUDA_PLUGINS = ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13")
# XLA's GPU parameters: multiprocessors, FP32 units and bytes of shared memory per multiprocessor,
# bytes of L2 cache, clock in GHz, compute capability. From NVIDIA's white papers of Ampere, Hopper
# and Blackwell.
GPU_TARGETS = {
    "a100": (108, 64, 164 * 1024, 40 * 2**20, 1.41, 8),
    "h100": (132, 128, 228 * 1024, 50 * 2**20, 1.98, 9),
    "h200": (132, 128, 228 * 1024, 50 * 2**20, 1.98, 9),
    "b200": (148, 128, 228 * 1024, 126 * 2**20, 1.965, 10),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """`num_slices` TPU slices of grid `shape`, or GPUs with `shape` = (nodes, GPUs per node)."""

    chip: Chip
    shape: tuple[int, ...]
    num_slices: int = 1

    @property
    def islands(self) -> int:
        """Number of groups of chips connected by their own links: slices or nodes."""
        return self.num_slices if self.chip.is_tpu else self.shape[0]

    @property
    def num_chips(self) -> int:
        return self.num_slices * math.prod(self.shape)

    @property
    def num_devices(self) -> int:
        return self.num_chips * self.chip.devices

    def __str__(self) -> str:
        shape = self.shape if self.chip.is_tpu or self.shape[0] > 1 else self.shape[1:]
        slices = f" x {self.num_slices} slices" if self.num_slices > 1 else ""
        return f"{self.chip.name}:{'x'.join(map(str, shape))}{slices}"


def parse_topology(text: str, num_slices: int = 1) -> Topology:
    """Reads `v5e:16x16`, `v4:8x8x16`, or for GPUs `h100:8` and `h100:32x8` (nodes x GPUs).

    Google's accelerator types are read too: `v5litepod-16`, `v6e-256`. Raises ValueError for an
    unknown chip or an impossible shape or number of slices.
    """
    name, _, sides = _of_accelerator_type(text).partition(":")
    if name not in CHIPS:
        raise unknown("chip", name, CHIPS)
    chip = CHIPS[name]
    dims = len(chip.pod) or 2
    example = f"{name}:{'x'.join('8' * dims)}"
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sides):
        raise InputError(f"topology {text!r}: expected chips along each side, such as {example}")
    shape = tuple(map(int, sides.split("x")))
    if num_slices < 1:
        raise InputError(f"num_slices = {num_slices}: expected at least 1")
    if not chip.is_tpu:
        if len(shape) > dims or num_slices > 1:
            raise InputError(
                f"topology {text!r} with num_slices = {num_slices}: expected GPUs, or nodes "
                f"x GPUs, such as {name}:8 or {name}:32x8, without slices"
            )
        return Topology(chip, (1, *shape)[-2:])
    if dims == 3:
        shape += (1,) * (3 - len(shape))
    if len(shape) != dims or any(a > b for a, b in zip(sorted(shape), chip.pod, strict=True)):
        raise InputError(
            f"topology {text!r}: {name} has slices of {dims} sides, the largest "
            f"{name}:{'x'.join(map(str, chip.pod))}; for more chips use several slices "
            "(--num_slices)"
        )
    even = tuple(n + n % 2 for n in shape[:2]) + shape[2:]
    if even != shape and math.prod(shape) > 1:
        raise InputError(
            f"topology {text!r}: hosts hold 2x2 chips, so the first two sides are even: "
            f"the nearest is {name}:{'x'.join(map(str, even))}"
        )
    return Topology(chip, shape, num_slices)


def _of_accelerator_type(text: str) -> str:
    """Returns the usual topology of an accelerator type of Google's, and other texts as they are.

    Up to v5p the types count TensorCores, two a chip; later ones count chips.
    """
    match = re.fullmatch(r"(v2|v3|v4|v5p|v5litepod|v5e|v6e)-(\d+)", text)
    if not match:
        return text
    name, number = match[1].replace("v5litepod", "v5e"), int(match[2])
    chips = number if name in ("v5e", "v6e") else number // 2
    power = max(chips, 1).bit_length() - 1
    if chips != 2**power:
        raise InputError(
            f"topology {text!r}: {chips} chips, expected a power of 2, or chips along each side, "
            f"such as {name}:{'x'.join('4' * len(CHIPS[name].pod))}"
        )
    sides = [2 ** ((power + i) // len(CHIPS[name].pod)) for i in range(len(CHIPS[name].pod))]
    if sides == [1, 2, 2]:  # a host
        sides = [2, 2, 1]
    return f"{name}:{'x'.join(map(str, sides))}"


def open_topology(topology: Topology) -> list[jax.Device]:
    """Returns devices that programs can be compiled for, but not run on.

    Raises ValueError if the compiler for them isn't installed or rejects the topology.
    """
    kind, modules, package = "GPU", CUDA_PLUGINS, "jax[cuda12]"
    if topology.chip.is_tpu:
        kind, modules, package = "TPU", ("libtpu",), "jax[tpu]"
    if not any(map(_installed, modules)):
        raise InputError(
            f"{topology}: the compiler for {kind}s is not installed; it needs no {kind}: "
            f"pip install '{package}'"
        )
    jax.config.update("jax_platforms", "cpu")  # doesn't allocate local devices
    try:
        return _open_tpus(topology) if topology.chip.is_tpu else _open_gpus(topology)
    except jax.errors.JaxRuntimeError as error:
        raise InputError(f"{topology}: the compiler rejects it: {error}") from error


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package is missing
        return False


def _open_tpus(topology: Topology) -> list[jax.Device]:
    for name, value in LIBTPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    options = {}
    if topology.chip.name == "v4":  # as on Cloud TPUs: one device for both cores
        options["chip_config_name"] = "megacore"
    if math.prod(topology.shape) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    if topology.num_slices > 1:
        options["num_slices"] = topology.num_slices
    name = f"{topology.chip.name}:{'x'.join(map(str, topology.shape))}"
    return list(topologies.get_topology_desc(name, "tpu", **options).devices)


def _open_gpus(topology: Topology) -> list[jax.Device]:
    # Triton's autotuner needs a device; without one, some matrix products don't compile.
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_enable_triton_gemm=false"
    nodes, gpus = topology.shape
    target = _gpu_target(topology.chip)
    options = {"target_config": target, "topology": f"1x{nodes}x{gpus}"}
    return list(topologies.get_topology_desc("", "cuda", **options).devices)


def _gpu_target(chip: Chip) -> str:
    """Returns XLA's GpuTargetConfigProto as text."""
    cores, fpus, shared, l2_cache, clock, major = GPU_TARGETS[chip.name]
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: {shared}
  shared_memory_per_block_optin: {shared - 1024}
  core_count: {cores} fpus_per_core: {fpus}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: {chip.hbm_bandwidth:.0f} device_memory_size: {chip.hbm_gib * GIB:.0f}
  l2_cache_size: {l2_cache} clock_rate_ghz: {clock} cuda_compute_capability {{ major: {major} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
runtime_version {{ major: 12 minor: 8 }}
device_description_str: "{chip.device_kinds[0]}"
"""
