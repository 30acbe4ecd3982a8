"""What a run survives: preemption, damaged checkpoints, dead processes; and branching off."""

import asyncio
import dataclasses
import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import chex
import jax
import numpy as np
import pytest
from orbax.checkpoint._src.path import atomicity
from processes import cluster, command, equal_runs, finish, pretrain, records, start

from experiments.campaigns.kills import run_digests
from vit_jax.classifier.workflow import run_workflow
from vit_jax.config import build
from vit_jax.data.pipeline import open_data
from vit_jax.parallel.lanes import make_lanes
from vit_jax.parallel.multihost import PREEMPTED, Preemption
from vit_jax.training import checkpoint, loop
from vit_jax.training import run as training_run
from vit_jax.training.metrics import Metrics, read_metrics
from vit_jax.weights import checksums
from vit_jax.weights.trained import load


def run(workdir, **changes):
    return loop.train(prepare(workdir, **changes))


def prepare(workdir, **changes):
    values = {
        "model": {"variant": "ViT-mu/8", "dtype": "float32"},
        "data": {"dataset": "digits", "preprocess": "resize|flip"},
        "image_size": 16,
        "batch_size": 16,
        "steps": 8,
        "schedule": {"peak": 1e-2, "warmup": 2},
        "checkpoint": {"every": 2},
        "log_every": 1,
        "eval_every": 3,
        "evaluators": {"test": {"data": {"dataset": "digits", "split": "test[:50]"}}},
        **changes,
    }
    config = build(loop.TrainConfig, values)
    return loop.prepare(config, str(workdir), lane=make_lanes(1)[0])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Returns an uninterrupted run."""
    workdir = tmp_path_factory.mktemp("whole")
    run(workdir)
    return workdir


def assert_equal_runs(workdir, other):
    ours, theirs = (load(path).params for path in (workdir, other))
    chex.assert_trees_all_equal(ours, theirs)
    assert records(workdir) == records(other)


def preempt_at(monkeypatch, step):
    monkeypatch.setattr(Preemption, "reached", lambda self, done: done == step)


@pytest.mark.long
@pytest.mark.parametrize("step", [3, 4])
def test_preempted_equals_uninterrupted(whole, tmp_path, monkeypatch, step):
    """Also at step 3 without time left for its evaluation, and at step 4 by Ctrl-C."""
    with monkeypatch.context() as patch:
        preempt_at(patch, step)
        if step == 4:
            stopped = property(lambda self: True, lambda *_: None)
            patch.setattr(Preemption, "interrupted", stopped, raising=False)
            with pytest.raises(KeyboardInterrupt, match="stopped at step 4; the same command"):
                run(tmp_path)
        else:
            with pytest.raises(SystemExit) as stopped:
                run(tmp_path)
            assert stopped.value.code == PREEMPTED == 75
    assert read_metrics(tmp_path)[-1]["step"] == step
    run(tmp_path)
    assert_equal_runs(tmp_path, whole)


@pytest.mark.long
def test_sigterm_saves_and_says_how_to_go_on(tmp_path):
    """Sends the real signal to the real command."""
    code, _, err = command(*pretrain(tmp_path / "whole", 40))
    assert code == 0, err
    workdir = tmp_path / "preempted"
    process = start(*pretrain(workdir, 40))
    metrics = workdir / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") > 5):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == PREEMPTED, err
    last = read_metrics(workdir)[-1]["step"]
    assert f"step {last} is saved" in err and f"told to end after step {last}:" in err
    assert last < 40
    assert (workdir / "checkpoints" / str(last)).is_dir()  # what was said is kept
    code, _, err = command(*pretrain(workdir, 40))
    assert code == 0, err
    assert f"from step {last} of 40" in err
    assert records(workdir) == records(tmp_path / "whole")


def largest_file(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip(folder):
    """Changes one bit of a tensor."""
    file = largest_file(folder)
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 1
    file.write_bytes(content)


DAMAGE = {
    "a flipped bit": lambda folder: flip(folder / "training"),
    "a missing file": lambda folder: largest_file(folder / "params").unlink(),
    "a missing item": lambda folder: (folder / "training").rename(folder.parent.parent / "gone"),
    "an empty file": lambda folder: largest_file(folder / "training").write_bytes(b""),
    "another file's contents": lambda folder: largest_file(folder / "params").write_bytes(
        os.urandom(10_000)
    ),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_left_for_the_one_before(
    whole, tmp_path, monkeypatch, capsys, damage
):
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        preempt_at(patch, 5)
        run(tmp_path)
    damage(tmp_path / "checkpoints" / "5")
    run(tmp_path)
    said = capsys.readouterr().err
    assert "checkpoints/5 can't be read" in said
    assert "from step 4 of 8" in said
    assert (tmp_path / "unreadable" / "5").is_dir()
    assert_equal_runs(tmp_path, whole)


def test_a_state_that_cannot_be_used_stops_until_told(whole, tmp_path, monkeypatch, capsys):
    """All checkpoints are damaged, then the data has other classes, then all is lost."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    good = {
        path: path.read_bytes()
        for path in sorted((tmp_path / "checkpoints").rglob("*"))
        if path.is_file()
    }

    def refused(message, **changes):
        before = contents(tmp_path)
        with pytest.raises(ValueError, match=message) as error:
            run(tmp_path, **changes)
        assert "--config.start_over=True" in str(error.value)
        assert contents(tmp_path) == before

    for step in (6, 8):
        largest_file(tmp_path / "checkpoints" / str(step) / "params").unlink()
    for _ in range(2):
        refused(r"no checkpoint in .* can be read: all are damaged\n  step 8: params/.* is missing")
    for path, content in good.items():
        path.write_bytes(content)
    with monkeypatch.context() as patch:
        patch.setattr(training_run, "open_data", more_classes)
        refused("train: 10 classes then, 11 now", evaluators={})
        (tmp_path / "data.json").unlink()  # as the run of an earlier version
        refused(r"params.head.bias: \(10,\) in the checkpoint, \(11,\) in the", evaluators={})
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").unlink()
    refused("holds a run at step 8, and no config.json")
    (tmp_path / "config.json").write_text(config)
    shutil.move(tmp_path / "checkpoints", tmp_path / "elsewhere")
    refused("has saved step 8, and no checkpoint")

    run(tmp_path, start_over=True)
    assert "this is moved to" in capsys.readouterr().err
    assert (tmp_path / "started_over" / "0" / "elsewhere" / "8").is_dir()
    assert_equal_runs(tmp_path, whole)
    before = contents(tmp_path)
    run(tmp_path, start_over=True)  # what can be used is never moved
    assert contents(tmp_path) == before


def with_nan(workdir, prepared):
    """Saves step 8 again, with one value of the optimizer's state that isn't finite."""
    folder = workdir / "checkpoints" / "8"
    state = checkpoint.restore(folder, prepared.placed_shapes)
    leaves, tree = jax.tree.flatten(state.opt_state)
    largest = max(range(len(leaves)), key=lambda i: leaves[i].size)
    leaves[largest] = leaves[largest].at[0].set(np.nan)
    shutil.rmtree(folder)
    with checkpoint.Checkpoints(workdir, prepared.config.checkpoint, print) as checkpoints:
        state = dataclasses.replace(state, opt_state=tree.unflatten(leaves))
        checkpoints.save(state, prepared.description)


def without_checksums(workdir, prepared):
    """Saves step 8 as an earlier version did, and truncates one of its files."""
    folder = workdir / "checkpoints" / "8"
    (folder / checksums.FILE).unlink()
    file = largest_file(folder / "training")
    file.write_bytes(file.read_bytes()[:1000])


@pytest.mark.parametrize("damage", [with_nan, without_checksums])
def test_damage_that_no_checksum_tells(whole, tmp_path, capsys, damage):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    damage(tmp_path, prepare(tmp_path))
    run(tmp_path)
    assert "checkpoints/8 can't be read, damaged: using step 6" in capsys.readouterr().err
    assert_equal_runs(tmp_path, whole)


def test_what_is_no_damage_is_reported_as_itself(whole, tmp_path, monkeypatch):
    """If memory runs out or a disk doesn't answer, no checkpoint is moved."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    before = contents(tmp_path)

    def failing(*_, **__):
        raise raised

    for raised, place in (
        (OSError(errno.EIO, "Input/output error"), (checksums, "_sum")),
        (OSError(errno.ESTALE, "Stale file handle"), (checkpoint.ocp.Checkpointer, "restore")),
        (MemoryError("no room"), (checkpoint.ocp.Checkpointer, "restore")),
        (ValueError("RESOURCE_EXHAUSTED: no room"), (checkpoint.ocp.Checkpointer, "restore")),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(*place, failing)
            with pytest.raises(type(raised)) as found:
                run(tmp_path)
        assert found.value is raised
        assert contents(tmp_path) == before


def test_a_flipped_bit_is_no_model(whole, tmp_path):
    """load, evaluate, convert and predict reject a damaged checkpoint."""
    shutil.copytree(whole, tmp_path / "run")
    flip(tmp_path / "run" / "checkpoints" / "8" / "params")
    good = tmp_path / "run" / "checkpoints" / "6"
    with pytest.raises(ValueError, match=rf"8 is damaged .*: use the one before it, {good}"):
        load(tmp_path / "run")
    load(good).save(tmp_path / "exported")
    load(tmp_path / "exported")
    flip(tmp_path / "exported" / "params")
    with pytest.raises(ValueError, match="exported is damaged"):
        load(tmp_path / "exported")


def test_a_checkpoint_under_the_name_of_another_step_is_no_state(whole, tmp_path, capsys):
    """It is set aside as a damaged one is."""
    shutil.copytree(whole, tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    shutil.rmtree(checkpoints / "8")
    shutil.copytree(checkpoints / "6", checkpoints / "8")
    run(tmp_path / "run")
    assert "damaged: using step 6 (it holds the state of step 6)" in capsys.readouterr().err
    assert records(tmp_path / "run") == records(whole)


def test_two_processes_do_not_share_a_workdir(tmp_path):
    """The second process, of any command, names the first; a kill frees the folder."""
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time, pathlib; from vit_jax.parallel.run_files import Lock;"
            "lock = Lock(pathlib.Path(sys.argv[1])); print(flush=True); time.sleep(600)",
            tmp_path,
        ],
        stdout=subprocess.PIPE,
    )
    holder.stdout.readline()
    with pytest.raises(OSError, match=rf"another process uses .* \(process {holder.pid} on "):
        prepare(tmp_path)
    with pytest.raises(OSError, match="another process uses"):
        run_workflow(None, tmp_path, "")
    holder.kill()
    holder.wait()
    prepare(tmp_path)
    prepare(tmp_path)  # the same process may


def more_classes(data):
    return dataclasses.replace(open_data(data), num_classes=11, class_names=None)


def contents(workdir):
    """Reads the files that a refusal must leave unchanged."""
    files = (path for path in workdir.rglob("*") if path.is_file() and path.name != ".lock")
    return {path: path.read_bytes() for path in files if path.parent.name != "tensorboard"}


def test_a_full_disk_stops_the_run_and_loses_nothing(whole, tmp_path, capsys, monkeypatch):
    """From the save of step 6 no file can grow beyond 30 kB, as on a nearly full disk.

    The save fails in the background; the run ends before the next one begins.
    """
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    save = loop.Checkpoints.save

    def filling(self, state, description):
        if int(state.step) == 6:
            self.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, unlimited[1]))
        save(self, state, description)

    try:
        with monkeypatch.context() as patch:
            patch.setattr(loop.Checkpoints, "save", filling)
            with pytest.raises(OSError, match=r"step 6 could not be saved: .*File too large"):
                run(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert reported(capsys) == [2, 4]
    run(tmp_path)
    assert "from step 4 of 8" in capsys.readouterr().err
    assert_equal_runs(tmp_path, whole)


def test_a_save_that_fails_says_what_there_is(tmp_path):
    """The first of a run has none before it."""

    class Full:
        def wait_until_finished(self):
            raise OSError(errno.ENOSPC, "No space left on device")

    checkpoints = object.__new__(checkpoint.Checkpoints)
    checkpoints._manager, checkpoints._workdir = Full(), tmp_path
    for left in ("There is no checkpoint yet", "Step 4 is complete"):
        checkpoints._saving = 6
        with pytest.raises(OSError, match=rf"step 6 could not be saved: .*space left.*\n{left}: "):
            checkpoints.wait()
        (tmp_path / "checkpoints" / "4").mkdir(parents=True, exist_ok=True)


def reported(capsys):
    """Returns the steps that the run reported as saved."""
    return [int(step) for step in re.findall(r"step (\d+) is saved", capsys.readouterr().err)]


def test_what_a_slow_store_was_said_to_hold_is_there(whole, tmp_path, monkeypatch):
    """Every checkpoint gets its final name late; it isn't reported before."""
    rename, say = atomicity.async_path.rename, Metrics.say
    said = []

    async def late(path, target):
        await asyncio.sleep(0.2)
        return await rename(path, target)

    def checking(self, text):
        if found := re.search(r"step (\d+) is saved", text):
            said.append(int(found[1]))
            assert (self.workdir / "checkpoints" / found[1]).is_dir()
        say(self, text)

    monkeypatch.setattr(atomicity.async_path, "rename", late)
    monkeypatch.setattr(Metrics, "say", checking)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        preempt_at(patch, 5)
        run(tmp_path)
    assert said == [2, 4, 5]
    run(tmp_path)
    assert said == [2, 4, 5, 6, 8]
    assert_equal_runs(tmp_path, whole)


def test_a_step_that_comes_again_is_saved_again(whole, tmp_path, monkeypatch, capsys):
    """A run is preempted, its checkpoint damaged, and it is preempted at the same step again."""
    with monkeypatch.context() as patch:
        preempt_at(patch, 5)
        for _ in range(2):
            with pytest.raises(SystemExit):
                run(tmp_path)
            assert reported(capsys)[-1] == 5
            assert (tmp_path / "checkpoints" / "5").is_dir()
            largest_file(tmp_path / "checkpoints" / "5" / "params").unlink()
    run(tmp_path)
    assert sorted(p.name for p in (tmp_path / "unreadable").iterdir()) == ["5", "5.1"]
    assert_equal_runs(tmp_path, whole)


def test_branching_off_a_checkpoint(whole, tmp_path, capsys):
    """The same recipe in another workdir ends like the run; a longer recipe continues it."""
    step = whole / "checkpoints" / "6"
    run(tmp_path / "same", resume=str(step))
    ours, theirs = (load(path).params for path in (tmp_path / "same", whole))
    chex.assert_trees_all_equal(ours, theirs)
    assert read_metrics(tmp_path / "same")[0]["step"] == 6  # evaluated, as it begins

    final = run(tmp_path / "longer", resume=str(whole), steps=12)
    assert final["step"] == 12
    assert read_metrics(tmp_path / "longer")[0]["step"] == 9
    run(tmp_path / "longer", resume=str(whole), steps=12)  # finished: left alone
    averaged = {"steps": 9, "ema_decay": 0.99}
    run(tmp_path / "averaged", resume=str(whole), **averaged)
    said = capsys.readouterr().err
    assert "has no running average (EMA): it starts from the parameters there" in said
    assert "averages over 100 steps, the run has 9" in said
    with pytest.raises(ValueError, match="The models are equal, the optimizers differ"):
        run(tmp_path / "sgd", resume=str(whole), optimizer={"name": "sgd"})
    with pytest.raises(ValueError, match="One stacks its layers"):
        scanned = {"variant": "ViT-mu/8", "depth": 3, "dtype": "float32", "scan": True}
        run(tmp_path / "scanned", resume=str(whole), model=scanned)
    with pytest.raises(ValueError, match=r"resume: .* is at step 8 and the run has 8 steps"):
        run(tmp_path / "short", resume=str(whole))
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        run(tmp_path / "none", resume=str(tmp_path / "nothing"))


STEPS = 60
# SGD: Adam divides rounding errors by their own size, and after 30 steps another mesh shows.
SPREAD = (
    "--config.batch_size=16",
    "--config.mesh.fsdp=2",
    "--config.mesh.min_size=64",
    "--config.optimizer.name=sgd",
)


@pytest.mark.long
def test_two_processes_equal_one_which_goes_on_where_they_ended(tmp_path):
    """Compares one process with two devices, and two with one each, one clock a day ahead.

    After preemption one process finishes the run of the two: on two devices to the bit, and on one,
    another mesh.
    """
    process = start(*pretrain(tmp_path / "one", STEPS, *SPREAD), JAX_NUM_CPU_DEVICES="2")
    (code,), (err,) = finish([process])
    assert code == 0, err

    ahead = tmp_path / "ahead"
    ahead.mkdir()
    (ahead / "sitecustomize.py").write_text(
        "import time\n"
        "now, now_ns = time.time, time.time_ns\n"
        "time.time = lambda: now() + 86_400\n"
        "time.time_ns = lambda: now_ns() + 86_400 * 10**9\n"
    )
    workdir = tmp_path / "two"
    arguments = pretrain(workdir, STEPS, *SPREAD)
    processes = cluster(
        2, 1, lambda i: arguments, lambda i: {"PYTHONPATH": str(ahead)} if i == 0 else {}
    )
    metrics = workdir / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") > 2):
        assert all(p.poll() is None for p in processes), finish(processes)[1]
        time.sleep(0.005)
    processes[1].send_signal(signal.SIGTERM)
    codes, errors = finish(processes)
    assert codes == [PREEMPTED] * 2, errors
    assert read_metrics(workdir)[-1]["step"] < STEPS
    same = shutil.copytree(workdir, tmp_path / "same")
    for left, devices in ((same, "2"), (workdir, "1")):  # the same mesh; two microbatches
        arguments = pretrain(left, STEPS, *SPREAD, "--config.mesh.devices=2")
        (code,), (err,) = finish([start(*arguments, JAX_NUM_CPU_DEVICES=devices)])
        assert code == 0, err
        equal_runs(left, tmp_path / "one")
    assert run_digests(same) == run_digests(tmp_path / "one")  # to the bit
    first, second = json.loads((workdir / "starts.json").read_text())
    assert second["began"] < first["began"] and first["chips"] == 2 and second["chips"] == 1
    assert read_metrics(workdir)[-2]["time_down"] == 0


def test_processes_that_do_not_agree_say_so_at_once(tmp_path):
    steps = {0: 12, 1: 13}
    processes = cluster(2, 1, lambda i: pretrain(tmp_path / "run", steps[i], *SPREAD))
    codes, errors = finish(processes)
    assert codes == [1, 1]
    for err in errors:
        assert "the processes don't agree:\n  config: process 0: '" in err
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_workdir_that_is_not_shared_is_noticed(tmp_path):
    processes = cluster(2, 1, lambda i: pretrain(tmp_path / f"host{i}" / "run", 12, *SPREAD))
    codes, errors = finish(processes)
    assert codes == [1, 1]
    for err in errors:
        assert "processes [1] don't see what process 0 writes to" in err
