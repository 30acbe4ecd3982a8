"""What a benchmark runs on: processor, GPU, driver, packages."""

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vit_jax.config import InputError

# The oldest driver that runs CUDA 12 and 13: NVIDIA's CUDA release notes, table 2.
LEAST_DRIVER = {"jax-cuda12-plugin": 525, "jax-cuda13-plugin": 580}


def processor() -> str:
    """Returns the CPU's name from /proc/cpuinfo."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(": ")[2].strip()
    return platform.processor()


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Returns the versions of the packages that are installed."""
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def gpu() -> dict[str, str]:
    """Returns the first GPU's name, driver version and memory in MiB. ValueError without one."""
    fields = {"gpu": "name", "driver": "driver_version", "memory_mib": "memory.total"}
    query = f"--query-gpu={','.join(fields.values())}"
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise InputError("no GPU: nvidia-smi is not on the PATH") from None
    values = (done.stdout.splitlines() or [""])[0].split(", ")
    if done.returncode or len(values) != len(fields):
        said = (done.stdout + done.stderr).strip().splitlines() or ["nothing"]
        raise InputError(f"no GPU: nvidia-smi says {said[0]!r}")
    return dict(zip(fields, values, strict=True))


def describe(packages: Iterable[str], with_gpu: bool = True) -> dict[str, Any]:
    """Describes the hardware and software. Raises ValueError without a GPU, if one is wanted."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        **(gpu() if with_gpu else {"gpu": "none"}),
        "cpu": processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(pages / 2**30, 1),
        "python": platform.python_version(),
        "versions": versions(packages),
    }


def shortcomings(machine: dict[str, Any], needed: Iterable[str], gib: float) -> list[str]:
    """Returns what measurements on this machine will fail for: a line each.

    Args:
      machine: of `describe`, with a GPU.
      needed: packages.
      gib: GPU memory that the sizes are chosen for.
    """
    driver, found = machine["driver"], []
    for package, least in LEAST_DRIVER.items():
        if package in machine["versions"] and int(driver.partition(".")[0]) < least:
            found.append(f"driver {driver} is too old for {package}: install {least} or newer")
    if (there := int(machine["memory_mib"]) / 1024) < gib:
        found.append(f"{there:.0f} GiB of GPU memory: the sizes are chosen for {gib:.0f} or more")
    missing = [name for name in needed if name not in machine["versions"]]
    return found + [f"{name} is not installed: pip install {name}" for name in missing]
