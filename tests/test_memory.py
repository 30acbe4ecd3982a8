"""Microbatches and remat, chosen by the compiled program's memory."""

import dataclasses

import jax
import pytest

from vit_jax.costs.compiled import memory
from vit_jax.data.pipeline import DataConfig
from vit_jax.models.variants import ModelConfig
from vit_jax.parallel.mesh import MeshConfig, make_mesh
from vit_jax.training.augmentation import AugmentationConfig
from vit_jax.training.memory import compile_step, device_memory, fit_memory
from vit_jax.training.optimizer import ScheduleConfig
from vit_jax.training.recipe import TrainConfig, build_training

MIXUP = AugmentationConfig(mixup=0.2)


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


@pytest.mark.long
def test_microbatches_make_it_fit(training, whole):
    capacity = whole.arguments + 0.6 * (whole.peak - whole.arguments)
    accumulation, remat, found = fit_memory(training, capacity)
    assert accumulation > 1 and remat == "none" and f"in {accumulation} microbatch" in found
    fitted = dataclasses.replace(training.config, accumulation=accumulation)
    rebuilt = build_training(fitted, training.mesh, 10, 100)
    assert memory(compile_step(rebuilt)).peak <= capacity


@pytest.mark.parametrize(
    ("planned", "devices", "changes", "microbatches"),
    [
        ({"devices": 8}, 8, {}, 1),
        ({"devices": 8}, 4, {}, 2),
        ({"devices": 8, "tensor": 2}, 4, {}, 2),
        ({"devices": 32, "fsdp": 8}, 8, {"accumulation": 2}, 8),
        ({"devices": 8}, 6, {"batch_size": 240}, 2),  # 20 rows a device: at most 30
        ({"devices": 8}, 5, {"batch_size": 280}, 2),
        ({"devices": 3}, 2, {"batch_size": 300, "augmentation": MIXUP}, 2),  # 2 x 75: even
        ({"devices": 4}, 2, {"batch_size": 300, "augmentation": MIXUP}, 2),
        ({"devices": 4}, 8, {}, 1),
        ({}, 2, {}, 1),
    ],
)
def test_fewer_devices_take_more_microbatches(training, planned, devices, changes, microbatches):
    """With no more rows of a microbatch on each than on as many as the recipe is made for."""
    config = dataclasses.replace(training.config, mesh=MeshConfig(**planned), **changes)
    mesh = make_mesh(config.mesh, jax.devices()[:devices])
    assert build_training(config, mesh, 10, 100).config.accumulation == microbatches


@pytest.mark.slow
def test_what_cannot_fit(training, whole):
    with pytest.raises(
        ValueError, match=r"in any way that was tried(.|\n)*remat full(.|\n)*a smaller model"
    ):
        fit_memory(training, whole.arguments / 2)
