"""Laws of the options of published families of Vision Transformers, and their golden values.

tests/test_pytorch.py and tests/test_hugging_face.py compare with timm and transformers themselves.
"""

import dataclasses
import json

import chex
import jax
import numpy as np
import pytest
from conftest import GOLDEN
from test_adapt import assert_accounted, between, make

from vit_jax.models.stacking import stack_layers, unstack_layers
from vit_jax.models.variants import build_model
from vit_jax.parallel.mesh import (
    MeshConfig,
    batch_sharding,
    make_mesh,
    put_tree,
    state_shardings,
    use_mesh,
)
from vit_jax.weights.adapt import flatten, unflatten
from vit_jax.weights.trained import load

# Every option of models/options.py that published families brought, together as they use them.
FAMILIES = {
    "deit": {"distillation": True, "layer_scale": 0.1, "mlp": "gelu"},
    "dino": {
        **{"position": "none", "rotary": "centred", "registers": 4, "qkv_bias": "qv"},
        **{"pool": "token+gap", "layer_scale": 0.1, "mlp": "swiglu", "norm_epsilon": 1e-5},
    },
    "clip": {"pre_norm": True, "mlp": "quick_gelu", "norm_epsilon": 1e-5},
    "eva02": {
        **{"rotary": "axial", "rotary_reference": 3, "attention_norm": True, "mlp_norm": True},
        **{"pool": "gap", "class_token": True, "final_norm": "pooled", "qkv_bias": "qv"},
        "mlp": "swiglu",
    },
    "perception": {
        **{"rotary": "axial", "rotary_offset": 1.0, "pool": "map", "class_token": True},
        **{"pool_heads": 4, "pool_mlp_dim": 48, "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)},
    },
    "mixed": {"position": "none", "rotary": "mixed", "qkv_bias": "", "final_norm": "none"},
}
SMALL = {"width": 32, "num_heads": 2, "mlp_dim": 64}


def gradients(model, params, images, mesh_config=None):
    """Returns the loss and its gradients."""

    def loss(params, images):
        output = model.apply(params, images)
        return (output.logits**3).mean() + (output.features**3).mean()

    if mesh_config is None:
        return jax.jit(jax.value_and_grad(loss))(params, images)
    mesh = make_mesh(mesh_config)
    with use_mesh(mesh):
        placed = put_tree(params, state_shardings(mesh, mesh_config, params))
        images = jax.device_put(images, batch_sharding(mesh))
        return placed, jax.jit(jax.value_and_grad(loss))(placed, images)


@pytest.mark.long
@pytest.mark.parametrize("options", FAMILIES.values(), ids=FAMILIES)
def test_every_parameter_learns_the_same_scanned_and_sharded(options):
    model, params = make(5, 16, **SMALL, **options)
    params = unflatten({k: 0.2 * v + k.endswith("scale") for k, v in flatten(params).items()})
    images = np.random.default_rng(2).uniform(-1, 1, (4, 16, 16, 3)).astype(np.float32)
    value, grads = gradients(model, params, images)
    grads = {name: np.asarray(grad) for name, grad in flatten(grads).items()}
    largest = max(np.abs(grad).max() for grad in grads.values())
    still = {name for name, grad in grads.items() if np.abs(grad).max() < 1e-6 * largest}
    # The softmax of queries and keys that aren't rotated doesn't depend on the keys' biases.
    alike = "" if options.get("rotary", "none") == "none" else "MAPHead_0"
    assert still == {name for name in grads if name.endswith("key/bias") and alike in name}

    scanned = build_model(dataclasses.replace(model.config, scan=True), 5, (16, 16))
    placed, (other, others) = gradients(
        scanned,
        stack_layers(params, 2),
        images,
        MeshConfig(data=1, fsdp=4, tensor=2, min_size=2**9),
    )
    np.testing.assert_allclose(other, value, rtol=1e-5)
    for name, grad in flatten(unstack_layers(jax.device_get(others))).items():
        np.testing.assert_allclose(grad, grads[name], rtol=0, atol=1e-5 * largest, err_msg=name)
    for name, leaf in flatten(placed).items():
        whole = leaf.sharding.shard_shape(leaf.shape) == leaf.shape
        assert leaf.size < 2**9 or not whole, f"{name} {leaf.shape} isn't split"


@pytest.mark.parametrize("options", FAMILIES.values(), ids=FAMILIES)
def test_transfer_to_another_size_and_classes(options):
    source, target = make(5, 32, **options), make(3, 48, seed=1, **options)
    filled, report = between(source, target)
    assert_accounted(report, source[1], target[1])
    assert all(name.startswith("head") for name in report.initialised) and report.initialised
    for name in report.loaded:
        np.testing.assert_array_equal(flatten(filled)[name], flatten(source[1])[name])
    learned = options.get("position", "learned_1d") == "learned_1d"
    assert [entry.split()[0] for entry in report.resized] == ["pos_embedding"] * learned


@pytest.mark.parametrize("file", sorted(GOLDEN.glob("family_*.npz")), ids=lambda path: path.stem)
def test_golden_values_of_home_libraries(file, tmp_path):
    """tests/golden/record_families.py recorded them."""
    with np.load(file) as arrays:
        recorded = dict(arrays)
    cases = [
        (recorded.pop(images), recorded.pop(output))
        for images, output in (("images", "output"), ("others", "other_output"))
    ]
    for name, content in recorded.items():
        (tmp_path / name).write_bytes(content.tobytes())
    for images, expected in cases:
        model = load(tmp_path, images.shape[1:3])
        config = dataclasses.replace(model.config, dtype="float32")
        network = build_model(config, model.num_classes, model.image_size)
        exact = dataclasses.replace(model, architecture=network)
        found = exact.logits(images) if model.num_classes else exact.features(images)
        assert np.abs(expected).max() > 0.1
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)
    model = load(tmp_path)
    of_timm = "architecture" in json.loads((tmp_path / "config.json").read_text())
    model.save(tmp_path / "again", format="timm" if of_timm else "hugging_face")
    chex.assert_trees_all_equal(load(tmp_path / "again").params, model.params)
