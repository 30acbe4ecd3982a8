"""The chips a run may be planned for, one table: what their makers publish.

TPU: "System architecture" of docs.cloud.google.com/tpu/docs/{v2,v3,v4,v5e,v5p,v6e,tpu7x}. Those of
v5e, v5p, v6e and TPU7x were read again in November 2026: peak, HBM, ICI (published both ways: half
of it here) and the network's Gbit/s of a chip (v5e: its pod's 6.4 Tbit/s over 256). Links of v2 and
v3: Norrie et al., "The Design Process for Google's Training Chips: TPUv2 and TPUv3", IEEE Micro
2021; of v4: arXiv 2304.01433, Table 4. MXUs: the same pages, and jax's own table (0.10.2,
jax/_src/pallas/mosaic/tpu_info.py), which has two of 256 x 256 a core of v6e and TPU7x.
GPU: NVIDIA's data sheets of the SXM boards and of the DGX and HGX systems around them, without
sparsity; memory is what nvidia-smi shows.
"""

import dataclasses

import jax

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip; a jax device is 1 / `devices` of it. Bandwidths are bytes/s in one direction."""

    name: str
    device_kinds: tuple[str, ...]  # `jax.Device.device_kind`
    peak_flops: float  # FLOP/s, dense bfloat16
    hbm_gib: float
    hbm_bandwidth: float
    link_bandwidth: float  # to the chips around it: all ICI or NVLink links together
    network_bandwidth: float | None = None  # to other slices or nodes; None: not published
    devices: int = 1
    # TPU alone. Usable: what libtpu 0.0.42 lets the program of a device have, from its messages.
    usable_gib: float = 0.0
    # Of a device's matrix units: 2 x MXUs x rows x columns, of v6e and TPU7x doubled, without which
    # the published peak would need a clock of 3.5 GHz and the compiler's cycles would exceed it.
    flops_per_cycle: int = 0
    pod: tuple[int, ...] = ()  # chips along the sides of the largest slice

    @property
    def is_tpu(self) -> bool:
        return bool(self.pod)

    @property
    def device_peak_flops(self) -> float:
        """FLOP/s of one jax device."""
        return self.peak_flops / self.devices

    @property
    def device_hbm_gib(self) -> float:
        """GiB that a program may use of one jax device.

        Of a GPU it is the part that jax takes unless told otherwise, XLA_PYTHON_CLIENT_MEM_FRACTION
        = 0.75.
        """
        return self.usable_gib if self.is_tpu else 0.75 * self.hbm_gib

    @property
    def clock(self) -> float:
        """Hz of the matrix units: the published peak over the FLOPs of a cycle. TPU alone.

        This gives the 700, 940 and 1050 MHz that are published of v2, v3 and v4. Of later chips no
        clock is published; theirs come out as 1.50 (v5e), 1.75 (v5p, v6e) and 2.20 GHz (TPU7x).
        """
        return self.device_peak_flops / self.flops_per_cycle


_MXU = 2 * 128 * 128
_TABLE = (
    Chip("v2", ("TPU v2",), 45e12, 16, 700e9, 248e9, None, 2, 7.48, _MXU, (16, 16)),
    Chip("v3", ("TPU v3",), 123e12, 32, 900e9, 328e9, None, 2, 15.48, 2 * _MXU, (32, 32)),
    Chip("v4", ("TPU v4",), 275e12, 32, 1.2e12, 300e9, None, 1, 30.75, 8 * _MXU, (16, 16, 16)),
    Chip(
        "v5e", ("TPU v5 lite", "TPU v5e"),
        197e12, 16, 819e9, 200e9, 3.1e9, 1, 15.75, 4 * _MXU, (16, 16),
    ),
    Chip(
        "v5p", ("TPU v5", "TPU v5p"),
        459e12, 95, 2765e9, 600e9, 6.25e9, 1, 95.74, 8 * _MXU, (16, 16, 24),
    ),
    Chip(
        "v6e", ("TPU v6 lite", "TPU v6e"),
        918e12, 32, 1638e9, 400e9, 12.5e9, 1, 31.25, 16 * _MXU, (16, 16),
    ),
    Chip(
        "tpu7x", ("TPU7x",), 2307e12, 192, 7380e9, 600e9, 12.5e9, 2, 94.75, 16 * _MXU, (16, 24, 24)
    ),
    Chip(
        "a100", ("NVIDIA A100-SXM4-80GB", "NVIDIA A100-SXM4-40GB"),
        312e12, 80, 2039e9, 300e9, 25e9,
    ),
    Chip("h100", ("NVIDIA H100 80GB HBM3",), 989e12, 79.1, 3.35e12, 450e9, 50e9),
    Chip("h200", ("NVIDIA H200",), 989e12, 139.8, 4.8e12, 450e9, 50e9),
    Chip("b200", ("NVIDIA B200",), 2250e12, 178, 7.7e12, 900e9, 50e9),
)  # fmt: skip
CHIPS: dict[str, Chip] = {chip.name: chip for chip in _TABLE}

# Dense bfloat16 peak of one jax device, FLOP/s, by `jax.Device.device_kind`.
PEAK_FLOPS: dict[str, float] = {
    kind: chip.device_peak_flops for chip in _TABLE for kind in chip.device_kinds
}


def num_chips(devices: int) -> float:
    """Chips of so many of jax's devices; one that isn't in the table is a chip."""
    kind = jax.devices()[0].device_kind
    return devices / next((chip.devices for chip in _TABLE if kind in chip.device_kinds), 1)
