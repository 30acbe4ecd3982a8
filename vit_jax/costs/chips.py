"""Published specifications of the chips that a run can be planned for.

Sources:

- TPU: "System architecture" of docs.cloud.google.com/tpu/docs/{v2,v3,v4,v5e,v5p,v6e,tpu7x}; v5e to
  TPU7x as of November 2026. ICI bandwidths are published for both directions and halved here. The
  network bandwidth of v5e is its pod's 6.4 Tbit/s divided by 256 chips.
- Links of v2 and v3: Norrie et al., "The Design Process for Google's Training Chips: TPUv2 and
  TPUv3", IEEE Micro 2021. Links of v4: arXiv 2304.01433, Table 4.
- MXUs: the same pages and jax 0.10.2 (jax/_src/pallas/mosaic/tpu_info.py), which lists two of
  256 x 256 per core for v6e and TPU7x.
- GPU: NVIDIA's data sheets of SXM boards and DGX and HGX systems, without sparsity. Memory is as
  nvidia-smi shows it.
"""

import dataclasses

import jax

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """A chip with `devices` jax devices. Bandwidths are in bytes/s and one direction."""

    name: str
    device_kinds: tuple[str, ...]  # `jax.Device.device_kind`
    peak_flops: float  # FLOP/s, dense bfloat16
    hbm_gib: float
    hbm_bandwidth: float
    link_bandwidth: float  # sum of all ICI or NVLink links
    network_bandwidth: float | None = None  # to other slices or nodes; None: not published
    devices: int = 1
    # TPU only. Memory that libtpu 0.0.42 lets one device's program use, from its messages.
    usable_gib: float = 0.0
    # Per device: 2 x MXUs x rows x columns. Doubled for v6e and TPU7x: otherwise the published peak
    # would imply a clock of 3.5 GHz, and the compiler's estimates would exceed the peak.
    flops_per_cycle: int = 0
    pod: tuple[int, ...] = ()  # chips along the sides of the largest slice

    @property
    def is_tpu(self) -> bool:
        return bool(self.pod)

    @property
    def device_peak_flops(self) -> float:
        """Peak FLOP/s of one jax device."""
        return self.peak_flops / self.devices

    @property
    def device_hbm_gib(self) -> float:
        """GiB that a program can use on one jax device.

        For GPUs this is jax's default share, XLA_PYTHON_CLIENT_MEM_FRACTION = 0.75.
        """
        return self.usable_gib if self.is_tpu else 0.75 * self.hbm_gib

    @property
    def clock(self) -> float:
        """Clock of a TPU's matrix units in Hz: published peak / FLOPs per cycle.

        Gives the published 700, 940 and 1050 MHz for v2, v3 and v4. Later chips have no published
        clock; the results are 1.50 (v5e), 1.75 (v5p, v6e) and 2.20 GHz (TPU7x).
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
    """Converts a number of jax devices to chips; unknown devices count as one chip each."""
    kind = jax.devices()[0].device_kind
    return devices / next((chip.devices for chip in _TABLE if kind in chip.device_kinds), 1)
