"""Microbatches and remat, chosen by the compiled program's memory."""

import dataclasses

import pytest

from vit_jax.costs.compiled import memory
from vit_jax.data.pipeline import DataConfig
from vit_jax.models.variants import ModelConfig
from vit_jax.parallel.mesh import MeshConfig, make_mesh
from vit_jax.training.memory import compile_step, device_memory, fit_memory
from vit_jax.training.optimizer import ScheduleConfig
from vit_jax.training.recipe import TrainConfig, build_training


@pytest.fixture(scope="module")
def training():
    config = TrainConfig(
        ModelConfig("ViT-mu/8", depth=2, dtype="float32"),
        DataConfig("digits"),
        image_size=32,
        batch_size=256,
        schedule=ScheduleConfig(0.1, warmup=0),
        steps=4,
    )
    return build_training(config, make_mesh(MeshConfig()), 10, 100)


@pytest.fixture(scope="module")
def whole(training):
    """Returns the memory without microbatches and remat."""
    return memory(compile_step(training))


def test_what_fits_is_left_alone(training, whole):
    assert fit_memory(training, whole.peak)[:2] == (1, "none")
    assert device_memory() > whole.peak


def test_microbatches_make_it_fit(training, whole):
    capacity = whole.arguments + 0.6 * (whole.peak - whole.arguments)
    accumulation, remat, found = fit_memory(training, capacity)
    assert accumulation > 1 and remat == "none" and f"in {accumulation} microbatch" in found
    fitted = dataclasses.replace(training.config, accumulation=accumulation)
    rebuilt = build_training(fitted, training.mesh, 10, 100)
    assert memory(compile_step(rebuilt)).peak <= capacity


@pytest.mark.slow
def test_what_cannot_fit(training, whole):
    with pytest.raises(
        ValueError, match=r"in any way that was tried(.|\n)*remat full(.|\n)*a smaller model"
    ):
        fit_memory(training, whole.arguments / 2)
