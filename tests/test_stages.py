"""A token schedule: one set of parameters, the same on every mesh, and after a kill."""

import dataclasses
import json
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.config import build
from vit_jax.costs.compiled import memory as account
from vit_jax.costs.topology import parse_topology
from vit_jax.data.pipeline import DataConfig, open_data, train_batches
from vit_jax.models.positions import rotary_angles, sincos_2d
from vit_jax.models.variants import ModelConfig, build_model
from vit_jax.parallel.lanes import make_lanes
from vit_jax.parallel.mesh import MeshConfig, make_mesh, put_batch, put_tree, use_mesh
from vit_jax.parallel.multihost import Preemption
from vit_jax.training import loop, plan
from vit_jax.training.memory import compile_step, fit_memory
from vit_jax.training.metrics import CLOCK, read_metrics
from vit_jax.training.programs import Programs
from vit_jax.training.recipe import TrainConfig, build_training
from vit_jax.training.stages import StageConfig, build_stages
from vit_jax.weights.adapt import adapt
from vit_jax.weights.trained import load

STAGES = ({"share": 0.5, "image_size": 8}, {"share": 0.25, "keep": 0.5}, {"share": 0.25})


def values(**changes):
    return {
        "model": {"variant": "ViT-mu/4", "dtype": "float32", "registers": 1},
        "data": {"dataset": "digits", "preprocess": "inception_crop|flip"},
        "image_size": 16,
        "batch_size": 16,
        "steps": 8,
        "schedule": {"peak": 1e-2, "warmup": 2},
        "optimizer": {"name": "muon"},
        "checkpoint": {"every": 100},
        "log_every": 1,
        "stages": STAGES,
        **changes,
    }


def random_params(model, seed=0):
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32) / 8, shapes)


def images(size, count=8):
    rng = np.random.default_rng(1)
    return rng.integers(0, 256, (count, size, size, 3)).astype(np.uint8)


def keys(count=8):
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(5), jnp.arange(count))


@pytest.mark.parametrize(
    ("options", "stage"),
    [
        ({}, StageConfig(1.0, patch=8)),
        ({"position_at": "layers", "scan": True}, StageConfig(1.0, image_size=24, patch=2)),
        ({"position": "learned_2d", "pool": "map"}, StageConfig(1.0, image_size=8)),
        ({"position": "none", "pool": "gap"}, StageConfig(1.0, image_size=8)),
    ],
)
def test_a_stage_is_the_adapted_model_and_gradients_pass(options, stage):
    config = ModelConfig("ViT-mu/4", depth=2, dtype="float32", registers=1, **options)
    model = build_model(config, 5, (16, 16))
    (found,) = build_stages([stage], model, 10)
    other = dataclasses.replace(config, variant=f"ViT-mu/{stage.patch or 4}")
    other = build_model(other, 5, (stage.image_size or 16,) * 2)
    params = random_params(model)
    target = jax.eval_shape(other.init, jax.random.key(0))
    adapted, _ = adapt(params, target, grid=other.grid, source_grid=model.grid, reinitialize=())
    x = images(other.image_size[0])
    expected = jax.jit(other.apply)(adapted, x).logits
    np.testing.assert_allclose(jax.jit(found.model.apply)(params, x).logits, expected, atol=1e-5)

    grads = jax.jit(jax.grad(lambda p: found.model.apply(p, x).logits.sum()))(params)
    chex.assert_trees_all_equal_shapes(grads, params)
    assert all(bool((g != 0).any()) for g in jax.tree.leaves(grads))


def test_fixed_positions_keep_their_corners():
    """The coordinates of a smaller grid run from corner to corner of the larger one."""
    for table, of in ((sincos_2d, lambda t: t[0]), (rotary_angles, lambda t: t)):
        large = of(table((5, 7), 16)).reshape(5, 7, -1)
        small = of(table((3, 4), 16, frame=(5, 7))).reshape(3, 4, -1)
        np.testing.assert_allclose(small[:, [0, 3]], large[::2][:, [0, 6]], atol=1e-6)
    model = build_model(ModelConfig("ViT-mu/4", position="rotary", dtype="float32"), 5, (16, 16))
    (stage,) = build_stages([StageConfig(1.0, image_size=8)], model, 10)
    assert stage.model.apply(random_params(model), images(8)).logits.shape == (8, 5)


def test_kept_tokens_are_a_random_subset_by_key():
    """Dropping changes what is computed, by the row's key alone; all tokens stay without keys."""
    model = build_model(ModelConfig("ViT-mu/4", pool="gap", dtype="float32"), 5, (16, 16))
    whole, half = build_stages([StageConfig(0.5), StageConfig(0.5, keep=0.5)], model, 10)
    assert (whole.tokens, half.tokens) == (16, 8)
    params, x = random_params(model), jnp.repeat(images(16, 1), 8, axis=0)
    logits = jax.jit(half.model.apply)(params, x, keys()).logits
    assert len(np.unique(np.round(logits, 4), axis=0)) == 8  # every row keeps others
    order = jnp.array([3, 1, 0, 2, 7, 6, 5, 4])
    again = jax.jit(half.model.apply)(params, x, keys()[order]).logits
    np.testing.assert_allclose(again, logits[order], atol=1e-6)
    full = jax.jit(model.apply)(params, x).logits
    np.testing.assert_allclose(jax.jit(half.model.apply)(params, x).logits, full, atol=1e-5)


DATA = MeshConfig()


def one_step(stage, mesh=DATA, devices=1, accumulation=1):
    config = build(
        TrainConfig, values(batch_size=32, accumulation=accumulation, stages=(), steps=4)
    )
    config = dataclasses.replace(
        config, mesh=dataclasses.replace(mesh, min_size=2**8), stages=(stage,)
    )
    mesh = make_mesh(config.mesh, jax.devices()[:devices])
    training = build_training(config, mesh, 10, 100)
    training = training.during(training.stages[0])
    state = {"params": random_params(training.model.full), "step": np.int32(3)}
    batch = {
        "image": images(training.model.image_size[0], 32),
        "label": np.arange(32, dtype=np.int32) % 10,
    }
    with use_mesh(mesh):
        state = jax.jit(
            lambda params: dataclasses.replace(
                jax.tree.map(jnp.zeros_like, training.shapes), params=params, step=jnp.int32(3)
            ),
            out_shardings=training.shardings,
        )(state["params"])
        batch = put_batch(mesh, batch)
        peak = put_tree(np.float32(1e-2), jax.sharding.NamedSharding(mesh, jax.P()))
        state, metrics = training.lower(state, batch).compile()(state, batch, peak)
        return jax.device_get((state.params, metrics["loss"], metrics["grad_norm"]))


@pytest.mark.slow
def test_every_mesh_and_accumulation_keeps_the_same_tokens():
    stage = StageConfig(1.0, image_size=24, keep=0.3, patch=6)
    expected = one_step(stage)
    for changes in (
        {"mesh": MeshConfig(data=2, fsdp=2, tensor=2), "devices": 8},
        {"accumulation": 4},
    ):
        chex.assert_trees_all_close(one_step(stage, **changes), expected, rtol=1e-4, atol=1e-5)


def run(workdir, **changes):
    config = build(TrainConfig, values(**changes))
    return loop.train(loop.prepare(config, str(workdir), lane=make_lanes(1)[0]))


@pytest.mark.long
def test_killed_around_a_change_of_stage(tmp_path, monkeypatch):
    """Ends bit-identical: killed before the change, at it, and after it."""
    cache = {"compilation_cache": str(tmp_path / "cache")}
    run(tmp_path / "whole", **cache)
    killed = tmp_path / "killed"
    for step in (3, 4, 5):
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            patch.setattr(Preemption, "reached", lambda self, done, step=step: done == step)
            run(killed, **cache)
    run(killed, **cache)
    ours, theirs = (load(folder).params for folder in (killed, tmp_path / "whole"))
    chex.assert_trees_all_equal(ours, theirs)
    ours, theirs = (
        [{k: v for k, v in r.items() if k not in CLOCK} for r in read_metrics(folder)]
        for folder in (killed, tmp_path / "whole")
    )
    assert ours == theirs
    # What it leaves is a run's like any other: of the recipe's size.
    assert load(tmp_path / "whole").image_size == (16, 16)
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["stages"][0]["share"] == 0.5


def test_the_next_program_is_compiled_meanwhile(tmp_path, monkeypatch):
    config = build(TrainConfig, values())
    prepared = loop.prepare(config, str(tmp_path), lane=make_lanes(1)[0])
    compiled = []

    def pretend(self, stage):
        time.sleep(0.2)
        compiled.append(stage.start)
        return lambda state, batch: stage.start

    monkeypatch.setattr(Programs, "_compile", pretend)
    first = put_batch(prepared.mesh, next(prepared.batches(0)))
    with Programs(prepared, first, 0, prepared.clock) as programs:
        time.sleep(0.5)
        assert compiled == [0, 4]
        began = time.perf_counter()
        assert [programs.at(step)(None, None) for step in range(8)] == [0] * 4 + [4] * 2 + [6] * 2
        assert 0.1 < time.perf_counter() - began < 0.35  # the last one's alone was waited for
    assert compiled == [0, 4, 6]


def test_steps_of_all_stages_are_measured(tmp_path, monkeypatch):
    """The mean of a run's steps, each stage by its share."""
    seconds = {0: 0.0, 4: 0.02, 6: 0.2}

    def pretend(self, stage):
        def step(state, batch):
            assert batch["image"].shape[1:3] == stage.model.image_size
            time.sleep(seconds[stage.start])
            return state, None

        return step

    monkeypatch.setattr(Programs, "_compile", pretend)
    config = build(TrainConfig, values())
    found, _ = loop.measure_step(
        loop.prepare(config, str(tmp_path), lane=make_lanes(1)[0]), steps=1
    )
    assert found >= 0.055


def test_the_host_decodes_at_the_size_of_the_stage():
    data = DataConfig("digits", preprocess="inception_crop")
    source = open_data(data)
    options = {"batch_size": 4, "seed": 3}
    mixed = train_batches(source, data, image_size={0: (8, 8), 2: (12, 12)}, **options)
    plain = train_batches(source, data, image_size=(12, 12), **options)
    batches = [(next(mixed), next(plain)) for _ in range(4)]
    assert [m["image"].shape[1] for m, _ in batches] == [8, 8, 12, 12]
    for number, (m, p) in enumerate(batches):
        np.testing.assert_array_equal(m["label"], p["label"])
        assert number < 2 or (m["image"] == p["image"]).all()
    mixed.close(), plain.close()


def test_flops_follow_the_stages():
    config = build(TrainConfig, values(steps=100))
    training = build_training(config, make_mesh(config.mesh, jax.devices()[:1]), 10, 100)
    each = [training.flops(step, step + 1) for step in (0, 60, 99)]
    assert each[0] < each[1] < each[2]
    assert training.flops(0, 100) == 50 * each[0] + 25 * each[1] + 25 * each[2]
    assert training.flops(40, 80) == 10 * each[0] + 25 * each[1] + 5 * each[2]
    assert [training.during(stage).steps for stage in training.stages] == [50, 25, 25]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": ({"share": 0.5}, {"share": 0.4})}, "shares 0.5, 0.4 add up to 0.9: expected 1"),
        ({"stages": ({"share": 1.0, "image_size": 15},)}, "stage 1 of 1: image size 15x15 is not"),
        ({"stages": ({"share": 1.0, "patch": 5},)}, "stage 1 of 1: image size 16x16 is not"),
        ({"stages": ({"share": 1.0, "keep": 0.01},)}, "keep = 0.01 of 4 x 4 patches leaves none"),
        ({"stages": ({"share": 1.0, "keep": 0.0},)}, "keep = 0.0: expected over 0"),
        ({"stages": ({"share": 1.5},)}, "share = 1.5: expected over 0"),
        ({"stages": ({"share": 1.0, "image_size": 0},)}, "image_size = 0: expected at least 1"),
        ({"stages": ({"share": 0.99}, {"share": 0.01}), "steps": 10}, "stage 2 of 2: share = 0.01"),
        ({"stages": ({"share": 1.0, "sise": 3},)}, "unknown field of config.stages"),
        ({"loss": {"name": "masked_patches"}}, "masked_patches predicts patches of one size"),
        (
            {"model": {"variant": "ViT-mu/4", "position": "relative"}},
            r"relative_embedding .* can't be resized to .*: leave image_size",
        ),
        (
            {"model": {"variant": "ViT-mu/4", "position": "rotary"}},
            "stage 2 of 3: keep = 0.5: position = 'rotary' at 'layers' needs all patches",
        ),
        (
            {"model": {"variant": "ViT-mu/4", "position_at": "shared"}},
            "position = 'learned_1d' at 'shared' needs all patches",
        ),
        (
            {"model": {"variant": "Mixer-S/8", "depth": 1}},
            r"token_mixing/Dense_0/kernel .* can't be resized",
        ),
        (
            {
                "model": {"variant": "R26x1"},
                "stages": ({"share": 1.0, "keep": 0.5},),
                "optimizer": {},
            },
            "only ViTs can drop patches, not R26x1",
        ),
        (
            {
                "model": {"variant": "R26x1"},
                "stages": ({"share": 1.0, "patch": 8},),
                "optimizer": {},
            },
            "patch = 8: only ViTs can change their patch size",
        ),
    ],
)
def test_stages_that_cannot_be(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        config = build(TrainConfig, values(**changes))
        loop.prepare(config, str(tmp_path), lane=make_lanes(1)[0])


def test_a_plan_adds_up_its_stages(monkeypatch):
    config = build(TrainConfig, values(steps=100, stop=60))
    training = build_training(config, make_mesh(config.mesh, jax.devices()[:1]), 10, 100)

    def planned(training, topology, mfu, price, whole):
        tokens = training.stages[0].tokens
        return {
            "flops": {"model": training.flops(*(training.stages[0].start + n for n in (0, 1)))},
            "memory_gib": {"peak": tokens, "fits": True},
            "run": {"from": "cycles", "step_seconds": tokens / 8},
            "compile_seconds": 1.0,
        }

    monkeypatch.setattr(plan, "_plan_stage", planned)
    report = plan.plan_step(training, parse_topology("v5e:2x2"), price=2.0)
    assert [(row["steps"], row["tokens"]) for row in report["stages"]] == [(50, 4), (10, 8)]
    assert report["memory_gib"]["peak"] == 8 and report["compile_seconds"] == 2
    assert report["run"]["steps"] == 60
    seconds = 50 * 4 / 8 + 10 * 8 / 8
    assert report["run"]["chip_hours"] == pytest.approx(4 * seconds / 3600)
    peak = parse_topology("v5e:2x2").chip.peak_flops * 4
    assert report["run"]["mfu"] == pytest.approx(training.flops(0, 60) / seconds / peak)


@pytest.mark.slow
def test_memory_is_fitted_for_all_stages():
    config = build(TrainConfig, values(stages=({"share": 0.5, "image_size": 32}, {"share": 0.5})))
    training = build_training(config, make_mesh(config.mesh, jax.devices()[:1]), 10, 100)
    small, large = (
        account(compile_step(training.during(stage))).peak for stage in training.stages[::-1]
    )
    assert small < large
    assert fit_memory(training, large)[:2] == (1, "none")
    assert fit_memory(training, (small + large) / 2)[:2] != (1, "none")
