"""BiT's names <-> ours of a pre-activation ResNet."""

from functools import partial

import chex
import jax
import numpy as np
import pytest

from vit_jax.models.variants import ModelConfig, build_model
from vit_jax.weights.adapt import flatten
from vit_jax.weights.bit import from_bit, to_bit

assert_same = partial(chex.assert_trees_all_equal, strict=True)


def shapes(**options):
    config = ModelConfig("R50x1", stem_width=32, **options)
    return flatten(jax.eval_shape(build_model(config, 10, (64, 64)).init, jax.random.key(0)))


def test_names_and_values(golden):
    published, _ = golden("resnet_v2_bit")
    read = from_bit(published)
    assert {k: v.shape for k, v in read.items()} == {
        k: v.shape for k, v in shapes(stages=(1, 2)).items()
    }
    for ours, bit in {
        "conv_root/kernel": "root_block/standardized_conv2d/kernel",
        "block1/unit1/conv_proj/kernel": "block1/unit01/a/proj/standardized_conv2d/kernel",
        "block1/unit1/conv1/kernel": "block1/unit01/a/standardized_conv2d/kernel",
        "block2/unit2/conv2/kernel": "block2/unit02/b/standardized_conv2d/kernel",
        "block2/unit2/gn1/scale": "block2/unit02/a/group_norm/gamma",
        "block2/unit2/gn3/bias": "block2/unit02/c/group_norm/beta",
        "gn_head/scale": "group_norm/gamma",
        "gn_head/bias": "group_norm/beta",
        "head/bias": "head/conv2d/bias",
    }.items():
        np.testing.assert_array_equal(read[ours], published[f"resnet/{bit}"])
    np.testing.assert_array_equal(
        read["head/kernel"], published["resnet/head/conv2d/kernel"].reshape(256, 10)
    )
    assert_same(to_bit(read), published)


def test_round_trip_of_many_units():
    rng = np.random.default_rng(0)
    arrays = {
        name: rng.normal(size=leaf.shape).astype(np.float32)
        for name, leaf in shapes(stages=(1, 11)).items()
    }
    bit = to_bit(arrays)
    assert "resnet/block2/unit09/a/group_norm/gamma" in bit
    assert "resnet/block2/unit11/c/standardized_conv2d/kernel" in bit
    assert_same(from_bit(bit), arrays)


def test_counted_convolutions(golden):
    published, _ = golden("resnet_v2_bit")
    counted = {
        name.replace("standardized_conv2d", f"standardized_conv2d_{i}"): array
        for i, (name, array) in enumerate(published.items())
    }
    assert counted.keys() != published.keys()
    assert_same(from_bit(counted), from_bit(published))
    name = "resnet/root_block/standardized_conv2d/kernel"
    with pytest.raises(ValueError, match="standardized_conv2d_3/kernel are both conv_root/kernel"):
        from_bit({name: np.ones(1), name.replace("conv2d", "conv2d_3"): np.ones(1)})


def test_other_names():
    other = {"resnet/new/kernel": np.ones(1), "extra": np.ones(2)}
    assert_same(from_bit(other), other)
    with pytest.raises(
        ValueError, match=r"BiT's ResNets have no block1/unit1/gn_proj/bias.*gn_root"
    ):
        to_bit(shapes(stages=(1,), preactivation=False))
    with pytest.raises(ValueError, match="no stage_features: use another format"):
        to_bit(shapes(stages=(1, 1), stage_features=True))
