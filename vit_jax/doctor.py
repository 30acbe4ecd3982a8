"""Reports versions, devices and their memory, this machine, optional packages.

vit_jax doctor

Also reports a GPU or TPU that jax doesn't use, and what to install for it.
"""

import glob
import importlib.util
import os
import platform
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import vit_jax
from vit_jax.command_line import run

GIB = 2**30
OPTIONAL = {  # module -> (purpose, packages to install)
    "tensorflow": ("building TFDS datasets", "tensorflow-cpu apache-beam mlcroissant"),
    "tensorboardX": ("TensorBoard", "tensorboardX"),
    "wandb": ("Weights & Biases", "wandb"),
    "jax2onnx": ("ONNX", "jax2onnx onnx onnxruntime"),
    "gcsfs": ("private gs://", "gcsfs"),
    "huggingface_hub": ("private hf://", "huggingface_hub"),
    "libtpu": ("TPUs, and plans for them", "'jax[tpu]'"),
    "jax_cuda12_plugin": ("NVIDIA GPUs, and plans for them", "'jax[cuda12]'"),
}
CUDA_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")  # either is enough
REQUIRED = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets")


def versions() -> str:
    """Returns the required packages with their versions."""

    def found(name: str) -> str:
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            return f"{name} MISSING (pip install {name})"

    return ", ".join(map(found, REQUIRED))


def devices() -> tuple[str, str]:
    """Returns (jax's platform, its devices with their memory), or ("", why there are none)."""
    try:
        import jax

        there = jax.local_devices()
        limit = (there[0].memory_stats() or {}).get("bytes_limit")
        memory = f", {limit / GIB:.1f} GiB each" if limit else ", the host's memory"
        return jax.default_backend(), f"{len(there)} x {there[0].device_kind}{memory}"
    except (ImportError, RuntimeError) as error:  # JaxRuntimeError is a RuntimeError
        return "", f"none: {str(error).splitlines()[0]}"


def has_cuda() -> bool:
    """Returns whether jax's plugin for NVIDIA GPUs is installed, of any version of CUDA."""
    return any(map(importlib.util.find_spec, CUDA_PLUGINS))


def unused(backend: str) -> Iterator[str]:
    """Yields accelerators of this machine that jax doesn't use, and what to do."""
    forced = os.environ.get("JAX_PLATFORMS")
    asked = f" (JAX_PLATFORMS={forced} is set: unset it)" if forced else ""
    gpus = glob.glob("/dev/nvidia[0-9]*")
    if (gpus or shutil.which("nvidia-smi")) and backend != "gpu":
        yield f"{len(gpus) or 'an'} NVIDIA GPU(s), which jax doesn't use{asked}: " + (
            "check that nvidia-smi works" if has_cuda() else "pip install 'jax[cuda12]'"
        )
    chips = glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*")
    if chips and backend != "tpu":
        yield f"{len(chips)} device(s) such as {chips[0]}, perhaps TPUs, which jax doesn't use" + (
            f"{asked}: check that no other process does"
            if importlib.util.find_spec("libtpu")
            else f"{asked}: pip install 'jax[tpu]'"
        )


def report() -> Iterator[str]:
    """Yields the lines of the report."""
    backend, there = devices()
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    present = {module: bool(importlib.util.find_spec(module)) for module in OPTIONAL}
    present[CUDA_PLUGINS[0]] = has_cuda()
    absent = [OPTIONAL[module] for module in OPTIONAL if not present[module]]
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield f"vit_jax   {vit_jax.__version__} in {os.path.dirname(vit_jax.__file__)}"
    yield f"python    {platform.python_version()} on {platform.platform()}"
    yield f"packages  {versions()}"
    yield f"devices   {backend or 'no jax'}: {there}"
    yield f"host      {usable} CPUs, {pages / GIB:.1f} GiB of memory"
    yield f"disk      {shutil.disk_usage('.').free / GIB:.1f} GiB free in {os.getcwd()}"
    yield f"optional  {', '.join(m for m in present if present[m]) or 'nothing'}"
    yield from (f"          for {purpose}: pip install {package}" for purpose, package in absent)
    yield from (f"FOUND     {line}" for line in unused(backend))


def main(_) -> None:
    """Prints the report."""
    for line in report():
        print(line, flush=True)


if __name__ == "__main__":
    run(main)
