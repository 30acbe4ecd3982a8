"""Updates that are left out when gradients spike."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from processes import checkpoint_arrays, records

from vit_jax.config import build
from vit_jax.training.loop import pretrain
from vit_jax.training.recipe import TrainConfig
from vit_jax.training.spikes import FEWEST, MOST, WINDOW, skip_spikes

RECIPE = {
    "model": {"variant": "ViT-mu/8", "dtype": "float32", "mlp_dim": 16},
    "data": {"dataset": "digits", "preprocess": "resize"},
    "image_size": 8,
    "batch_size": 8,
    "steps": 4,
    "schedule": {"peak": 1e-2, "warmup": 2},
    "checkpoint": {"every": 2},
    "log_every": 1,
    "compilation_cache": "",
    "skip_spikes": 1.5,
}


def norms(*given):
    """The sizes of the updates that gradients of these norms make, and the state after them."""
    optimizer = skip_spikes(optax.trace(0.5), factor=3.0)
    state = optimizer.init(jnp.zeros(1))
    update, sizes = jax.jit(optimizer.update), []
    for norm in given:
        updates, state = update(jnp.full(1, norm), state, jnp.zeros(1))
        sizes.append(float(updates[0]))
    return sizes, state


def test_a_spike_is_left_out_and_leaves_no_trace():
    usual = [1.0] * FEWEST
    with_spike, state = norms(*usual, 3.1, 1.0)
    without, _ = norms(*usual, 1.0)
    assert with_spike[FEWEST] == 0.0 and with_spike[FEWEST + 1] == without[FEWEST]
    assert int(state.skipped) == 1 and int(state.seen) == FEWEST + 2
    assert norms(*usual, 2.9)[0][-1] > 2.9
    assert norms(*usual[1:], 3.1)[0][-1] > 3.1  # too few to tell


def test_a_norm_that_stays_high_becomes_the_usual_one():
    sizes, state = norms(*[1.0] * WINDOW, *[100.0] * WINDOW)
    left_out = [i for i, size in enumerate(sizes) if size == 0.0]
    assert left_out == list(range(WINDOW, WINDOW + MOST)) and int(state.skipped) == MOST


@pytest.mark.long
def test_its_state_is_kept_and_a_run_goes_on_bit_by_bit(tmp_path, monkeypatch):
    """A spike in step 3: without it the run would differ."""
    monkeypatch.setattr("vit_jax.training.spikes.FEWEST", 2)
    monkeypatch.setattr("vit_jax.training.spikes.MOST", 1)
    values = {**RECIPE, "skip_spikes": 1.0000001}
    pretrain(values, tmp_path / "whole")
    counted = [record["spikes"] for record in records(tmp_path / "whole") if "spikes" in record]
    assert counted[:2] == [0.0, 0.0] and counted == sorted(counted) and counted[-1] <= 1.0
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "4")
    pretrain(values, tmp_path / "resumed")
    found, expected = (checkpoint_arrays(tmp_path / name) for name in ("resumed", "whole"))
    assert found.keys() == expected.keys() and any("norms" in name for name in expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    assert records(tmp_path / "resumed") == records(tmp_path / "whole")


def test_what_is_no_factor():
    with pytest.raises(ValueError, match=r"skip_spikes = 1\.0: expected more than 1, such as 5"):
        build(TrainConfig, {**RECIPE, "skip_spikes": 1.0})
    assert build(TrainConfig, {**RECIPE, "skip_spikes": None}).skip_spikes is None
    assert np.isfinite(build(TrainConfig, RECIPE).skip_spikes)
