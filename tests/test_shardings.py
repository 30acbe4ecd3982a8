"""Where every array of a train state lies: golden, for the models that are pretrained.

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

from vit_jax.models.variants import ModelConfig, build_model
from vit_jax.parallel.mesh import AXES, MeshConfig, path_name, state_shardings
from vit_jax.training.optimizer import OptimizerConfig, make_optimizer
from vit_jax.training.step import start_state

GOLDEN = Path(__file__).parent / "golden" / "shardings.json"
# Model, optimizer, fields of the model, mesh: 128 devices.
MODELS = {
    "ViT-B/16": ("adamw", {"scan": True}, (4, 16, 2)),
    "ViT-L/16": ("adamw", {"scan": True}, (4, 16, 2)),
    "ViT-H/14": ("adamw", {"scan": True}, (1, 32, 4)),
    "ViT-G/14": ("adafactor", {"scan": True, "pool": "map"}, (1, 64, 2)),
    "R50x1": ("sgd", {}, (8, 16, 1)),
    "R50+ViT-B/16": ("adamw", {"scan": True}, (4, 16, 2)),
}


@lru_cache
def shapes_and_shardings(variant):
    """The train state of 1,000 classes: (shapes, shardings), by path."""
    optimizer, options, sizes = MODELS[variant]
    model = build_model(ModelConfig(variant, **options), 1000, (224, 224))
    params = jax.eval_shape(model.init, jax.random.key(0))
    made = make_optimizer(OptimizerConfig(optimizer), lambda step: step, 1.0, params)
    state = jax.eval_shape(partial(start_state, optimizer=made, use_ema=False), params)
    config = MeshConfig(**dict(zip(AXES, sizes, strict=True)))
    placed = state_shardings(AbstractMesh(sizes, AXES), config, state)
    return tuple(
        {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (state, placed)
    )


def described(variant):
    """As the file has it."""
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
    """A device has its part and little more: no large array escapes the rules."""
    shapes, shardings = shapes_and_shardings(variant)
    whole = part = 0
    for path, shape in shapes.items():
        size = shape.size * shape.dtype.itemsize
        held = math.prod(shardings[path].shard_shape(shape.shape)) * shape.dtype.itemsize
        whole, part = whole + size, part + held
        assert held < size or shape.size < MeshConfig.min_size, path
    _, fsdp, tensor = MODELS[variant][2]
    if variant.startswith("ViT"):  # a ResNet's kernels are small, and many
        assert part < 1.6 * whole / (fsdp * tensor)


if __name__ == "__main__":
    GOLDEN.write_text(
        json.dumps({variant: described(variant) for variant in MODELS}, indent=1) + "\n"
    )
