"""Collectives of a compiled program: their devices, bytes and minimum times."""

import dataclasses
import math
import re

import numpy as np

from vit_jax.config import InputError
from vit_jax.costs.chips import Chip

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective operation.

    `bytes`: size of the full (gathered) array on one device. `times`: calls per step. `beside`: the
    compiler's cycles of a call's asynchronous part, in which the device computes; 0 if it waits.
    """

    kind: str
    bytes: int
    group: tuple[int, ...]  # participating devices; the first of several groups
    times: int = 1
    beside: int = 0

    def seconds(self, chip: Chip, island: int) -> float | None:
        """Minimum time of all calls in seconds; None if the network bandwidth is unknown.

        `island`: number of devices connected by the chip's own links. A group over several islands
        reduces within each island first, then over the network.
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


def first_group(attributes: str) -> tuple[int, ...]:
    """Returns the first group of a collective, in any of XLA's notations."""
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
        if ":" not in match[5]:  # a colon marks part of an axis
            return tuple(ids.reshape(*axes.values())[inside].reshape(-1).tolist())
    raise InputError(f"cannot read the devices of a collective: {attributes[:200]}")


def _iota(dims: str, order: str | None) -> np.ndarray:
    """Expands XLA's short form of a device list: [2,4]T(1,0) is 0 4 1 5 2 6 3 7."""
    shape = [int(n) for n in dims.split(",")]
    axes = [int(n) for n in order.split(",")] if order else range(len(shape))
    return np.arange(math.prod(shape)).reshape(shape).transpose(axes).reshape(-1)
