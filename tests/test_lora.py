"""LoRA: it begins with no change, trains nothing else, and merges to the same numbers."""

import dataclasses

import jax
import numpy as np
import pytest
from processes import checkpoint_arrays, records

from vit_jax.classifier.recipe import TransferConfig, complete
from vit_jax.classifier.start import load_adapted, place_frozen, prepare
from vit_jax.config import build
from vit_jax.data.pipeline import DataConfig
from vit_jax.models import names
from vit_jax.models.lora import merge, merged_model
from vit_jax.models.stacking import flatten, stack_layers, unflatten, unstack, unstack_layers
from vit_jax.models.variants import ModelConfig, build_model
from vit_jax.parallel.lanes import Lane
from vit_jax.parallel.mesh import MeshConfig, make_mesh, state_shardings
from vit_jax.recipes import recipe
from vit_jax.training import loop
from vit_jax.training.optimizer import OptimizerConfig, ScheduleConfig
from vit_jax.training.recipe import build_training
from vit_jax.weights.trained import TrainedModel, load

ONLY_ADAPTERS = ((names.ADAPTERS, 1.0), (names.HEAD, 1.0), (".*", 0.0))


def adapted(scan=False, **fields):
    fields = {"depth": 2, "dtype": "float32", "lora_rank": 2, "lora_alpha": 6.0, **fields}
    return build_model(ModelConfig("ViT-mu/8", scan=scan, **fields), 10, (16, 16))


def first(model):
    return jax.device_get(jax.jit(model.init)(jax.random.key(0)))


def drawn(params):
    """Parameters without a zero among them."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda p: p + rng.normal(0, 0.1, p.shape).astype(np.float32), params)


@pytest.fixture
def pixels():
    return np.random.default_rng(1).integers(0, 256, (4, 16, 16, 3), np.uint8)


@pytest.mark.long
@pytest.mark.parametrize("fields", [{}, {"scan": True}, {"pool": "map", "parallel": True}])
def test_merged_numbers_are_equal_and_the_first_are_unchanged(fields, pixels):
    model = adapted(**fields)
    plain = merged_model(model)
    params = first(model)
    assert flatten(params)["Transformer/encoderblock_1/" + names.ATTENTION + "/out/lora_a"].any()
    merged, description = merge(params, model.description)
    assert description == plain.description
    assert jax.tree.structure(merged) == jax.tree.structure(
        jax.eval_shape(plain.init, jax.random.key(0))
    )
    without = {k: v for k, v in flatten(params).items() if "lora" not in k}
    jax.tree.map(np.testing.assert_array_equal, merged, unflatten(without))  # zero change

    params = drawn(params)
    expected = jax.jit(model.apply)(params, pixels)
    found = jax.jit(plain.apply)(merge(params, model.description)[0], pixels)
    np.testing.assert_allclose(found.features, expected.features, atol=1e-5)
    unchanged = jax.jit(plain.apply)(unflatten({k: flatten(params)[k] for k in without}), pixels)
    assert np.abs(unchanged.features - expected.features).max() > 0.01


def test_scanned_adapters_merge_as_unrolled_ones():
    looped, scanned = adapted(), adapted(scan=True)
    params = drawn(first(looped))
    merged, _ = merge(stack_layers(params, 2), scanned.description)
    expected, _ = merge(params, looped.description)
    jax.tree.map(np.testing.assert_array_equal, unstack_layers(merged), expected)


@pytest.mark.parametrize("format", ["orbax", "npz", "timm"])
def test_what_is_saved_is_merged(tmp_path, pixels, format):
    model = adapted()
    trained = TrainedModel(model, drawn(first(model)))
    path = tmp_path / ("model.npz" if format == "npz" else "model")
    trained.save(path, format)
    again = load(path)
    assert again.config.lora_rank == 0 and not any("lora" in name for name in flatten(again.params))
    np.testing.assert_allclose(
        dataclasses.replace(again, architecture=merged_model(model)).logits(pixels),
        trained.logits(pixels),
        atol=1e-5,
    )


def test_adapters_lie_where_their_matrices_do():
    model = adapted(width=16, num_heads=4)
    config = MeshConfig(fsdp=2, tensor=2, min_size=1)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    placed = flatten(state_shardings(make_mesh(config), config, shapes))
    specs = {name: tuple(sharding.spec) for name, sharding in placed.items()}
    at = f"Transformer/encoderblock_0/{names.ATTENTION}"
    assert specs[f"{at}/query/kernel"] == ("fsdp", "tensor")
    assert specs[f"{at}/query/lora_a"] == ("fsdp",)
    assert specs[f"{at}/query/lora_b"][1] == "tensor"
    assert specs[f"{at}/out/lora_a"][0] == specs[f"{at}/out/kernel"][0] == "tensor"


def config(init="", **fields):
    model = {"depth": 2, "dtype": "float32", "lora_rank": 2, **fields.pop("model", {})}
    return TransferConfig(
        model=ModelConfig("ViT-mu/8", **model),
        data=DataConfig("digits", "train", num_threads=1),
        image_size=8,
        batch_size=16,
        schedule=ScheduleConfig(1e-2, warmup=1),
        optimizer=OptimizerConfig(lr_multipliers=ONLY_ADAPTERS, weight_decay=0.05),
        steps=4,
        init=init,
        **fields,
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model of two blocks to start from."""
    model = build_model(ModelConfig("ViT-mu/8", depth=2, dtype="float32"), 7, (8, 8))
    params = first(model)
    path = tmp_path_factory.mktemp("checkpoint") / "model"
    TrainedModel(model, params).save(path)
    return path


@pytest.mark.long
def test_a_run_trains_its_adapters_and_resumes_to_the_same_bits(checkpoint, tmp_path, monkeypatch):
    """With a scan of one block; the second one is outside of it."""
    whole, one = config(str(checkpoint), model={"scan": True}), Lane((jax.devices()[0],))
    loop.train(prepare(whole, str(tmp_path / "whole"), lane=one))
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(loop.Preemption, "reached", lambda self, step: step == 2)
        loop.train(prepare(whole, str(tmp_path / "parts"), lane=one))
    run = prepare(whole, str(tmp_path / "parts"), lane=one)
    assert run.resumes
    loop.train(run)
    arrays, again = checkpoint_arrays(tmp_path / "whole"), checkpoint_arrays(tmp_path / "parts")
    assert arrays.keys() == again.keys()
    for name in arrays:
        np.testing.assert_array_equal(again[name], arrays[name], err_msg=name)
    assert records(tmp_path / "whole")[-1] == records(tmp_path / "parts")[-1]

    moments = [name for name in arrays if "['mu']" in name]
    assert moments and all("lora_" in name or "['head']" in name for name in moments)
    changed = {k for k in arrays if k.startswith("params") and "lora_b" in k and arrays[k].any()}
    assert len(changed) == 8  # of two blocks, scanned blocks being all but the last
    source, trained = load(checkpoint), load(tmp_path / "whole")
    before, after = flatten(source.params), flatten(trained.params)
    before, after = unstack(before), unstack(after)
    assert before.keys() == after.keys()
    same = {k for k in before if k in after and np.array_equal(before[k], after[k])}
    moved = {k for k in before if k in after} - same
    assert all(names.ATTENTION in k or k.startswith("head") for k in moved)
    assert all(k.endswith("/kernel") for k in moved if "head" not in k) and len(same) > 10

    # The loaded model computes as the run's own, whose adapters aren't merged.
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)
    params = {}
    for name, array in arrays.items():
        if name.startswith("params"):
            params["/".join(name.removeprefix("params")[2:-2].split("']['"))] = array
    expected = jax.jit(run.model.apply)(unflatten(params), images).logits
    np.testing.assert_allclose(trained.logits(images), expected, atol=1e-6)


def test_the_recipe(checkpoint, tmp_path):
    values = recipe("transfer/folder:train=lora,rank=4", data={"dataset": "digits"}).to_dict()
    found = build(TransferConfig, complete({**values, "init": str(checkpoint)}))
    assert (found.model.lora_rank, found.model.lora_alpha) == (4, 16.0)
    assert found.optimizer.name == "adamw" and found.model.depth == 2
    training = build_training(found, make_mesh(found.mesh), 10, 100)
    moments = flatten(training.shapes.opt_state)
    assert any("lora_a" in name for name in moments)
    for argument in ("rank=4", "train=attention,alpha=2.0"):
        with pytest.raises(ValueError, match="only with train=lora"):
            recipe(f"transfer/folder:{argument}")
    with pytest.raises(ValueError, match="lora_rank = -1"):
        adapted(lora_rank=-1)
    with pytest.raises(ValueError, match="Mixer-B/16 doesn't have this field"):
        build_model(ModelConfig("Mixer-B/16", lora_rank=2), 10, (224, 224))


def test_a_probed_head_needs_no_adapters(checkpoint):
    """The features that it is fitted to are the checkpoint's: nothing else is fresh."""
    found = config(str(checkpoint), head="probe")
    mesh = make_mesh(found.mesh)
    training = build_training(found, mesh, 10, 100)
    params = load_adapted(found, training.model, training.shapes.params)
    placed = flatten(jax.device_get(place_frozen(found, params, mesh)))
    assert not any(leaf.any() for name, leaf in placed.items() if "lora" in name or "head/" in name)
    for name, leaf in flatten(load(checkpoint).params).items():
        if not name.startswith("head/"):
            np.testing.assert_array_equal(placed[name], leaf)
