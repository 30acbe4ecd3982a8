"""The width rule: changes of activations don't depend on the width, and off it leaves no trace."""

import dataclasses
from functools import partial

import chex
import jax
import numpy as np
import pytest

from vit_jax.data.pipeline import DataConfig
from vit_jax.models.stacking import unstack_layers
from vit_jax.models.variants import ModelConfig
from vit_jax.parallel.mesh import MeshConfig, make_mesh, path_name, put_batch, use_mesh
from vit_jax.training.optimizer import OptimizerConfig, ScheduleConfig
from vit_jax.training.recipe import TrainConfig, build_training
from vit_jax.training.step import init_state

BASE = 64
MUP = {"width_rule": "mup", "base_width": BASE}
AT = (1, 5, 10)  # steps
RATES = {"adamw": 3e-3, "adafactor": 3e-3, "muon": 3e-3, "sgd": 0.1}


def recipe(width, optimizer=None, mesh=None, variant="ViT-nano/8", **model):
    optimizer = {"name": "adamw", **(optimizer or {})}
    sizes = {"width": width, "depth": 2, "num_heads": 4, "mlp_dim": 4 * width, "dtype": "float32"}
    return TrainConfig(
        model=ModelConfig(variant, **{**sizes, **model}),
        data=DataConfig("digits"),
        image_size=16,
        batch_size=16,
        schedule=ScheduleConfig(RATES[optimizer["name"]], warmup=0, decay="constant"),
        steps=AT[-1],
        optimizer=OptimizerConfig(**optimizer),
        mesh=mesh or MeshConfig(),
    )


def build(config, devices=1):
    return build_training(config, make_mesh(config.mesh, jax.devices()[:devices]), 10, 100)


def images_and_labels():
    rng, labels = np.random.default_rng(0), np.arange(16, dtype=np.int32) % 10
    classes = rng.normal(0, 60, (10, 16, 16, 3))[labels]
    pixels = rng.normal(128, 40, classes.shape) + classes
    return {"image": np.clip(pixels, 0, 255).astype(np.uint8), "label": labels}


def states(config, devices=1):
    """Yields the training, then its state before the first step and after each."""
    training, batch = build(config, devices), images_and_labels()
    yield training
    peak = np.float32(config.schedule.peak)
    with use_mesh(training.mesh):
        init = partial(init_state, training, training.optimizer, use_ema=False)
        state = jax.jit(init, out_shardings=training.shardings)(jax.random.key(0))
        step = training.lower(state, put_batch(training.mesh, batch)).compile()
        yield jax.device_get(state)
        for _ in range(config.steps):
            state, _ = step(state, put_batch(training.mesh, batch), peak)
            yield jax.device_get(state)


def changes(config):
    """Returns {step: root mean squares of changes since step 0: blocks, final norm, logits}."""
    training, *history = states(config)
    images = images_and_labels()["image"]

    @jax.jit
    def activations(params):
        inside = training.model.intermediates(params, images)
        features = inside["encoded"][:, 0]  # of the class token
        return *inside["blocks"], features, features @ params["head"]["kernel"]

    with use_mesh(training.mesh):
        first, *later = (jax.device_get(activations(history[t].params)) for t in (0, *AT))
    return {
        t: [float(np.sqrt(np.mean((b - a) ** 2))) for a, b in zip(first, now, strict=True)]
        for t, now in zip(AT, later, strict=True)
    }


def growth(narrow, wide):
    """The largest and smallest ratio of two models' changes; the zero head hides the first step."""
    ratios = []
    for t in AT:
        pairs = zip(narrow[t], wide[t], strict=True)
        ratios += [b / a for a, b in pairs if t > 1 or a > 0]
    assert len(ratios) == 4 * len(AT) - 3
    return max(ratios), min(ratios)


@pytest.mark.parametrize(
    ("name", "width", "model"),
    [
        pytest.param("adamw", 512, {}, marks=pytest.mark.long),
        pytest.param("sgd", 512, {}, marks=pytest.mark.slow),
        pytest.param("muon", 512, {}, marks=pytest.mark.slow),
        pytest.param("adafactor", 512, {}, marks=pytest.mark.slow),
        pytest.param("adamw", 512, {"qk_norm": True}, marks=pytest.mark.slow),
        pytest.param("adamw", 1024, {}, marks=pytest.mark.slow),
    ],
)
def test_coordinate_check(name, width, model):
    at_base = changes(recipe(BASE, {"name": name, **MUP}, **model))
    largest, smallest = growth(at_base, changes(recipe(width, {"name": name, **MUP}, **model)))
    assert largest < 2 and smallest > 1 / 2
    largest, smallest = growth(at_base, changes(recipe(width, {"name": name}, **model)))
    assert largest > 2 or smallest < 1 / 2


def test_at_the_base_nothing_changes():
    base = {"width_rule": "mup", "base_width": 16}
    _, *plain = states(dataclasses.replace(recipe(16, depth=1), steps=2))
    _, *ruled = states(dataclasses.replace(recipe(16, base, depth=1), steps=2))
    for a, b in zip(plain, ruled, strict=True):
        chex.assert_trees_all_equal(a.params, b.params)


def test_scan_and_mesh_change_no_number():
    """Scanned on 4 x 2 devices and unrolled on one, the parameters are the same."""
    # Gradients of the keys' biases are roundings, which AdamW scales up without a larger epsilon.
    optimizer = {"width_rule": "mup", "base_width": 16, "eps": 1e-6, "weight_decay": 0.1}
    mesh = MeshConfig(data=4, fsdp=2, min_size=2**8)
    ends = []
    for config, devices in (
        (recipe(32, optimizer), 1),
        (recipe(32, optimizer, mesh, scan=True), 8),
    ):
        *_, end = states(dataclasses.replace(config, steps=5), devices)
        ends.append(unstack_layers(end.params) if config.model.scan else end.params)
    chex.assert_trees_all_close(*ends, atol=1e-5, rtol=0)


def factors(name="adamw", base_width=64, base_heads=None, width=256, **model):
    optimizer = {"name": name, **MUP, "base_width": base_width, "base_heads": base_heads}
    training = build(recipe(width, optimizer, **{"depth": 1, **model}))
    leaves = (jax.tree_util.tree_leaves_with_path(tree) for tree in training.width)
    return {
        path_name(path): (initial, gradient**2, update)
        for (path, initial), (_, gradient), (_, update) in zip(*leaves, strict=True)
    }


def test_factors():
    """Table 8 for a width of 4 times the base's: initial value, SGD's rate, Adam's rate."""
    block, attention = "Transformer/encoderblock_0/", "MultiHeadDotProductAttention_0/"
    found = factors(pool="map", representation_size=100)
    expected = {
        "embedding/kernel": (1, 4, 1),
        "pos_embedding": (1, 4, 1),
        f"{block}LayerNorm_0/scale": (1, 4, 1),
        f"{block}MlpBlock_0/Dense_0/kernel": (1, 1, 1 / 4),
        f"{block}MlpBlock_0/Dense_1/kernel": (1, 1, 1 / 4),
        f"{block}MlpBlock_0/Dense_1/bias": (1, 4, 1),
        f"{block}{attention}key/kernel": (1, 1, 1 / 4),
        f"{block}{attention}out/kernel": (1, 1, 1 / 4),
        f"{block}{attention}query/kernel": (1 / 2, 1 / 4, 1 / 8),
        f"{block}{attention}query/bias": (1 / 2, 1, 1 / 2),
        f"MAPHead_0/{attention}query/kernel": (1 / 2, 1 / 4, 1 / 8),
        "MAPHead_0/probe": (2, 4, 1),
        "pre_logits/kernel": (1 / 2, 1 / 4, 1 / 4),
        "head/kernel": (1, 1, 1),  # reads the 100 features at every width
    }
    for name, numbers in expected.items():
        assert found[name] == pytest.approx(numbers), name
    assert factors()["head/kernel"] == pytest.approx((1 / 2, 1 / 4, 1 / 4))
    # Heads of the same width: attention's scale stays.
    more_heads = factors(base_heads=1)[f"{block}{attention}query/kernel"]
    assert more_heads == pytest.approx((1, 1, 1 / 4))
    # A norm undoes the kernel's scale, so that its own takes the factor.
    normed = factors(qk_norm=True)
    assert normed[f"{block}{attention}query/kernel"] == pytest.approx((1, 1, 1 / 4))
    assert normed[f"{block}{attention}query_norm/scale"] == pytest.approx((1 / 2, 1, 1 / 2))
    # SGD's updates have the square root of its rate, the gradients the other.
    assert factors("sgd")["head/kernel"][2] == pytest.approx(1 / 2)
    # Muon's matrices: 0.2 sqrt(longer side) times an orthogonal matrix; AdamW has the rest.
    muon = factors("muon", width=256, mlp_dim=1024)
    assert muon[f"{block}MlpBlock_0/Dense_0/kernel"] == pytest.approx((1, 1, 1 / 2))
    assert muon[f"{block}{attention}query/kernel"] == pytest.approx((1 / 2, 1 / 4, 1 / 4))
    assert muon["head/kernel"][2] == 1 / 4 and muon["pos_embedding"] == (1, 4, 1)
    # A hybrid's stem doesn't grow, its Transformer does.
    hybrid = factors(variant="R26+ViT-Ti/32", stages=(1,), stem_width=32)
    assert hybrid["conv_root/kernel"] == (1, 1, 1) and hybrid["embedding/kernel"] == (1, 4, 1)
    assert hybrid[f"{block}MlpBlock_0/Dense_0/kernel"] == (1, 1, 1 / 4)


def test_attention_has_the_scale_of_the_rule():
    """With the folded query, scores are sqrt(K_base) / K * q . k of the query that isn't."""
    plain, ruled = (build(recipe(256, optimizer, depth=1)) for optimizer in ({}, MUP))
    query = [
        jax.jit(t.init)(jax.random.key(0))["Transformer"]["encoderblock_0"][
            "MultiHeadDotProductAttention_0"
        ]["query"]["kernel"]
        for t in (plain, ruled)
    ]
    width, base = 256 // 4, BASE // 4
    np.testing.assert_allclose(query[1] / width**0.5, query[0] * base**0.5 / width, rtol=1e-6)
    assert plain.model == ruled.model  # an ordinary ViT


@pytest.mark.parametrize(
    ("width", "optimizer", "model", "message"),
    [
        (64, {"width_rule": "mup"}, {}, "a rule needs base_width"),
        (64, {"base_width": 64}, {}, "a rule needs base_width"),
        (64, {"base_heads": 4}, {}, "a rule needs base_width"),
        (64, {"width_rule": "sp", "base_width": 64}, {}, "width_rule 'sp'"),
        (64, {"width_rule": "mup", "base_width": 0}, {}, "base_width=0: expected at least 1"),
        (64, {"width_rule": "mup", "base_width": 66}, {}, "66 does not divide into the base's 4"),
        (64, MUP | {"base_heads": 5}, {}, "64 does not divide into the base's 5 heads"),
        (66, MUP, {}, "width 66 does not divide into 4 heads"),
        (64, MUP | {"base_width": 36}, {"position": "rotary"}, "= 36 makes no base: .* rotary"),
    ],
)
def test_bad_rules(width, optimizer, model, message):
    with pytest.raises(ValueError, match=message):
        build(recipe(width, optimizer, **model))


@pytest.mark.parametrize("variant", ["R50x1", "Mixer-S/16"])
def test_families_without_a_rule(variant):
    config = recipe(64, MUP)
    config = dataclasses.replace(config, model=ModelConfig(variant))
    with pytest.raises(ValueError, match=f"{variant} has no rule, only ViTs and hybrids do"):
        build(config)
