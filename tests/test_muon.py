"""Muon against optax's orthogonalisation, and its laws: scan, meshes, shares of the work."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from vit_jax.models.stacking import flatten, stack_layers
from vit_jax.models.variants import ModelConfig, build_model
from vit_jax.parallel.mesh import MeshConfig, make_mesh, state_shardings, use_mesh
from vit_jax.training.optimizer import OptimizerConfig, make_optimizer

MUON = OptimizerConfig("muon", clip_norm=None)
BLOCK = "Transformer/encoderblock_0"
ATTENTION = f"{BLOCK}/MultiHeadDotProductAttention_0"


def model(depth=3, **options):
    config = ModelConfig("ViT-mu/8", depth=depth, dtype="float32", **options)
    return build_model(config, 5, (16, 16))


def random_like(tree, seed):
    leaves, structure = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)
    return structure.unflatten([jnp.asarray(rng.normal(size=x.shape), jnp.float32) for x in leaves])


def shapes_of(built):
    return jax.eval_shape(built.init, jax.random.key(0))


def first_update(config, params, grads, steps=1):
    optimizer = make_optimizer(config, lambda step: 1.0, 1.0, params)
    state = optimizer.init(params)
    for t in range(steps):
        updates, state = jax.jit(optimizer.update)(grads(t), state, params)
    return updates, state


def test_update_is_optax_orthogonalisation_of_nesterov_momentum():
    params = random_like(shapes_of(model(1)), 0)
    grads = [random_like(params, seed) for seed in (1, 2)]
    updates, _ = first_update(MUON, params, lambda t: grads[t], steps=2)
    adam, _ = first_update(OptimizerConfig(clip_norm=None), params, lambda t: grads[t], steps=2)
    found, expected, given = flatten(updates), flatten(adam), [flatten(g) for g in grads]
    axes = {  # matrices: inputs by outputs
        f"{ATTENTION}/query/kernel": ((0,), (1, 2)),
        f"{ATTENTION}/key/kernel": ((0,), (1, 2)),
        f"{ATTENTION}/value/kernel": ((0,), (1, 2)),
        f"{ATTENTION}/out/kernel": ((0, 1), (2,)),
        f"{BLOCK}/MlpBlock_0/Dense_0/kernel": ((0,), (1,)),
        f"{BLOCK}/MlpBlock_0/Dense_1/kernel": ((0,), (1,)),
    }
    for name, (inputs, outputs) in axes.items():
        first, second = (g[name] for g in given)
        nesterov = second + 0.95 * (second + 0.95 * first)
        oracle = scale_by_muon(
            beta=0.0,
            nesterov=False,
            weight_dimension_numbers={"x": MuonDimensionNumbers(inputs, outputs)},
        )
        x = {"x": nesterov}
        direction = oracle.update(x, oracle.init(x))[0]["x"]
        longer = max(np.prod([nesterov.shape[i] for i in side]) for side in (inputs, outputs))
        expected[name] = -0.2 * longer**0.5 * direction
        rms = float(jnp.sqrt(jnp.mean(found[name] ** 2)))
        assert 0.13 < rms < 0.25, name  # as AdamW's, whatever the shape
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=2e-4, atol=2e-5, err_msg=name)


def test_scan_and_loop_take_the_same_step():
    config = dataclasses.replace(
        MUON, weight_decay=0.1, layer_decay=0.5, clip_norm=1.0, lr_multipliers=((".*", 0.5),)
    )
    params = random_like(shapes_of(model()), 0)
    grads = [random_like(params, seed) for seed in (1, 2)]
    looped, _ = first_update(config, params, lambda t: grads[t], steps=2)
    scanned, _ = first_update(
        config, stack_layers(params, 3), lambda t: stack_layers(grads[t], 3), steps=2
    )
    assert jax.tree.structure(scanned) == jax.tree.structure(shapes_of(model(scan=True)))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        stack_layers(looped, 3),
        scanned,
    )


def test_frozen_matrices_have_no_state():
    rules = ((".*/MlpBlock_0/.*", 0.0), (".*", 1.0))
    config = dataclasses.replace(MUON, lr_multipliers=rules, weight_decay=0.1)
    params = random_like(shapes_of(model(1)), 0)
    poisoned = random_like(params, 1)
    block = poisoned["Transformer"]["encoderblock_0"]
    block["MlpBlock_0"] = jax.tree.map(lambda x: x * jnp.nan, block["MlpBlock_0"])
    updates, state = first_update(config, params, lambda t: poisoned)
    for name, update in flatten(updates).items():
        assert bool((update == 0).all()) == ("MlpBlock_0" in name), name
    paths = jax.tree_util.tree_leaves_with_path(state)
    assert not any("MlpBlock_0" in jax.tree_util.keystr(path) for path, _ in paths)


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 4, 1), (2, 2, 2)])
def test_every_device_orthogonalises_its_share(sizes, capfd):
    """Every mesh takes the same step; a device computes an eighth of the products, and pads."""
    built = model(4, scan=True)
    params, grads = random_like(shapes_of(built), 0), random_like(shapes_of(built), 1)
    expected, _ = first_update(MUON, params, lambda t: grads)
    config = MeshConfig(*sizes, min_size=1)
    mesh = make_mesh(config)
    optimizer = make_optimizer(MUON, lambda step: 1.0, 1.0, params)
    state = optimizer.init(params)
    at = state_shardings(mesh, config, {"params": params, "state": state})
    with use_mesh(mesh):
        placed = jax.device_put((grads, state, params), (at["params"], at["state"], at["params"]))
        update = jax.jit(optimizer.update, out_shardings=(at["params"], at["state"]))
        program = update.lower(*placed).compile()
        updates, _ = program(*placed)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), updates, expected
    )
    alone = jax.jit(optimizer.update).lower(grads, state, params).compile()
    # 16 square matrices over 8 devices, 2 each, and 8 of 32 x 128, one each: an eighth.
    share = program.cost_analysis()["flops"] / alone.cost_analysis()["flops"]
    assert share < 0.2
    assert "Involuntary full rematerialization" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("kernels", "message"),
    [
        (".*", r"matches \S+ \(.*\): expected kernels"),
        (".*/bias", r"matches Transformer/.*/bias .*: expected kernels"),
        (".*/query/bias", r"query/bias \(2, 16\): expected kernels"),
        ("blocks/.*", "matches no parameter: the default is"),
        ("(", "isn't a regular expression"),
    ],
)
def test_only_matrices(kernels, message):
    config = dataclasses.replace(MUON, muon_kernels=kernels)
    with pytest.raises(ValueError, match=message):
        make_optimizer(config, lambda step: 1.0, 1.0, shapes_of(model(1)))


def test_a_convolutional_network_has_to_name_its_kernels():
    resnet = build_model(ModelConfig("R26x1", stages=(1,), stem_width=32), 5, (32, 32))
    shapes = shapes_of(resnet)
    with pytest.raises(ValueError, match="for other models use adamw or sgd"):
        make_optimizer(MUON, lambda step: 1.0, 1.0, shapes)
    config = dataclasses.replace(MUON, muon_kernels="block.*/kernel")
    params = random_like(shapes, 0)
    updates, _ = first_update(config, params, lambda t: params)
    assert all(bool(jnp.isfinite(u).all()) for u in jax.tree.leaves(updates))
    row = {"MAPHead_0": {"x": {"kernel": jnp.ones((1, 8))}}}
    with pytest.raises(ValueError, match=r"MAPHead_0/x/kernel \(1, 8\): .* at least two inputs"):
        make_optimizer(MUON, lambda step: 1.0, 1.0, row)
