"""Meshes and sharding rules."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from vit_jax.parallel.mesh import (
    MeshConfig,
    check_batch_size,
    local_rows,
    make_mesh,
    put_batch,
    put_tree,
    state_shardings,
)


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (MeshConfig(), {"data": 8, "fsdp": 1}),
        (MeshConfig(data=-1, fsdp=4), {"data": 2, "fsdp": 4}),
        (MeshConfig(data=1, fsdp=-1), {"data": 1, "fsdp": 8}),
    ],
)
def test_shapes(config, shape):
    assert dict(make_mesh(config).shape) == shape


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(data=-1, fsdp=-1), "at most one -1"),
        (MeshConfig(data=0), "positive sizes"),
        (MeshConfig(data=3, fsdp=2), "data=3 x fsdp=2 does not fit 8 devices"),
        (MeshConfig(data=-1, fsdp=3), "does not fit 8 devices"),
        (MeshConfig(rules=((".*", "split"),)), "'replicate' or 'fsdp'"),
    ],
)
def test_bad_meshes(config, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(config)


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


def test_batches_divide():
    mesh = make_mesh(MeshConfig())
    check_batch_size(96, mesh, accumulation=4)
    with pytest.raises(ValueError, match=r"100 does not divide over 8 devices: .* \(96 or 104\)"):
        check_batch_size(100, mesh)
    with pytest.raises(ValueError, match=r"8 devices x 3 microbatches: .* \(24 or 48\)"):
        check_batch_size(8, mesh, accumulation=3)
    with pytest.raises(ValueError, match=r"batch size 0 .* \(8 or 16\)"):
        check_batch_size(0, mesh)


def test_batches_and_parameters_arrive_whole():
    config = MeshConfig(data=2, fsdp=4, min_size=1)
    mesh = make_mesh(config)
    np.testing.assert_array_equal(local_rows(mesh, 16), np.arange(16))
    batch = {"image": np.arange(16 * 4).reshape(16, 4).astype(np.uint8)}
    placed = put_batch(mesh, batch)["image"]
    assert {s.data.shape for s in placed.addressable_shards} == {(2, 4)}
    np.testing.assert_array_equal(placed, batch["image"])
    tree = {"kernel": np.arange(32.0, dtype=np.float32).reshape(4, 8)}
    placed = put_tree(tree, state_shardings(mesh, config, tree))["kernel"]
    assert {s.data.shape for s in placed.addressable_shards} == {(4, 2)}
    np.testing.assert_array_equal(placed, tree["kernel"])
