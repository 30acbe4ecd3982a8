"""A run's steps are taken again, and what isn't finite is followed to where it came from."""

import re

import jax
import jax.numpy as jnp
import pytest

from vit_jax.parallel.mesh import use_mesh
from vit_jax.replay import open_run, replay, state_before
from vit_jax.training.loop import pretrain
from vit_jax.training.metrics import read_metrics
from vit_jax.training.origins import Examination, describe, layer_of
from vit_jax.training.repeat import examine, take_steps

RECIPE = {
    "model": {"variant": "ViT-mu/8", "dtype": "float32", "depth": 2, "mlp_dim": 16},
    "data": {"dataset": "digits", "preprocess": "resize|flip"},
    "image_size": 8,
    "batch_size": 8,
    "steps": 5,
    "schedule": {"peak": 1e-2, "warmup": 2},
    "optimizer": {"name": "sgd"},
    "checkpoint": {"every": 2, "keep_last": 9},
    "log_every": 1,
    "compilation_cache": "",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    pretrain(RECIPE, workdir)
    return workdir


def test_steps_are_those_of_the_run(finished):
    """On one device, in two microbatches: the same values up to rounding."""
    training, source = open_run(finished, microbatch=4)
    assert training.mesh.size == 1 and training.config.accumulation == 2
    recorded = {record["step"]: record for record in read_metrics(finished)}
    with use_mesh(training.mesh):
        state = state_before(training, finished, 4)
        assert int(state.step) == 2
        steps = list(take_steps(training, source, state, 4))
    assert [step.number for step in steps] == [3, 4]
    for step in steps:
        for name in ("loss", "grad_norm", "update_norm", "accuracy"):
            assert step.values[name] == pytest.approx(recorded[step.number][name], rel=1e-4)
        layers = [v for k, v in step.values.items() if k.startswith("gradient ")]
        assert sum(v**2 for v in layers) ** 0.5 == pytest.approx(step.values["grad_norm"], rel=1e-4)


@pytest.mark.long
def test_an_overflow_in_one_layer_is_named(finished):
    training, source = open_run(finished, microbatch=64)
    with use_mesh(training.mesh):
        state = state_before(training, finished, 1)
        block = state.params["Transformer"]["encoderblock_1"]
        block["LayerNorm_1"]["scale"] = jnp.full_like(block["LayerNorm_1"]["scale"], 1e20)
        kernel = block["MlpBlock_0"]["Dense_0"]["kernel"]
        block["MlpBlock_0"]["Dense_0"]["kernel"] = kernel.at[0].set(1e30)
        (step,) = take_steps(training, source, state, 1)
        assert not step.is_finite
        origin, activations = examine(training, step)
    assert origin.phase == "forward"
    assert origin.layer == "Transformer/encoderblock_1/MlpBlock_0/Dense_0"
    assert origin.largest == pytest.approx(1e30)
    assert activations["Transformer/encoderblock_0"][0] < 100


@pytest.mark.long
def test_the_page_and_what_is_refused(finished):
    summary, page = replay(finished, 5, shown=3)
    assert summary[0] == "begins with the state after step 4"
    assert "everything in it is finite" in summary
    assert len(re.findall("<img", page)) == 3 and "encoderblock_1" in page
    with pytest.raises(ValueError, match="--step=6: expected 1 to 5, the run's steps"):
        replay(finished, 6)
    with pytest.raises(FileNotFoundError, match="holds no run"):
        replay(finished / "checkpoints", 1)


def test_constants_that_are_infinite_are_no_fault():
    def masked(x):
        scores = jnp.where(x > 0, x, -jnp.inf)
        return jax.nn.softmax(scores).sum(), jnp.where(x > 0, jnp.log(x), 0.0).sum()

    def broken(x):
        return jax.lax.scan(lambda carry, row: (carry * row, carry), 1e30, x)[0]

    examination = Examination()
    for function, x in ((masked, jnp.array([1.0, 0.0, 2.0])), (broken, jnp.full(3, 1e20))):
        jaxpr = jax.make_jaxpr(function)(x)
        outputs = examination.run(jaxpr, examination.arguments(x))
        origins = [value.origin for value in outputs if value.origin]
        assert bool(origins) == (function is broken)
    assert origins[0].operation == "mul" and origins[0].largest == pytest.approx(1e30)


@pytest.mark.parametrize(
    ("scope", "layer", "phase"),
    [
        ("jvp(ViT)/Transformer/encoderblock_0/Dense_0/Dense_0.product",
         "Transformer/encoderblock_0/Dense_0", "forward"),
        ("[1]/transpose(jvp(ViT))/Transformer/encoderblock[3]/jvp(ViT)/Transformer/encoderblock[3]"
         "/rematted_computation/LayerNorm_0",
         "Transformer/encoderblock[3]/LayerNorm_0", "backward"),
        ("jvp()", "", "forward"),
        ("", "", "update"),
    ],
)  # fmt: skip
def test_names_of_scopes(scope, layer, phase):
    assert describe(scope) == (layer, phase)
    block = "/".join(layer.split("/")[:2]).replace("[3]", "_3")  # as if unrolled
    assert not layer or layer_of(layer) == block
