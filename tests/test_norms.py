"""Norms of layers: the same on every mesh, scanned, accumulated; recorded on schedule."""

import dataclasses
import json
from functools import cache

import jax
import numpy as np
import pytest

from vit_jax.data.pipeline import DataConfig
from vit_jax.models.stacking import stack_layers
from vit_jax.models.variants import ModelConfig, build_model
from vit_jax.parallel.mesh import MeshConfig, make_mesh, put_batch, put_tree, use_mesh
from vit_jax.training.loop import pretrain
from vit_jax.training.metrics import read_metrics
from vit_jax.training.norms import layer_norms
from vit_jax.training.optimizer import OptimizerConfig, ScheduleConfig
from vit_jax.training.recipe import TrainConfig, build_training
from vit_jax.training.step import start_state

BLOCKS = {f"Transformer/encoderblock_{i}" for i in range(3)}
CONFIG = TrainConfig(
    model=ModelConfig(
        "ViT-nano/8", width=32, depth=3, num_heads=2, mlp_dim=64, dtype="float32", dropout=0.1
    ),
    data=DataConfig("digits"),
    image_size=16,
    batch_size=16,
    schedule=ScheduleConfig(peak=1e-3, warmup=0),
    optimizer=OptimizerConfig(),
    steps=4,
)


@cache
def initial_params():
    params = jax.jit(build_model(CONFIG.model, 5, (16, 16)).init)(jax.random.key(0))
    params["head"]["kernel"] += jax.random.normal(jax.random.key(1), (32, 5))
    return params


def norms(accumulation=1, mesh=(1, 1, 1), **model):
    """Takes a step from the same parameters: its metrics with the norms."""
    sharded = MeshConfig(*mesh, min_size=2**8)
    model = dataclasses.replace(CONFIG.model, **model)
    config = dataclasses.replace(CONFIG, model=model, mesh=sharded, accumulation=accumulation)
    mesh = make_mesh(sharded, jax.devices()[: np.prod(mesh)])
    training = build_training(config, mesh, num_classes=5, num_examples=16)
    params = initial_params()
    params = stack_layers(params, 3) if model.scan else params
    state = jax.device_get(start_state(params, training.optimizer, use_ema=False))
    images = np.random.default_rng(0).integers(0, 256, (16, 16, 16, 3)).astype(np.uint8)
    batch = {"image": images, "label": np.arange(16, dtype=np.int32) % 5}
    with use_mesh(mesh):
        state, batch = put_tree(state, training.shardings), put_batch(mesh, batch)
        step = training.lower(state, batch, layer_norms).compile()
        return jax.device_get(step(state, batch, np.float32(1e-3))[1])


@pytest.fixture(scope="module")
def plain():
    return norms()


def test_norms_add_up(plain):
    kinds = {kind: {k: v for k, v in plain.items() if k.startswith(f"{kind} ")} for kind in
             ("gradient", "update", "activation")}  # fmt: skip
    assert {k.removeprefix("activation ") for k in kinds["activation"]} == BLOCKS
    for kind, total in (("gradient", "grad_norm"), ("update", "update_norm")):
        assert {k.removeprefix(f"{kind} ") for k in kinds[kind]} > BLOCKS | {"head", "embedding"}
        squares = sum(value**2 for value in kinds[kind].values())
        assert squares**0.5 == pytest.approx(plain[total], rel=1e-5)
    assert all(value > 0 for value in kinds["activation"].values())


@pytest.mark.long
@pytest.mark.parametrize(
    "options",
    [
        {"mesh": (2, 2, 2)},
        {"scan": True, "accumulation": 4, "mesh": (1, 4, 1)},
    ],
    ids=str,
)
def test_norms_do_not_depend_on_how_a_step_is_computed(plain, options):
    found = norms(**options)
    assert found.keys() == plain.keys()
    for name, value in plain.items():
        np.testing.assert_allclose(found[name], value, rtol=2e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("variant", "layers"), [("R26x1", {"block1/unit1", "block4/unit2"}), ("Mixer-B/16", set())]
)
def test_other_families_have_blocks_too(variant, layers):
    model = build_model(ModelConfig(variant), 5, (32, 32))
    measuring = dataclasses.replace(model, measures=True)
    params, images = jax.eval_shape(model.init, jax.random.key(0)), np.zeros((2, 32, 32, 3))
    squares = jax.eval_shape(lambda params: measuring.apply(params, images).squares, params)
    given = (params, params, squares)
    found = jax.eval_shape(layer_norms, *given)
    layers = layers or {f"MixerBlock_{i}" for i in range(12)}
    for kind in ("gradient", "update", "activation"):
        assert {f"{kind} {layer}" for layer in layers} <= found.keys()


@pytest.mark.long
def test_they_are_recorded_on_schedule(tmp_path):
    """Every second step has them; the others' values, and what is learned, stay as they are."""
    recipe = dataclasses.replace(CONFIG, data=DataConfig("synthetic"), log_every=1)
    recipe = dataclasses.replace(recipe, compilation_cache="none")
    with_norms, without = tmp_path / "with", tmp_path / "without"
    pretrain(dataclasses.replace(recipe, log_norms_every=2), with_norms)
    pretrain(recipe, without)
    records = read_metrics(with_norms)
    noted = [r for r in records if "gradient Transformer.encoderblock_0" in r]
    assert [r["step"] for r in noted] == [2, 4]
    assert not any("/" in name for r in noted for name in r)  # as in evaluations' names
    losses = [
        [r["loss"] for r in read_metrics(folder) if "loss" in r] for folder in (with_norms, without)
    ]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    config = json.loads((with_norms / "config.json").read_text())
    assert config["log_norms_every"] == 2
