"""The commands, started as their users start them: good input, bad input, and SIGKILL."""

import json
import random
import signal
import time

import numpy as np
import pytest
from processes import checkpoint_arrays, command, commands, pretrain, records, start

from vit_jax.training.metrics import read_metrics


@pytest.fixture(scope="module")
def up(tmp_path_factory):
    """The workdir of a pretraining of 12 steps."""
    workdir = tmp_path_factory.mktemp("up")
    code, _, err = command(*pretrain(workdir, 12))
    assert code == 0, err
    assert "step 12/12" in err and "img/s" in err and "ETA" in err  # plain lines off a terminal
    return workdir


@pytest.mark.long
def test_pretrain_transfer_evaluate(up, tmp_path):
    """The main use: a checkpoint passes through all three commands."""
    last = read_metrics(up)[-1]
    assert last["step"] == 12 and last["validation/examples"] == 20
    resolved = json.loads((up / "config.json").read_text())
    assert resolved["model"]["depth"] == 1 and resolved["optimizer"]["eps"] == 1e-8

    code, out, err = command(
        "transfer",
        "--config=configs/transfer/digits.py:steps=10",
        f"--config.init={up}",
        f"--workdir={tmp_path / 'down'}",
        "--config.model.depth=1",
        "--config.batch_size=16",
    )
    assert code == 0, err
    assert "initialised 2: head/bias, head/kernel" in out
    accuracy = read_metrics(tmp_path / "down")[-1]["test/accuracy"]

    cases = [
        (f"--output={tmp_path / 'result.json'}",),
        ("--protocol=fewshot", "--shots=1,5", "--seeds=2"),
        ("--protocol=fewshot", "--shots=1,5", "--seeds=2", "--random_weights"),
        ("--protocol=linear", "--l2=1e-3,1e-1"),
        ("--protocol=knn", "--neighbours=1,5"),
        ("--protocol=classification", "--dev_split=train[:200]"),
    ]
    evaluate = ("evaluate", f"--checkpoint={tmp_path / 'down'}", "--dataset=digits")
    ended = commands(tmp_path, [(*evaluate, *options) for options in cases])
    assert all(code == 0 for code, _, _ in ended), ended
    found = [json.loads(out) for _, out, _ in ended]
    assert found[0] == json.loads((tmp_path / "result.json").read_text())
    assert found[0]["accuracy"] == accuracy
    assert {"1shot", "5shot", "5shot_std"} == found[1].keys() - {"1shot_std"}
    assert found[1] != found[2]
    names = ("accuracy", "dev_accuracy", "5nn", "temperature")
    for result, name in zip((found[0], *found[3:]), names, strict=True):
        assert result[name] > 0 and result["examples"] == 599


@pytest.mark.long
def test_killed_at_any_moment_resumes_exactly(tmp_path):
    """SIGKILL between steps, during a save and at random; the result is bit-identical."""
    steps = 60
    code, _, err = command(*pretrain(tmp_path / "whole", steps))
    assert code == 0, err

    workdir = tmp_path / "killed"
    folder, metrics = workdir / "checkpoints", workdir / "metrics.jsonl"
    began_at = []

    def lines():
        return len(metrics.read_text().splitlines()) if metrics.exists() else 0

    def saving():
        return folder.is_dir() and any(not p.name.isdigit() for p in folder.iterdir())

    rng = random.Random(0)
    moments = [
        lambda: lines() >= 6,
        lambda: lines() >= 15 and saving(),
        lambda: lines() >= 25 and rng.random() < 0.2,
        lambda: lines() >= 40 and saving(),
    ]
    for moment in moments:
        process = start(*pretrain(workdir, steps))
        while not moment():
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        began_at.append(lines())
    assert began_at[-1] < steps
    code, _, err = command(*pretrain(workdir, steps))
    assert code == 0, err
    assert "resuming" in err

    expected, found = checkpoint_arrays(tmp_path / "whole"), checkpoint_arrays(workdir)
    assert expected.keys() == found.keys() and len(expected) > 30
    for name, array in expected.items():
        np.testing.assert_array_equal(array, found[name], err_msg=name)
    assert records(workdir) == records(tmp_path / "whole")


def test_another_config_is_refused(up, tmp_path):
    before = (up / "config.json").read_text()
    other = tmp_path / "other"
    unset = [f"--config.{field}=none" for field in ("optimizer.clip_norm", "eval_every")]
    refused, finished, started = commands(
        tmp_path,
        [
            pretrain(up, 12, "--config.optimizer.b1=0.8"),
            pretrain(up, 12, "--config.log_every=2"),  # may change
            pretrain(other, 12, "--config.epochs=1e-5", "--config.schedule.warmup=0", *unset),
        ],
    )
    assert started[0] == 0, started
    resolved = json.loads((other / "config.json").read_text())
    assert (resolved["steps"], resolved["epochs"]) == (None, 1e-5)
    assert resolved["optimizer"]["clip_norm"] is None and resolved["eval_every"] is None
    assert refused[0] == 1
    assert "optimizer.b1: 0.9 there, 0.8 here" in refused[2] and "Traceback" not in refused[2]
    assert (up / "config.json").read_text() == before.replace('"log_every": 1', '"log_every": 2')
    assert finished[0] == 0, finished
    assert "is finished: 12 steps" in finished[2]


BAD = {
    "--config.model.variant=ViT-nan/8": "did you mean 'ViT-nano/8'",
    "--config.data.dataset=digit": "did you mean 'digits'",
    "--config.data.dataset=cifar10": "tfds build cifar10 --file_format=array_record",
    "--config.data.split=trian": "did you mean 'train'",
    "--config.bacth_size=8": "did you mean 'batch_size'",
    "--config.optimizer.nam=sgd": "did you mean 'name'",
    "--config.modle.depth=2": 'Did you mean "model"',
    "--config.accumulation=3": "does not divide over 1 devices x 3 microbatches",
    "--config.image_size=30": "use a multiple of 8 (24 or 32)",
    "--config.data.preprocess=resise": "did you mean 'resize'",
    "--config.steps=none": "steps = None and epochs = None: set exactly one of them",
    "--config.batch_size=none": "config.batch_size = 'none': expected int",
    "--config.modle.depth=none": 'Did you mean "model"',
    "--config=configs/pretrain/none.py": "configs/pretrain/none.py",
    "--config.evaluators.validation.data.preprocess=crop": "unknown preprocessing op 'crop'",
    "--config.classification.validation.data.preprocess=crop": "is now --config.evaluators",
    "--workdir=": "say where to keep this run with --workdir",
    "--workdir=/proc/run": "/proc/run",
}


def test_bad_input_is_explained_at_once(tmp_path):
    """Before anything is compiled, without a traceback, and with nothing left behind."""
    data = f"--config.data.data_dir={tmp_path}"
    folders = [tmp_path / f"run{i}" for i in range(len(BAD))]
    cases = [pretrain(run, 4, data, bad) for run, bad in zip(folders, BAD, strict=True)]
    for bad, run, (code, _, err) in zip(BAD, folders, commands(tmp_path, cases), strict=True):
        assert code == 1, (bad, err)
        assert BAD[bad] in err, (bad, err)
        assert "Traceback" not in err and "compiled" not in err, (bad, err)
        assert not list(run.glob("*")), bad


def test_a_checkpoint_of_another_architecture(up, tmp_path):
    transfer = ("transfer", "--config=configs/transfer/digits.py", f"--workdir={tmp_path / 'down'}")
    cases = [(*transfer, f"--config.init={init}") for init in (up, tmp_path / "nothing")]
    deeper, missing = commands(tmp_path, cases)  # depth 4 against 1
    assert deeper[0] == missing[0] == 1
    assert "encoderblock_3/LayerNorm_0/bias: (96,) in the model, not in the check" in deeper[2]
    assert "Traceback" not in deeper[2]
    assert "no checkpoint at" in missing[2]
