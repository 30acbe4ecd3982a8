"""Eight CPU devices, so that every test can use a mesh; golden files; small models."""

import importlib.metadata
import os
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of the suite's time goes into compiling small programs: LLVM does not optimise them here. Up
# to jax 0.10 XLA also has older emitters, which compile in less than half of the time.
FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) <= (0, 10):
    FLAGS += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", FLAGS)
# Compiled programs are kept for the session, so that the commands that tests start over and over
# don't compile the same step each time. Worker processes of the tests inherit the folder.
CACHE = tempfile.TemporaryDirectory(prefix="vit_jax_tests_")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", CACHE.name)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

import jax
import numpy as np
import pytest

jax.config.update("jax_num_cpu_devices", 8)

from vit_jax.models.variants import ModelConfig, build_model

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def model():
    """Returns a small model for the digits' size and classes."""
    return build_model(ModelConfig("ViT-mu/8", dtype="float32"), 10, (8, 8))


@pytest.fixture(scope="session")
def params(model):
    """Returns the model's parameters, with a random head instead of zeros."""
    params = jax.jit(model.init)(jax.random.key(0))
    kernel = jax.random.normal(jax.random.key(1), params["head"]["kernel"].shape)
    return jax.device_get({**params, "head": {**params["head"], "kernel": kernel}})


@pytest.fixture
def golden():
    """Reads a golden file: (parameters under published names, inputs and outputs)."""

    def read(name: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        with np.load(GOLDEN / f"{name}.npz") as file:
            arrays = dict(file)
        return tuple(
            {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
            for prefix in ("params/", "io/")
        )

    return read
