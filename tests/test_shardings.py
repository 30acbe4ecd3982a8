"""Golden shardings of every array of a train state, for the models that are pretrained.

A change of rules, names or shapes shows as a difference of tests/golden/shardings.json; where it is
meant, `python tests/test_shardings.py` writes the file again.
"""

import json
import math
from functools import lru_cache, partial
from pathlib import Path

import jax
import pytest
from jax.sharding import AbstractMesh

from vit_jax.costs.compiled import memory
from vit_jax.data.pipeline import DataConfig
from vit_jax.models.variants import ModelConfig, build_model
from vit_jax.parallel.mesh import (
    AXES,
    MeshConfig,
    make_mesh,
    path_name,
    replicated,
    state_shardings,
)
from vit_jax.training.memory import compile_init
from vit_jax.training.optimizer import OptimizerConfig, ScheduleConfig, make_optimizer
from vit_jax.training.recipe import TrainConfig, build_training
from vit_jax.training.step import start_state

GOLDEN = Path(__file__).parent / "golden" / "shardings.json"
# Model (and another optimizer), optimizer, fields of the model, mesh: 128 devices.
MODELS = {
    "ViT-B/16": ("adamw", {"scan": True}, (4, 16, 2)),
    "ViT-L/16": ("adamw", {"scan": True}, (4, 16, 2)),
    "ViT-L/16 muon": ("muon", {"scan": True}, (4, 16, 2)),
    "ViT-H/14": ("adamw", {"scan": True}, (1, 32, 4)),
    "ViT-G/14": ("adafactor", {"scan": True, "pool": "map"}, (1, 64, 2)),
    "R50x1": ("sgd", {}, (8, 16, 1)),
    "R50+ViT-B/16": ("adamw", {"scan": True}, (4, 16, 2)),
}


@lru_cache
def shapes_and_shardings(variant, min_size=MeshConfig.min_size):
    """Returns the train state for 1,000 classes: (shapes, shardings), by path."""
    optimizer, options, sizes = MODELS[variant]
    model = build_model(ModelConfig(variant.split()[0], **options), 1000, (224, 224))
    params = jax.eval_shape(model.init, jax.random.key(0))
    made = make_optimizer(OptimizerConfig(optimizer), lambda step: step, 1.0, params)
    state = jax.eval_shape(partial(start_state, optimizer=made, use_ema=False), params)
    config = MeshConfig(**dict(zip(AXES, sizes, strict=True)), min_size=min_size)
    placed = state_shardings(AbstractMesh(sizes, AXES), config, state)
    return tuple(
        {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (state, placed)
    )


def described(variant):
    """Formats shapes and shardings as in the golden file."""
    shapes, shardings = shapes_and_shardings(variant)
    return {
        "optimizer": MODELS[variant][0],
        "mesh": dict(zip(AXES, MODELS[variant][2], strict=True)),
        "shardings": {
            path: f"{list(shape.shape)} {[axis or '-' for axis in shardings[path].spec]}"
            for path, shape in shapes.items()
        },
    }


@pytest.mark.parametrize("variant", MODELS)
def test_shardings(variant):
    assert described(variant) == json.loads(GOLDEN.read_text())[variant]


@pytest.mark.parametrize("variant", MODELS)
def test_nothing_large_is_whole_anywhere(variant):
    """A device holds little more than its share: the rules split every large array."""
    min_size = 2**19  # of a B/16's attention kernels in the block that isn't stacked, too
    shapes, shardings = shapes_and_shardings(variant, min_size)
    whole = part = 0
    for path, shape in shapes.items():
        size = shape.size * shape.dtype.itemsize
        held = math.prod(shardings[path].shard_shape(shape.shape)) * shape.dtype.itemsize
        whole, part = whole + size, part + held
        assert held < size or shape.size < min_size, path
    _, fsdp, tensor = MODELS[variant][2]
    if variant.startswith("ViT"):  # a ResNet's kernels are small, and many
        assert part < 1.6 * whole / (fsdp * tensor)


def test_a_state_is_born_sharded():
    """During initialization, too, a device holds little more than its eighth."""
    config = TrainConfig(
        model=ModelConfig("ViT-G/14", width=256, depth=4, mlp_dim=1024, scan=True),
        data=DataConfig("strokes/10"),
        image_size=28,
        batch_size=8,
        steps=2,
        schedule=ScheduleConfig(1e-3, warmup=1),
        mesh=MeshConfig(fsdp=8, min_size=2**12),
    )
    training = build_training(config, make_mesh(config.mesh), 10, 100)
    program = compile_init(training)
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(training.shapes))
    assert memory(program).peak < 0.3 * whole
    key = jax.device_put(jax.random.key(0), replicated(training.mesh))
    state = program(key)
    parts = [shard.data for leaf in jax.tree.leaves(state) for shard in leaf.addressable_shards]
    assert sum(part.nbytes for part in parts) < 1.1 * whole


if __name__ == "__main__":
    GOLDEN.write_text(
        json.dumps({variant: described(variant) for variant in MODELS}, indent=1) + "\n"
    )
