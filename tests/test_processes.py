"""Several processes are one run: pretraining, evaluation, checkpoint and transfer."""

import numpy as np
import pytest
from processes import TINY, checkpoint_arrays, records, start
from test_survival import cluster, finish

STEPS = 4
MODEL = (
    *("--config.model.width=32", "--config.model.mlp_dim=64", "--config.model.num_heads=8"),
    *("--config.model.depth=1", "--config.mesh.min_size=64", "--config.log_every=1"),
)
PRETRAIN = (*MODEL, "--config.model.representation_size=32", *TINY)
TRANSFER = (
    *(*MODEL, f"--config.steps={STEPS}", "--config.schedule.warmup=1", "--config.batch_size=8"),
    *("--config.classification.test.batch_size=64", "--config.optimizer.eps=1e-6"),
)


def commands(folder, mesh):
    """Pretraining, and transfer of what it gives."""
    data, fsdp, tensor = mesh
    mesh = tuple(
        f"--config.mesh.{name}={n}"
        for name, n in (("data", data), ("fsdp", fsdp), ("tensor", tensor))
    )
    first = f"--config=configs/pretrain/formula.py:classes=10,steps={STEPS}"
    yield ("pretrain", first, f"--workdir={folder / 'first'}", *PRETRAIN, *mesh)
    second = ("transfer", "--config=configs/transfer/digits.py", f"--workdir={folder / 'second'}")
    yield (*second, f"--config.init={folder / 'first'}", *TRANSFER, *mesh)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same on one device."""
    folder = tmp_path_factory.mktemp("alone")
    for command in commands(folder, (1, 1, 1)):
        codes, errors = finish([start(*command, JAX_NUM_CPU_DEVICES="1")])
        assert codes == [0], errors
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "mesh"),
    [
        (2, (2, 2, 2)),  # each process has half of the batch
        (4, (1, 2, 8)),  # two of them share their rows: heads lie on both
    ],
)
def test_four_devices_in_each_process(alone, tmp_path, processes, mesh):
    for command in commands(tmp_path, mesh):
        codes, errors = finish(cluster(processes, 4, lambda i, command=command: command), 600)
        assert codes == [0] * processes, errors
    for name in ("first", "second"):
        expected, found = checkpoint_arrays(alone / name), checkpoint_arrays(tmp_path / name)
        assert expected.keys() == found.keys()
        for path, array in expected.items():
            if path != "step":
                np.testing.assert_allclose(array, found[path], atol=1e-5, rtol=0, err_msg=path)
        ours, theirs = records(tmp_path / name), records(alone / name)
        assert [r["step"] for r in ours] == [r["step"] for r in theirs]
        for a, b in zip(ours, theirs, strict=True):
            assert a == pytest.approx(b, abs=1e-4)
    assert any("accuracy" in key for record in ours for key in record if "/" in key)
