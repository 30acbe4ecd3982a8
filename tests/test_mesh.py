"""Meshes and sharding rules."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from vit_jax.costs.compiled import Program
from vit_jax.models.variants import ModelConfig, build_model
from vit_jax.parallel.fsdp import _gather, placed_as, with_gathered
from vit_jax.parallel.mesh import (
    MeshConfig,
    batch_sharding,
    check_batch_size,
    check_tensor_axis,
    local_rows,
    make_mesh,
    path_name,
    put_batch,
    put_tree,
    state_shardings,
    use_mesh,
)
from vit_jax.training.optimizer import OptimizerConfig, make_optimizer
from vit_jax.training.step import start_state


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (MeshConfig(), (8, 1, 1)),
        (MeshConfig(data=-1, fsdp=4), (2, 4, 1)),
        (MeshConfig(data=1, fsdp=-1), (1, 8, 1)),
        (MeshConfig(fsdp=2, tensor=2), (2, 2, 2)),
        (MeshConfig(data=2, tensor=-1), (2, 1, 4)),
    ],
)
def test_shapes(config, shape):
    mesh = make_mesh(config)
    assert mesh.axis_names == ("data", "fsdp", "tensor") and mesh.devices.shape == shape


@pytest.mark.parametrize(
    ("config", "devices", "shape"),
    [
        (MeshConfig(devices=8, fsdp=4), 8, (2, 4, 1)),
        (MeshConfig(devices=8, fsdp=4), 4, (1, 4, 1)),
        (MeshConfig(devices=16, fsdp=4), 6, (3, 2, 1)),
        (MeshConfig(devices=16, data=2, fsdp=8), 4, (1, 4, 1)),
        (MeshConfig(devices=64, fsdp=16, tensor=2), 4, (1, 2, 2)),
        (MeshConfig(devices=16, data=1, fsdp=-1), 4, (1, 4, 1)),
    ],
)
def test_fewer_devices_than_the_recipe_is_made_for(config, devices, shape):
    assert make_mesh(config, jax.devices()[:devices]).devices.shape == shape


@pytest.mark.parametrize("devices", range(1, 9))
def test_the_default_takes_any_number_of_devices(devices):
    assert make_mesh(MeshConfig(), jax.devices()[:devices]).devices.shape == (devices, 1, 1)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"data": -1, "fsdp": -1}, "at most one -1"),
        ({"data": 0}, "positive sizes"),
        ({"data": 3, "fsdp": 2}, "data=3 x fsdp=2 x tensor=1 does not fit 8 devices"),
        ({"fsdp": 3}, "does not fit 8 devices"),
        ({"tensor": 16}, "does not fit 8 devices"),
        ({"devices": 32, "tensor": 3}, "tensor=3 does not fit 8 devices"),
        ({"devices": 0}, "mesh.devices = 0: expected at least 1"),
        ({"rules": ((".*", "split"),)}, "'replicate', 'fsdp' or 'tensor"),
        ({"rules": ((".*", "tensor[1]"),)}, "counted from the last"),
    ],
)
def test_bad_meshes(config, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(MeshConfig(**config))


def test_the_first_rule_that_matches_wins():
    config = MeshConfig(
        data=2, fsdp=4, min_size=16, rules=((".*/head/.*", "replicate"), (".*", "fsdp"))
    )
    shapes = {
        "params": {
            "head": {"kernel": jax.ShapeDtypeStruct((64, 64), np.float32)},
            "dense": {
                "kernel": jax.ShapeDtypeStruct((8, 64), np.float32),
                "odd": jax.ShapeDtypeStruct((64, 63), np.float32),
                "indivisible": jax.ShapeDtypeStruct((9, 63), np.float32),
                "bias": jax.ShapeDtypeStruct((8,), np.float32),
            },
        }
    }
    placed = state_shardings(make_mesh(config), config, shapes)["params"]
    assert placed["head"]["kernel"].spec == PartitionSpec()
    assert placed["dense"]["kernel"].spec == PartitionSpec(None, "fsdp")  # the largest dimension
    assert placed["dense"]["odd"].spec == PartitionSpec("fsdp")  # the one that divides
    assert placed["dense"]["indivisible"].spec == PartitionSpec()
    assert placed["dense"]["bias"].spec == PartitionSpec()  # too small
    with pytest.raises(ValueError, match="no sharding rule matches params/dense/bias"):
        state_shardings(make_mesh(config), MeshConfig(rules=((".*/kernel", "fsdp"),)), shapes)


def shape(*dims):
    return jax.ShapeDtypeStruct(dims, np.float32)


@pytest.mark.parametrize("scanned", [False, True])
def test_heads_and_hidden_width_over_tensor(scanned):
    """Splits columns before the nonlinearity and rows after it, also with a leading layer axis."""
    layers = (3,) * scanned
    block = {
        "MultiHeadDotProductAttention_0": {
            "query": {"kernel": shape(*layers, 64, 4, 16), "bias": shape(*layers, 4, 16)},
            "out": {"kernel": shape(*layers, 4, 16, 64), "bias": shape(*layers, 64)},
        },
        "MlpBlock_0": {
            "Dense_0": {"kernel": shape(*layers, 64, 128), "bias": shape(*layers, 128)},
            "Dense_1": {"kernel": shape(*layers, 128, 64), "bias": shape(*layers, 64)},
        },
    }
    config = MeshConfig(data=2, fsdp=2, tensor=2, min_size=4000)
    placed = state_shardings(make_mesh(config), config, {"params": block, "mu": block})
    for tree in placed.values():
        specs = {
            "/".join(key.key for key in path[1:]): (None,) * scanned + tuple(dims)
            for path, dims in (
                (p, s.spec[scanned:]) for p, s in jax.tree_util.tree_leaves_with_path(tree)
            )
        }
        lead = (None,) * scanned
        assert specs == {
            "query/kernel": (*lead, "fsdp", "tensor"),
            "query/bias": (*lead, "tensor"),
            "out/kernel": (*lead, "tensor", None, "fsdp"),
            "out/bias": lead,
            "Dense_0/kernel": (*lead, "fsdp", "tensor"),
            "Dense_0/bias": (*lead, "tensor"),
            "Dense_1/kernel": (*lead, "tensor", "fsdp"),
            "Dense_1/bias": lead,
        }


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "adafactor"])
def test_moments_follow_their_parameters(optimizer):
    model = build_model(ModelConfig("ViT-nano/8", num_heads=4, depth=1, scan=True), 5, (16, 16))
    params = jax.eval_shape(model.init, jax.random.key(0))
    made = make_optimizer(OptimizerConfig(optimizer), lambda step: step, 1.0, params)
    state = jax.eval_shape(partial(start_state, optimizer=made, use_ema=True), params)
    config = MeshConfig(fsdp=2, tensor=2, min_size=1)
    placed = state_shardings(make_mesh(config), config, state)
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    shardings = jax.tree.leaves(placed)
    of_params = {
        path_name(path): at for path, at in jax.tree_util.tree_leaves_with_path(placed.params)
    }
    moments = 0
    for (path, leaf), at in zip(leaves, shardings, strict=True):
        at.shard_shape(leaf.shape)  # raises where it does not divide
        name = path_name(path)
        second = re.search(r"/v(_row|_col)?/", name)  # of Adafactor
        for own, sharding in of_params.items():
            if name.endswith(f"/{own}") and not second and leaf.shape:
                assert at == sharding, name
                moments += 1
    assert moments == len(of_params) * {"adamw": 4, "sgd": 3, "adafactor": 3}[optimizer]


@pytest.mark.parametrize(
    ("variant", "options", "message"),
    [
        ("ViT-nano/8", {}, r"does not divide dimension -2 of .*/key/bias.*use one of 1, 3"),
        ("R26x1", {}, "neither attention nor an MLP"),
    ],
)
def test_a_tensor_axis_that_splits_nothing_is_an_error(variant, options, message):
    model = build_model(ModelConfig(variant, **options), 5, (32, 32))
    config = MeshConfig(tensor=2)
    with pytest.raises(ValueError, match=message):
        shapes = jax.eval_shape(model.init, jax.random.key(0))
        mesh = make_mesh(config)
        check_tensor_axis(mesh, state_shardings(mesh, config, shapes))


@pytest.mark.parametrize("placed", ["split", "unknown", "another"])
@pytest.mark.parametrize(
    ("layer", "shape", "inputs", "split"),
    [
        ("MlpBlock_0/Dense_0", (8, 16), 1, (2, 2, 2)),
        ("MlpBlock_0/Dense_1", (16, 8), 1, (1, 4, 2)),
        ("attention/query", (16, 2, 4), 1, (1, 4, 2)),
        ("attention/out", (2, 4, 16), 2, (2, 2, 2)),
        ("attention/out", (2, 4, 16), 2, (1, 8, 1)),
        ("head", (16, 6), 1, (2, 2, 2)),
    ],
)
def test_products_with_gathered_kernels(layer, shape, inputs, split, placed):
    """The product and both gradients are those of one device; gradients are reduce-scattered."""
    config = MeshConfig(*split, min_size=1)
    mesh = make_mesh(config)
    random = np.random.default_rng(0)
    kernel = random.normal(size=shape).astype(np.float32)
    flat = kernel.reshape(np.prod(shape[:inputs]), -1)
    tokens = () if layer == "head" else (3,)
    x, dy = (random.normal(size=(8, *tokens, n)).astype(np.float32) for n in flat.shape)
    name = f"encoder/{layer}/kernel"
    here = state_shardings(mesh, config, {name: kernel})
    assert "fsdp" in here[name].spec
    shapes = {name: jax.ShapeDtypeStruct(shape, np.float32, sharding=here[name])}
    if placed == "another":  # a teacher's kernel has the name of the student's
        shapes[name] = shapes[name].update(shape=(*shape[:-1], 64))
    shapes = {} if placed == "unknown" else shapes

    def compute(x, kernel, dy):
        with placed_as(shapes):
            multiply = partial(with_gathered, jnp.matmul, ("encoder", *layer.split("/")))
            y, back = jax.vjp(lambda x, kernel: multiply(x, kernel, inputs), x, kernel)
        return y, *back(dy)

    rows = batch_sharding(mesh)
    with use_mesh(mesh):
        given = (put_tree(x, rows), put_tree(kernel, here[name]), put_tree(dy, rows))
        program = jax.jit(compute, out_shardings=(rows, rows, here[name])).lower(*given).compile()
        y, dx, dk = program(*given)
    np.testing.assert_allclose(y, x @ flat, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(dx, dy @ flat.T, rtol=1e-4, atol=1e-4)
    expected = (x.reshape(-1, x.shape[-1]).T @ dy.reshape(-1, dy.shape[-1])).reshape(shape)
    np.testing.assert_allclose(dk, expected, rtol=1e-4, atol=1e-4)
    if placed == "split":
        lines = mesh.devices[:, 0, 0], mesh.devices[0, :, 0], mesh.devices[0, 0, :]
        data, fsdp, tensor = (tuple(device.id for device in line) for line in lines)
        found = [c for c in Program(program.as_text()).collectives if len(c.group) > 1]
        assert {c.group for c in found} <= {data, fsdp, tensor}
        part = kernel.nbytes // (split[2] if "tensor" in here[name].spec else 1)
        over = sorted((c.kind, c.bytes) for c in found if c.group == fsdp)
        assert over == [("all-gather", part), ("reduce-scatter", part)]
        assert {c.bytes for c in found if c.group == data} <= {part // split[1]}


@pytest.mark.parametrize("tile", [(1, 1), (8, 128)])
@pytest.mark.parametrize("sides", [(8,), (2, 4), (2, 2, 2)])
@pytest.mark.parametrize("axis", [0, 1])
def test_gathering_along_a_grids_sides_keeps_the_order(axis, sides, tile):
    """In several steps a kernel is as whole, and its gradient as large, as in one."""
    mesh, kernel = make_mesh(MeshConfig(fsdp=8)), np.arange(48.0, dtype=np.float32)
    kernel = kernel.reshape((16, 3) if axis == 0 else (3, 16))

    def gather(part):
        return _gather(part, axis, sides, tile)[None]

    def gathered(kernel):
        split = PartitionSpec(*[None] * axis, "fsdp")
        return jax.shard_map(gather, in_specs=split, out_specs=PartitionSpec("fsdp"))(kernel)

    with use_mesh(mesh):
        whole, back = jax.vjp(jax.jit(gathered), kernel)
        np.testing.assert_array_equal(whole, np.broadcast_to(kernel, (8, *kernel.shape)))
        weights = np.arange(8.0, dtype=np.float32)[:, None, None] + kernel
        np.testing.assert_array_equal(back(weights)[0], 28 + 8 * kernel)


def test_batches_divide():
    mesh = make_mesh(MeshConfig())
    check_batch_size(96, mesh, accumulation=4)
    with pytest.raises(ValueError, match=r"100 does not divide over 8 devices: .* \(96 or 104\)"):
        check_batch_size(100, mesh)
    with pytest.raises(ValueError, match=r"8 devices x 3 microbatches: .* \(24 or 48\)"):
        check_batch_size(8, mesh, accumulation=3)
    with pytest.raises(ValueError, match=r"batch size 0 .* \(8 or 16\)"):
        check_batch_size(0, mesh)
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=4))  # whose devices share their rows
    check_batch_size(2, mesh)
    with pytest.raises(ValueError, match=r"over 2 devices \(data x fsdp of 8\)"):
        check_batch_size(3, mesh)


@pytest.mark.parametrize(("tensor", "rows"), [(1, 2), (2, 4)])
def test_batches_and_parameters_arrive_whole(tensor, rows):
    config = MeshConfig(data=2, fsdp=-1, tensor=tensor, min_size=1)
    mesh = make_mesh(config)
    np.testing.assert_array_equal(local_rows(mesh, 16), np.arange(16))
    batch = {"image": np.arange(16 * 4).reshape(16, 4).astype(np.uint8)}
    placed = put_batch(mesh, batch)["image"]
    assert {s.data.shape for s in placed.addressable_shards} == {(rows, 4)}
    np.testing.assert_array_equal(placed, batch["image"])
    tree = {"kernel": np.arange(32.0, dtype=np.float32).reshape(4, 8)}
    placed = put_tree(tree, state_shardings(mesh, config, tree))["kernel"]
    assert {s.data.shape for s in placed.addressable_shards} == {(4, 2 * tensor)}
    np.testing.assert_array_equal(placed, tree["kernel"])
