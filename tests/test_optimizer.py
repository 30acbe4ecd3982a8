"""Schedules against closed forms, optimizers against the textbooks' formulas in float64."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vit_jax.models.stacking import stack_layers
from vit_jax.models.variants import ModelConfig, build_model
from vit_jax.parallel.mesh import path_name
from vit_jax.training.optimizer import (
    OptimizerConfig,
    ScheduleConfig,
    make_optimizer,
    make_schedule,
    match_rules,
)

# Exact in binary, so that float32 and the float64 references differ by roundings only.
RATES = np.array([0.25, 0.5, 0.375, 0.125, 0.0625])
EXACT = OptimizerConfig(b1=0.875, b2=0.984375, eps=2.0**-20, clip_norm=None)
DECAYED = (("head/kernel", 1.0), (".*", 0.0))


def stepwise(step):
    return jnp.asarray(RATES, jnp.float32)[step]


def tree(seed, shape=(8, 4)):
    """Makes parameters or gradients: float32 {"stem": {"kernel"}, "head": {"kernel", "bias"}}."""
    rng = np.random.default_rng(seed)
    stem, kernel, bias = (rng.normal(size=s).astype(np.float32) for s in (shape, shape, shape[1:]))
    return {"stem": {"kernel": stem}, "head": {"kernel": kernel, "bias": bias}}


def train(config, *, steps=5, grads=lambda t: tree(1 + t), params=None, peak=0.5):
    """Runs jitted updates; returns parameters after 0 to `steps` updates, and the last state."""
    params = jax.tree.map(jnp.asarray, tree(0) if params is None else params)
    optimizer = make_optimizer(config, stepwise, peak, params)
    state, history = optimizer.init(params), [params]

    @jax.jit
    def update(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for t in range(steps):
        params, state = update(params, state, grads(t))
        history.append(params)
    return history, state


def head_kernel(params):
    return np.asarray(params["head"]["kernel"], np.float64)


def paths_and_leaves(state):
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    return [(path_name(k), leaf) for k, leaf in leaves]


def assert_trees_equal(a, b):
    chex.assert_trees_all_equal(a, b)


# ---- schedules


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            ScheduleConfig(peak=0.5, warmup=10, decay="constant"),
            {0: 0, 1: 0.05, 5: 0.25, 10: 0.5, 60: 0.5, 110: 0.5},
        ),
        (
            ScheduleConfig(peak=0.5, warmup=10, decay="constant", cooldown=40, end=0.1),
            {0: 0, 1: 0.05, 10: 0.5, 70: 0.5, 80: 0.4, 90: 0.3, 110: 0.1, 200: 0.1},
        ),
        (
            ScheduleConfig(peak=0.5, warmup=10, decay="linear", end=0.1),
            {0: 0, 1: 0.05, 10: 0.5, 35: 0.4, 60: 0.3, 110: 0.1, 200: 0.1},
        ),
        (
            ScheduleConfig(peak=0.5, warmup=10, decay="cosine"),
            {0: 0, 1: 0.05, 10: 0.5, 35: 0.25 * (1 + 0.5**0.5), 60: 0.25, 110: 0, 200: 0},
        ),
        (
            ScheduleConfig(peak=0.5, warmup=0, decay="cosine", end=0.1),
            {0: 0.5, 1: 0.3 + 0.2 * np.cos(np.pi / 110), 55: 0.3, 110: 0.1},
        ),
        (
            ScheduleConfig(peak=0.5, warmup=10, decay="rsqrt", timescale=20),
            {0: 0, 1: 0.05, 10: 0.5, 30: 0.5 / 2**0.5, 70: 0.25, 110: 0.5 / 6**0.5},
        ),
        (
            ScheduleConfig(peak=0.5, warmup=10, decay="rsqrt", timescale=20, cooldown=80),
            {0: 0, 10: 0.5, 30: 0.5 / 2**0.5, 70: 0.125, 110: 0, 200: 0},
        ),
        (  # BiT's 90 epochs
            ScheduleConfig(peak=0.5, warmup=10, decay="staircase", drops=(3 / 9, 6 / 9, 8 / 9)),
            {0: 0, 1: 0.05, 36: 0.5, 37: 0.05, 72: 0.05, 73: 5e-3, 97: 5e-3, 98: 5e-4, 110: 5e-4},
        ),
    ],
)
def test_schedule_closed_form(config, expected):
    schedule = jax.jit(make_schedule(config, 110))
    rates = schedule(jnp.array(list(expected)))
    assert rates.dtype == jnp.float32
    np.testing.assert_allclose(rates, list(expected.values()), rtol=3e-7, atol=6e-8)
    assert rates[0] == expected[0]  # exactly 0 where it is 0


@pytest.mark.parametrize("decay", ["constant", "linear", "cosine", "rsqrt"])
def test_schedule_rises_then_falls(decay):
    cooldown = 50 if decay in ("constant", "rsqrt") else 0
    config = ScheduleConfig(peak=3e-3, warmup=100, decay=decay, timescale=70, cooldown=cooldown)
    rates = np.asarray(make_schedule(config, 1000)(np.arange(1001)))
    change = np.diff(rates)
    assert np.argmax(rates) == 100
    assert rates[100] == np.float32(3e-3)
    assert np.all(change[:100] > 0)
    assert np.all(change[100:] <= 0)
    assert np.all(change[950:] < 0)
    assert rates[-1] == 0


@pytest.mark.parametrize("decay", ["constant", "rsqrt"])
def test_before_the_cooldown_the_length_does_not_matter(decay):
    config = ScheduleConfig(peak=1e-3, warmup=100, decay=decay, cooldown=200)
    steps = np.arange(801)
    short, long = make_schedule(config, 1000)(steps), make_schedule(config, 5000)(steps)
    np.testing.assert_array_equal(short, long)


def test_all_warmup():
    schedule = make_schedule(ScheduleConfig(peak=1.0, warmup=4), 4)
    np.testing.assert_array_equal([schedule(t) for t in range(5)], [0, 0.25, 0.5, 0.75, 1])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"decay": "cosin"}, "did you mean 'cosine'"),
        ({"peak": 0.0}, "peak=0.0"),
        ({"end": 2.0}, "end=2.0"),
        ({"end": -1.0}, "end=-1.0"),
        ({"warmup": -1}, "warmup=-1"),
        ({"cooldown": -1, "decay": "rsqrt"}, "cooldown=-1"),
        ({"timescale": 0}, "timescale=0"),
        ({"cooldown": 5}, "cooldown=5 with decay 'cosine'"),
        ({"cooldown": 5, "decay": "staircase", "drops": (0.5,)}, "cooldown=5"),
        ({"decay": "rsqrt", "end": 0.1}, "use linear, cosine or a"),
        ({"decay": "staircase"}, "drops=[(][)] with decay 'staircase'"),
        ({"decay": "staircase", "drops": (30.0,)}, "expected shares of the run"),
        ({"drops": (0.5,)}, "none for the others"),
    ],
)
def test_invalid_schedule(fields, message):
    with pytest.raises(ValueError, match=message):
        ScheduleConfig(**{"peak": 1.0, **fields})


@pytest.mark.parametrize(("warmup", "cooldown", "steps"), [(101, 0, 100), (60, 41, 100), (0, 0, 0)])
def test_schedule_must_fit(warmup, cooldown, steps):
    config = ScheduleConfig(peak=1.0, warmup=warmup, decay="constant", cooldown=cooldown)
    with pytest.raises(ValueError, match=f"don't fit into {steps} steps"):
        make_schedule(config, steps)


# ---- optimizers


@pytest.mark.parametrize("convention", ["multiplied", "independent"])
def test_adamw_textbook(convention):
    config = dataclasses.replace(
        EXACT,
        weight_decay=0.25,
        weight_decay_convention=convention,
        weight_decay_rules=DECAYED,
    )
    history = train(config, peak=0.5)[0]
    p, m, v = head_kernel(tree(0)), 0.0, 0.0
    for t, rate in enumerate(RATES, 1):
        g = head_kernel(tree(t))
        m = config.b1 * m + (1 - config.b1) * g
        v = config.b2 * v + (1 - config.b2) * g**2
        m_hat, v_hat = m / (1 - config.b1**t), v / (1 - config.b2**t)
        decay_rate = rate if convention == "multiplied" else rate / 0.5
        p = p - rate * m_hat / (np.sqrt(v_hat) + config.eps) - decay_rate * 0.25 * p
        np.testing.assert_allclose(head_kernel(history[t]), p, rtol=1e-6, atol=1e-6)


def test_sgd_textbook():
    config = dataclasses.replace(EXACT, name="sgd", weight_decay=0.25, weight_decay_rules=DECAYED)
    history = train(config)[0]
    p, momentum = head_kernel(tree(0)), 0.0
    for t, rate in enumerate(RATES, 1):
        momentum = config.b1 * momentum + head_kernel(tree(t))
        p = p - rate * (momentum + 0.25 * p)
        np.testing.assert_allclose(head_kernel(history[t]), p, rtol=1e-6, atol=1e-6)


def test_adafactor_textbook():
    shape, b2 = (64, 48), 0.625  # beta2_t = 1 - t^-0.8 is 0, 0.43, 0.58, 0.67, 0.72: capped at t=4
    config = dataclasses.replace(EXACT, name="adafactor", b2=b2)
    history = train(config, params=tree(0, shape), grads=lambda t: tree(1 + t, shape))[0]
    start = tree(0, shape)["head"]
    kernel, bias = start["kernel"].astype(np.float64), start["bias"].astype(np.float64)
    rows, columns, second, kernel_momentum, bias_momentum = 0.0, 0.0, 0.0, 0.0, 0.0
    for t, rate in enumerate(RATES, 1):
        grads = tree(t, shape)["head"]
        g, h = grads["kernel"].astype(np.float64), grads["bias"].astype(np.float64)
        beta = min(b2, 1 - t**-0.8)
        rows = beta * rows + (1 - beta) * np.mean(g**2, 1)
        columns = beta * columns + (1 - beta) * np.mean(g**2, 0)
        second = beta * second + (1 - beta) * h**2
        direction = g / np.sqrt(np.outer(rows, columns) / np.mean(rows))
        kernel_momentum = config.b1 * kernel_momentum + (1 - config.b1) * direction
        bias_momentum = config.b1 * bias_momentum + (1 - config.b1) * h / np.sqrt(second)
        kernel, bias = kernel - rate * kernel_momentum, bias - rate * bias_momentum
        np.testing.assert_allclose(history[t]["head"]["kernel"], kernel, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(history[t]["head"]["bias"], bias, rtol=1e-6, atol=1e-6)


def test_adafactor_state_shapes():
    params = {name: jnp.ones(s) for name, s in {"a": (64, 48), "b": (16, 64), "c": (64,)}.items()}
    config = OptimizerConfig(name="adafactor", momentum_dtype="bfloat16")
    state = make_optimizer(config, stepwise, 0.5, params).init(params)
    found = {path.split("inner_state/")[-1]: leaf for path, leaf in paths_and_leaves(state)}
    shapes = {path: leaf.shape for path, leaf in found.items() if "/v" in path}
    assert shapes == {
        **{"1/0/v_row/a": (48,), "1/0/v_col/a": (64,), "1/0/v/a": (1,)},
        **{"1/0/v_row/b": (1,), "1/0/v_col/b": (1,), "1/0/v/b": (16, 64)},
        **{"1/0/v_row/c": (1,), "1/0/v_col/c": (1,), "1/0/v/c": (64,)},
    }
    assert {found[f"1/1/ema/{name}"].dtype for name in "abc"} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize(
    ("name", "moment"), [("adamw", "mu"), ("sgd", "trace"), ("adafactor", "ema")]
)
@pytest.mark.parametrize(("dtype", "stored"), [("bfloat16", "bfloat16"), (None, "float32")])
def test_momentum_dtype(name, moment, dtype, stored):
    params = tree(0)
    config = OptimizerConfig(name=name, momentum_dtype=dtype)
    optimizer = make_optimizer(config, stepwise, 0.5, params)
    state = jax.eval_shape(optimizer.init, params)
    updates, updated = jax.eval_shape(optimizer.update, params, state, params)
    assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype("float32")}
    for paths in (paths_and_leaves(state), paths_and_leaves(updated)):
        dtypes = [leaf.dtype for path, leaf in paths if f"/{moment}/" in path]
        assert dtypes == [jnp.dtype(stored)] * 3


@pytest.mark.parametrize("name", ["adamw", "sgd", "adafactor"])
def test_conventions_agree(name):
    """The ViT paper's 0.1 is big_vision's 1e-4 at the learning rate 1e-3."""
    peak = 1e-3
    config = OptimizerConfig(name=name, weight_decay=0.1)
    independent = dataclasses.replace(
        config, weight_decay=1e-4, weight_decay_convention="independent"
    )
    a, b = (train(c, peak=peak)[0] for c in (config, independent))
    assert_trees_equal(a, b)
    plain = train(OptimizerConfig(name=name), peak=peak)[0]
    assert not np.array_equal(a[-1]["head"]["kernel"], plain[-1]["head"]["kernel"])
    np.testing.assert_array_equal(a[-1]["head"]["bias"], plain[-1]["head"]["bias"])


def test_decay_is_decoupled():
    """Without gradients only decay remains: p <- (1 - lr * weight_decay * factor) * p."""
    rules = ((".*/bias", 0.0), ("head/.*", 2.0), (".*", 1.0))
    config = OptimizerConfig(weight_decay=0.125, weight_decay_rules=rules)
    zeros = jax.tree.map(jnp.zeros_like, tree(0))
    start, end = train(config, steps=1, grads=lambda _: zeros)[0]
    np.testing.assert_array_equal(end["head"]["bias"], start["head"]["bias"])
    for layer, factor in (("head", 2.0), ("stem", 1.0)):
        expected = (1 - 0.25 * 0.125 * factor) * start[layer]["kernel"]
        np.testing.assert_allclose(end[layer]["kernel"], expected, rtol=2e-7)


def test_rate_follows_the_count_in_the_state():
    """The state alone determines the next rate, without an argument or outside counter."""
    schedule = make_schedule(ScheduleConfig(peak=0.5, warmup=3, decay="linear"), 7)
    config = OptimizerConfig(name="sgd", b1=0.0, clip_norm=None)
    params = {"w": jnp.zeros(())}
    optimizer = make_optimizer(config, schedule, 0.5, params)
    state = optimizer.init(params)
    for t in range(8):
        updates, state = optimizer.update({"w": jnp.ones(())}, state, params)
        assert updates["w"] == -schedule(t)


# ---- multipliers and freezing


@pytest.mark.parametrize("name", ["adamw", "sgd", "adafactor"])
def test_multiplier_scales_updates(name):
    params, grads = tree(0), tree(1)
    plain = OptimizerConfig(name=name, weight_decay=0.1)
    halved = dataclasses.replace(plain, lr_multipliers=(("stem/.*", 0.5), (".*", 1.0)))

    def first_update(config):
        optimizer = make_optimizer(config, stepwise, 0.5, params)
        return optimizer.update(grads, optimizer.init(params), params)[0]

    full, scaled = first_update(plain), first_update(halved)
    assert_trees_equal(scaled["head"], full["head"])
    np.testing.assert_array_equal(scaled["stem"]["kernel"], full["stem"]["kernel"] / 2)
    assert np.all(full["stem"]["kernel"] != 0)


@pytest.mark.parametrize("name", ["adamw", "sgd", "adafactor"])
def test_frozen_parameters(name):
    config = OptimizerConfig(
        name=name, weight_decay=0.1, clip_norm=0.5, lr_multipliers=(("stem/.*", 0.0), (".*", 1.0))
    )

    def poisoned(t):
        return {**tree(1 + t), "stem": {"kernel": np.full((8, 4), np.nan, np.float32)}}

    start = tree(0)
    start["stem"]["kernel"][0] = [-0.0, 0.0, np.finfo(np.float32).tiny, np.inf]
    history, state = train(config, grads=poisoned, params=start)
    bits = np.asarray(history[-1]["stem"]["kernel"]).view(np.uint32)
    np.testing.assert_array_equal(bits, start["stem"]["kernel"].view(np.uint32))
    paths = [path for path, _ in paths_and_leaves(state)]
    assert not any("stem" in path for path in paths)
    assert any(path.endswith("/head/kernel") for path in paths)
    # Frozen parameters don't count in the norm, hence don't change the others.
    alone = {"head": tree(0)["head"]}
    without = dataclasses.replace(config, lr_multipliers=((".*", 1.0),))
    expected = train(without, grads=lambda t: {"head": tree(1 + t)["head"]}, params=alone)[0]
    assert_trees_equal(history[-1]["head"], expected[-1]["head"])


@pytest.mark.parametrize("multiplier", [0.0, 1.0])
def test_frozen_gradients_are_not_computed(multiplier):
    rules = (("stem/.*", multiplier), (".*", 1.0))
    config = OptimizerConfig(weight_decay=0.1, lr_multipliers=rules)
    params = tree(0)
    optimizer = make_optimizer(config, stepwise, 0.5, params)

    def loss(params):  # only the stem's gradient has a cosine
        return jnp.sum(params["head"]["kernel"] * jnp.sin(params["stem"]["kernel"]))

    def step(params, state):
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    program = jax.jit(step).lower(params, optimizer.init(params)).compile().as_text()
    assert "sine(" in program.replace("cosine(", "")
    assert ("cosine(" in program) == (multiplier > 0)


def test_freezing_everything():
    with pytest.raises(ValueError, match="freeze every parameter"):
        make_optimizer(OptimizerConfig(lr_multipliers=((".*", 0.0),)), stepwise, 0.5, tree(0))


# ---- clipping


@pytest.mark.parametrize("scale", [0.5, 4.0])
def test_clipping_by_the_global_norm(scale):
    grads = {"a": jnp.full((4,), 0.25) * scale, "b": jnp.full((3,), 0.5) * scale}  # norm: scale
    config = OptimizerConfig(name="sgd", b1=0.0, clip_norm=1.0)
    optimizer = make_optimizer(config, lambda _: jnp.float32(1), 1.0, grads)
    updates, _ = optimizer.update(grads, optimizer.init(grads), grads)
    expected = jax.tree.map(lambda g: -g / max(scale, 1), grads)
    jax.tree.map(lambda u, e: np.testing.assert_allclose(u, e, rtol=2e-7), updates, expected)


# ---- rules, errors and structure


def test_first_rule_wins():
    rules = (("head/bias", 1.0), ("head/.*", 2.0), (".*", 3.0))
    assert match_rules(rules, tree(0)) == {
        "stem": {"kernel": 3.0},
        "head": {"kernel": 2.0, "bias": 1.0},
    }


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ((("head/.*", 1.0),), "no rule matches parameter 'stem/kernel'"),
        ((("heda/kernel", 1.0), (".*", 0.0)), "'heda/kernel' matches no .* nearest: head/kernel"),
        ((("kernel", 1.0), (".*", 0.0)), "'kernel' matches no parameter's whole path"),
        (((".*/kernel", 1.0), ("head/kernel", 0.0), (".*", 0.0)), "decides nothing"),
        (((".*", 1.0), ("head/.*", 0.0)), "decides nothing"),
        ((("head/(", 1.0), (".*", 0.0)), r"'head/\(' isn't a regular expression"),
    ],
)
def test_invalid_rules(rules, message):
    with pytest.raises(ValueError, match=message):
        match_rules(rules, tree(0))


def test_catch_all_may_be_idle():
    rules = (("stem/.*", 1.0), ("head/.*", 2.0), (".*", 3.0))
    assert set(jax.tree.leaves(match_rules(rules, tree(0)))) == {1.0, 2.0}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "adam"}, "did you mean 'adamw'"),
        ({"momentum_dtype": "bf16"}, "unknown momentum_dtype 'bf16'"),
        ({"weight_decay_convention": "coupled"}, "unknown weight_decay_convention"),
        ({"b1": 1.0}, "b1=1.0"),
        ({"b2": -0.1}, "b2=-0.1"),
        ({"eps": 0.0}, "eps=0.0"),
        ({"clip_norm": 0.0}, "clip_norm=0.0"),
        ({"weight_decay": -0.1}, "-0.1: expected 0 or more"),
        ({"lr_multipliers": ((".*", -1.0),)}, "-1.0: expected 0 or more"),
    ],
)
def test_invalid_optimizer(fields, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**fields)


@pytest.mark.parametrize("name", ["adamw", "sgd", "adafactor"])
def test_shapes_are_enough(name):
    params = tree(0)
    shapes = jax.eval_shape(lambda: params)
    config = OptimizerConfig(name=name, weight_decay=0.1)
    optimizers = [make_optimizer(config, stepwise, 0.5, p) for p in (params, shapes)]
    a, b = (optimizer.init(params) for optimizer in optimizers)
    assert jax.tree.structure(a) == jax.tree.structure(b)
    abstract = jax.eval_shape(optimizers[1].init, shapes)
    assert [x.shape for x in jax.tree.leaves(abstract)] == [x.shape for x in jax.tree.leaves(a)]


@pytest.mark.parametrize(("name", "moments"), [("adamw", 2), ("sgd", 1), ("adafactor", 4)])
def test_state_paths_end_with_parameter_paths(name, moments):
    _, state = train(OptimizerConfig(name=name), steps=0)
    paths = [path for path, _ in paths_and_leaves(state) if not path.endswith("count")]
    parameters = ("stem/kernel", "head/kernel", "head/bias")
    found = [sum(path.endswith(f"/{p}") for path in paths) for p in parameters]
    assert found == [moments] * 3
    assert len(paths) == 3 * moments


def test_layer_decay():
    """Each block's rate is a fixed part of the next one's, looped and scanned alike."""
    looped = build_model(ModelConfig("ViT-mu/8", depth=3, dtype="float32"), 5, (16, 16))
    scanned = ModelConfig("ViT-mu/8", depth=3, dtype="float32", scan=True)
    scanned = build_model(scanned, 5, (16, 16))
    config = OptimizerConfig(name="sgd", b1=0.0, clip_norm=None, layer_decay=0.5)
    moved = {}
    for name, model in (("looped", looped), ("scanned", scanned)):
        shapes = jax.eval_shape(model.init, jax.random.key(0))
        params = jax.tree.map(lambda s: np.ones(s.shape, s.dtype), shapes)
        optimizer = make_optimizer(config, lambda step: 1.0, 1.0, params)
        updates, _ = jax.jit(optimizer.update)(params, optimizer.init(params), params)
        moved[name] = jax.tree.map(lambda u: -u, updates)
    blocks = [
        moved["looped"]["Transformer"][f"encoderblock_{i}"]["MlpBlock_0"]["Dense_0"]["kernel"]
        for i in range(3)
    ]
    np.testing.assert_array_equal([b[0, 0] for b in blocks], [1 / 8, 1 / 4, 1 / 2])
    assert {float(u.max()) for u in jax.tree.leaves(moved["looped"]["head"])} == {1.0}
    assert float(moved["looped"]["Transformer"]["encoder_norm"]["scale"].max()) == 1.0
    for name in ("embedding", "pos_embedding", "cls"):
        assert {float(u.max()) for u in jax.tree.leaves(moved["looped"][name])} == {1 / 16}
    stacked = stack_layers(moved["looped"], 3)
    for a, b in zip(jax.tree.leaves(stacked), jax.tree.leaves(moved["scanned"]), strict=True):
        np.testing.assert_array_equal(a, b)
    resnet = {"conv_root": {"kernel": jnp.ones(3)}, "head": {"kernel": jnp.ones(3)}}
    with pytest.raises(ValueError, match="no Transformer or Mixer blocks"):
        make_optimizer(config, lambda step: 1.0, 1.0, resnet)
    with pytest.raises(ValueError, match="layer_decay=0: expected"):
        OptimizerConfig(layer_decay=0)
