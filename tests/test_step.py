"""Laws of the step: the same numbers on every mesh, with accumulation, scan and remat."""

import dataclasses
from functools import lru_cache

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from vit_jax.costs.compiled import Program
from vit_jax.data.pipeline import DataConfig
from vit_jax.models.stacking import unstack_layers
from vit_jax.models.variants import ModelConfig, build_model
from vit_jax.parallel.mesh import (
    MeshConfig,
    make_mesh,
    path_name,
    put_batch,
    put_tree,
    use_mesh,
)
from vit_jax.training.augmentation import AugmentationConfig
from vit_jax.training.optimizer import (
    OptimizerConfig,
    ScheduleConfig,
)
from vit_jax.training.recipe import TrainConfig, build_training
from vit_jax.training.step import (
    LossConfig,
    example_losses,
    make_targets,
    share_targets,
    start_state,
)

STEPS = 5
ALL_DATA = MeshConfig()
ALL_AXES = MeshConfig(data=2, fsdp=2, tensor=2)
SOFTMAX = LossConfig()
MIXUP = AugmentationConfig(mixup=0.2)
# The softmax doesn't depend on the keys' biases: their gradients are rounding errors, which AdamW
# would scale up to whole steps without an epsilon above them.
ADAMW = OptimizerConfig(weight_decay=0.1, eps=1e-6)
SMALL = {"variant": "ViT-nano/8", "width": 32, "depth": 2, "num_heads": 2, "mlp_dim": 64}
BLOCK = "Transformer/encoderblock_0/MlpBlock_0"
RANDOM = {"dropout": 0.2, "attention_dropout": 0.1, "stochastic_depth": 0.1}


@lru_cache
def initial_params(config, num_classes):
    """Computes the initial parameters once per model: the tests are on steps, not on them."""
    model = build_model(config, num_classes, (16, 16))
    return jax.device_get(jax.jit(model.init)(jax.random.key(0)))


def run(
    mesh=ALL_DATA,
    devices=8,
    accumulation=1,
    ema_decay=None,
    ema_warmup=False,
    optimizer=ADAMW,
    loss=SOFTMAX,
    augmentation=MIXUP,
    labels=None,
    steps=STEPS,
    each=None,
    **model_options,
):
    """Trains a small model for a few steps: returns (final state, each step's metrics, program).

    `each` is called with every state, first with the one before any step.
    """
    mesh_config = dataclasses.replace(mesh, min_size=2**8)
    config = TrainConfig(
        model=ModelConfig(**{**SMALL, **RANDOM, "dtype": "float32", **model_options}),
        data=DataConfig("digits"),
        image_size=16,
        batch_size=32,
        schedule=ScheduleConfig(peak=1e-3, warmup=2),
        steps=STEPS,
        seed=3,
        loss=loss,
        augmentation=augmentation,
        optimizer=optimizer,
        ema_decay=ema_decay,
        ema_warmup=ema_warmup,
        accumulation=accumulation,
        mesh=mesh_config,
    )
    mesh = make_mesh(mesh_config, jax.devices()[:devices])
    training = build_training(config, mesh, num_classes=5, num_examples=32)
    without_remat = dataclasses.replace(training.model.config, remat="none")
    params = initial_params(without_remat, training.model.num_classes)
    state = start_state(params, training.optimizer, use_ema=ema_decay is not None)
    images = np.random.default_rng(0).integers(0, 256, (32, 16, 16, 3)).astype(np.uint8)
    labels = np.arange(32, dtype=np.int32) % 5 if labels is None else labels
    batch = {"image": images, "label": labels}
    peak = np.float32(config.schedule.peak)
    history = []
    with use_mesh(mesh):
        state = put_tree(jax.device_get(state), training.shardings)
        step = training.lower(state, put_batch(mesh, batch)).compile()
        for _ in range(steps):
            if each:
                each(jax.device_get(state))
            state, metrics = step(state, put_batch(mesh, batch), peak)
            history.append(jax.device_get(metrics))
    return state, history, step.as_text()


@pytest.fixture(scope="module")
def plain():
    return run()


def assert_same(a, b):
    """Asserts equality up to the order of float32 sums."""
    for left, right in zip(a[1], b[1], strict=True):
        for name in left:
            np.testing.assert_allclose(left[name], right[name], rtol=1e-5, atol=1e-5, err_msg=name)
    chex.assert_trees_all_close(a[0].params, b[0].params, atol=1e-5, rtol=0)


def test_it_learns(plain):
    _, history, _ = plain
    assert [float(m["learning_rate"]) for m in history] == pytest.approx(
        [0.0, 5e-4, 1e-3, 7.5e-4, 2.5e-4]
    )
    assert history[0]["loss"] == pytest.approx(np.log(5), abs=1e-5)  # the head starts at zero
    assert all(0 <= m["accuracy"] <= 1 for m in history)
    assert all(np.isfinite(list(m.values())).all() for m in history)
    assert history[-1]["param_norm"] != history[0]["param_norm"]


@pytest.mark.parametrize("mesh", [(1, 1, 1), (1, 8, 1), (4, 2, 1), (2, 2, 2)])
def test_every_mesh_computes_the_same(plain, mesh):
    data, fsdp, tensor = mesh
    config = MeshConfig(data=data, fsdp=fsdp, tensor=tensor)
    sharded = run(mesh=config, devices=data * fsdp * tensor)
    for path, parts in (("embedding/kernel", fsdp), (f"{BLOCK}/Dense_1/kernel", fsdp * tensor)):
        found = {
            path_name(keys): leaf
            for keys, leaf in jax.tree_util.tree_leaves_with_path(sharded[0])
            if path_name(keys).endswith(path)
        }
        assert len(found) == 3  # really split, and its two moments with it
        assert {leaf.addressable_shards[0].data.size * parts for leaf in found.values()} == {
            next(iter(found.values())).size
        }
    assert_same(plain, sharded)
    if mesh == (1, 8, 1):
        assert_gradients_are_scattered(sharded)
    if mesh == (2, 2, 2):
        assert_no_activation_is_gathered(sharded)


def assert_gradients_are_scattered(result):
    """Kernels of blocks are gathered once, and their gradients reduce-scattered."""
    found = Program(result[2]).collectives
    sizes = {
        kind: sorted(c.bytes for c in found if c.kind == kind)
        for kind in ("all-gather", "reduce-scatter", "all-reduce")
    }
    leaves = jax.tree_util.tree_leaves_with_path(result[0].params["Transformer"])
    kernels = sorted(leaf.nbytes for path, leaf in leaves if path_name(path).endswith("/kernel"))
    assert sizes["reduce-scatter"] == kernels
    embedding = result[0].params["embedding"]["kernel"].nbytes
    assert sum(sizes["all-gather"]) <= sum(kernels) + embedding
    assert sum(sizes["all-reduce"]) < sum(kernels) / 4 + embedding


def assert_no_activation_is_gathered(result):
    """The program only sums over `tensor`, as Megatron-LM does, and gathers parameters."""
    collectives = Program(result[2]).collectives
    assert {c.kind for c in collectives} <= {
        "all-gather", "all-reduce", "reduce-scatter", "collective-permute",
    }  # fmt: skip
    tensor, fsdp = (0, 1), (0, 2)
    tokens = 32 // 4 * (2 * 2 + 1) * 32 * 4  # bytes of a device's [B, N, D]
    summed = sum(c.bytes for c in collectives if (c.kind, c.group) == ("all-reduce", tensor))
    # Per block two sums forward; backward one for the MLP, one to three for query, key and value.
    assert 2 * 4 * tokens <= summed < 2 * 6 * tokens + tokens
    gathered = sum(c.bytes for c in collectives if (c.kind, c.group) == ("all-gather", fsdp))
    blocks = jax.tree.leaves(result[0].params["Transformer"])
    assert 0 < gathered <= sum(leaf.addressable_shards[0].data.nbytes for leaf in blocks) * 2


@pytest.mark.parametrize(("mesh", "accumulation"), [(ALL_DATA, 4), (ALL_AXES, 2)])
def test_accumulation_changes_no_number(plain, mesh, accumulation):
    assert_same(plain, run(mesh=mesh, accumulation=accumulation))


@pytest.mark.parametrize(("mesh", "remat"), [(ALL_DATA, "none"), (ALL_AXES, "full")])
def test_scan_and_remat_change_no_number(plain, mesh, remat):
    state, history, _ = run(mesh=mesh, scan=True, remat=remat)
    kernel = state.params["Transformer"]["encoderblock"]["MlpBlock_0"]["Dense_1"]["kernel"]
    assert ("tensor" in kernel.sharding.spec) == (mesh is ALL_AXES)
    state = dataclasses.replace(state, params=unstack_layers(state.params))
    assert_same(plain, (state, history))


def test_dropout_and_seed_matter(plain):
    _, without, _ = run(**dict.fromkeys(RANDOM, 0.0), augmentation=AugmentationConfig())
    assert abs(plain[1][-1]["loss"] - without[-1]["loss"]) > 1e-4
    assert without[-1]["loss"] < without[0]["loss"] - 0.01  # the same batch every step


@pytest.mark.parametrize("warmup", [False, True])
def test_ema_is_the_running_average(warmup):
    states = []
    run(ema_decay=0.9, ema_warmup=warmup, each=states.append)
    expected = states[0].params["embedding"]["kernel"]
    for step, state in enumerate(states[1:]):
        decay = min(0.9, (1 + step) / (10 + step)) if warmup else 0.9
        expected = decay * expected + (1 - decay) * state.params["embedding"]["kernel"]
        np.testing.assert_allclose(state.ema["embedding"]["kernel"], expected, rtol=1e-5, atol=1e-7)


def test_augmentation_is_the_same_on_every_mesh_and_with_accumulation(plain):
    mixing = AugmentationConfig(mixup=0.8, cutmix=1.0, per_example=True, saturation=0.4)
    labels = np.stack([np.arange(32) % 5, np.arange(32) % 3], axis=1).astype(np.int32)
    options = {"augmentation": mixing, "labels": labels, "steps": 3, "depth": 1}
    mixed = run(**options)
    assert mixed[1][0]["grad_norm"] != pytest.approx(plain[1][0]["grad_norm"], rel=1e-3)
    assert_same(mixed, run(mesh=ALL_AXES, accumulation=2, **options))


def test_masked_patches_are_the_same_on_every_mesh_and_with_accumulation():
    options = {"loss": LossConfig("masked_patches"), "augmentation": AugmentationConfig()}
    options |= {"depth": 1, "steps": 3}
    whole = run(pool="gap", **options)
    assert whole[1][0]["loss"] == pytest.approx(np.log(512), abs=1e-5)
    assert whole[1][-1]["loss"] < whole[1][0]["loss"] - 0.01
    assert_same(whole, run(mesh=MeshConfig(data=2, fsdp=4), accumulation=2, pool="gap", **options))


def test_frozen_parameters_stay_and_cost_no_gradient(plain):
    assert plain[0].ema is None
    optimizer = OptimizerConfig(lr_multipliers=(("head/.*", 1.0), (".*", 0.0)), weight_decay=0.1)
    state, history, _ = run(optimizer=optimizer)
    initial = run(steps=0)[0]
    for name in ("embedding", "Transformer", "pos_embedding"):
        chex.assert_trees_all_equal(state.params[name], initial.params[name])
    assert state.params["head"]["kernel"].any()
    assert history[2]["grad_norm"] < plain[1][2]["grad_norm"]


def test_losses_against_the_textbook():
    logits = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32) * 3
    labels = np.array([0, 2, 1, 1])
    targets = make_targets(labels, 3)
    softmax = -log_softmax(logits, axis=-1)[np.arange(4), labels]
    np.testing.assert_allclose(
        example_losses(LossConfig("softmax"), logits, targets), softmax, rtol=1e-5
    )
    p = 1 / (1 + np.exp(-logits.astype(np.float64)))
    one_hot = np.eye(3)[labels]
    sigmoid = -(one_hot * np.log(p) + (1 - one_hot) * np.log(1 - p)).sum(-1)
    np.testing.assert_allclose(
        example_losses(LossConfig("sigmoid"), logits, targets), sigmoid, rtol=1e-5
    )
    smoothed = one_hot * 0.9 + 0.1 / 3
    np.testing.assert_allclose(
        example_losses(LossConfig("softmax", 0.1), logits, targets),
        -(smoothed * log_softmax(logits, axis=-1)).sum(-1),
        rtol=1e-5,
    )


def test_z_loss():
    logits, targets = jnp.array([[30.0, 31.0, 28.0]]), jnp.array([[0.0, 1.0, 0.0]])
    plain, more = (example_losses(LossConfig(z_loss=z), logits, targets)[0] for z in (0.0, 1e-4))
    assert more - plain == pytest.approx(1e-4 * np.log(np.exp(logits[0]).sum()) ** 2, rel=1e-3)
    for name, z_loss in (("sigmoid", 1e-4), ("softmax", -1.0)):
        with pytest.raises(ValueError, match=f"z_loss = {z_loss} of the loss '{name}'"):
            LossConfig(name, z_loss=z_loss)


def test_several_labels_an_image():
    targets = make_targets(jnp.array([[0, 2, -1], [1, -1, -1], [-1, -1, -1]]), 4)
    np.testing.assert_array_equal(targets, [[1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]])
    logits = jnp.array([[1.0, 2.0, 3.0, 4.0]] * 3)
    one, other, both = (
        float(example_losses(SOFTMAX, logits[:1], make_targets(jnp.array([labels]), 4))[0])
        for labels in ([0, -1], [2, -1], [0, 2])
    )
    assert both == pytest.approx((one + other) / 2, rel=1e-6)
    labels = np.stack([np.arange(32) % 5, np.arange(32) % 3], axis=1).astype(np.int32)
    _, history, _ = run(labels=labels, loss=LossConfig("sigmoid"), steps=2)
    assert np.isfinite(history[-1]["loss"])


@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_the_loss_of_mixed_targets_is_the_mixed_loss(name):
    """Mixes an image with two labels and an image with one."""
    config = LossConfig(name, label_smoothing=0.1)
    logits = jnp.array([[1.0, -2.0, 0.5, 3.0]])
    one, other = (
        share_targets(config, make_targets(jnp.array([labels]), 4)) for labels in ([0, 2], [1, -1])
    )
    mixed = example_losses(config, logits, 0.7 * one + 0.3 * other)
    apart = [example_losses(config, logits, targets) for targets in (one, other)]
    np.testing.assert_allclose(mixed, 0.7 * apart[0] + 0.3 * apart[1], rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "hinge"}, "Known: masked_patches, sigmoid, softmax"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
    ],
)
def test_bad_losses(options, message):
    with pytest.raises(ValueError, match=message):
        LossConfig(**options)
