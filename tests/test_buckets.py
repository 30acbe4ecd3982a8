"""Runs in a bucket: killed, slow, failing; the laws of runs on a disk hold there."""

import dataclasses
import random
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from buckets import Bucket, Commands, kill
from PIL import Image
from processes import ROOT, checkpoint_arrays, pretrain, records
from test_scaling import GRID, VIT

from experiments.scaling.runner import Store, read_results, statuses, work
from experiments.scaling.study import Study, expand
from vit_jax.data.listing import find_images
from vit_jax.data.preparation import prepare
from vit_jax.data.sources import open_source
from vit_jax.parallel import claims, run_files
from vit_jax.parallel.run_files import (
    Lock,
    as_path,
    open_lines,
    read_locally,
    remove_tree,
    write_whole,
    written_locally,
)
from vit_jax.weights.trained import load, saved_steps

STEPS = 12


@pytest.fixture(scope="module")
def bucket():
    bucket = Bucket()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in bucket.environment.items():
            patch.setenv(name, value)
        yield bucket
    bucket.close()


@pytest.fixture(scope="module")
def commands(bucket, tmp_path_factory):
    commands = Commands(tmp_path_factory.mktemp("commands"), bucket.environment)
    yield commands
    commands.close()


@pytest.fixture(scope="module")
def whole(commands, tmp_path_factory):
    """A run on a disk that nobody killed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    commands.start(*pretrain(folder, STEPS))
    assert commands.wait() == 0, commands.errors()
    return folder


@pytest.fixture(autouse=True)
def well(bucket):
    yield
    bucket.fail = bucket.seen = None
    bucket.seconds = 0.0


def assert_same(address, whole):
    """The run in the bucket has every bit of state and every record of the one on a disk."""
    with read_locally(as_path(address)) as run:
        found, expected = checkpoint_arrays(run), checkpoint_arrays(whole)
        assert found.keys() == expected.keys()
        for name, array in expected.items():
            np.testing.assert_array_equal(found[name], array, err_msg=name)
        assert records(run) == records(whole)


def run_killed(bucket, commands, address, moments):
    """Kills the run at requests of these numbers, each counted from its start; lets it end."""
    for moment in (*moments, None):
        process = commands.start(*pretrain(address, STEPS))
        begun = bucket.requests

        def seen(number, process=process, begun=begun, moment=moment):
            if number == begun + moment:
                kill(process)

        bucket.seen = moment and seen
        code = commands.wait()
        assert code in ((0, -9) if moment else (0,)), commands.errors()
        yield code


@pytest.mark.long
def test_killed_in_a_bucket_that_fails_now_and_then(bucket, commands, whole):
    """Killed in the middle of a save; some requests fail. It ends as one on a disk, bit by bit."""
    bucket.fail = lambda number: 503 if number in (100, 101, 400) else None
    assert list(run_killed(bucket, commands, "gs://runs/killed", [45])) == [-9, 0]
    assert_same("gs://runs/killed", whole)


@pytest.mark.slow
def test_killed_at_ten_moments(bucket, commands, whole):
    moments = [random.Random(7).randrange(3, 80) for _ in range(10)]
    codes = list(run_killed(bucket, commands, "gs://runs/ten", moments))
    assert codes.count(-9) >= 5
    assert_same("gs://runs/ten", whole)


@pytest.mark.slow
def test_a_bucket_that_is_slow_fails_and_refuses_for_twenty_seconds(bucket, commands, whole):
    begun = bucket.requests

    def seen(number):
        if number == begun + 40:  # in the middle of a save
            bucket.seen = None
            threading.Thread(target=refuse).start()

    def refuse():
        bucket.refuse()
        time.sleep(20)
        bucket.connect()

    bucket.seconds, bucket.seen = 0.05, seen
    bucket.fail = lambda number: 503 if number % 50 == 0 else None
    commands.start(*pretrain("gs://runs/refusing", STEPS))
    assert commands.wait() == 0, commands.errors()
    assert bucket.seen is None
    bucket.seconds, bucket.fail = 0.0, None
    assert_same("gs://runs/refusing", whole)


HOLD = """
import sys, time
from vit_jax.parallel.run_files import Lock, as_path
lock = Lock(as_path(sys.argv[1]))
print(flush=True)
time.sleep(600)
"""


def test_two_processes_do_not_share_a_workdir(bucket, monkeypatch):
    """The second names the first. Once that is killed its folder is free: here at once, for
    another machine when the claim has run out."""
    monkeypatch.setattr(run_files, "_LEASE", 3.0)
    folder = as_path("gs://runs/shared")
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], cwd=ROOT, stdout=subprocess.PIPE
    )
    holder.stdout.readline()
    with pytest.raises(OSError, match=rf"another process uses {folder} \(process {holder.pid} on "):
        Lock(folder)
    holder.kill()
    holder.wait()
    lock = Lock(folder)
    assert Lock(folder) is lock
    del lock
    monkeypatch.setattr(claims, "_kernel", lambda: "another machine's")
    held = claims.Claims(folder / ".lock", 3.0).take("run")
    monkeypatch.setattr(claims, "_kernel", lambda: "this machine's")
    with held, pytest.raises(OSError, match="another process uses"):
        Lock(folder)
    assert claims.Claims(folder / ".lock", 3.0).take("run")  # and never renews it
    assert Lock(folder)


def test_damage_is_found(bucket, whole):
    """The byte of an object that changed; the checkpoint before it is then used."""
    folder = as_path("gs://runs/damaged")
    folder.upload(whole)
    for step in (8, 12):
        (folder / "checkpoints" / f"{step}" / "commit_success.txt").write_bytes(b"")
    assert sorted(saved_steps(folder)) == [8, 12]
    file = max((folder / "checkpoints/12/params").glob("**/d/*"), key=lambda p: p.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"checkpoints/12 is damaged .*use .* {folder}/.*/8"):
        load(folder)
    load(f"{folder}/checkpoints/8")
    (folder / "checkpoints/8/commit_success.txt").unlink()
    assert saved_steps(folder) == [12]
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load(f"{folder}/checkpoints/8")


def test_a_path_in_a_bucket_is_as_one_on_a_disk(bucket, tmp_path):
    """The same calls on both."""
    found = []
    for folder in (tmp_path / "ops", as_path("gs://runs/ops")):
        for name in ("f.txt", "d/g", "d/e/h"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            write_whole(folder / name, name)
        (folder / "f.txt").rename(folder / "d" / "f.txt")
        (folder / "d").rename(folder / "moved")
        lines = open_lines(folder / "lines")
        for line in ("1\n", "2\n"):
            lines.write(line)
        lines.close()
        open_lines(folder / "lines").close()
        with written_locally(folder / "pictures") as local:
            local.mkdir()
            (local / "a.png").write_bytes(b"png")
        remove_tree(folder / "nothing")
        with pytest.raises(FileNotFoundError, match="none"):
            (folder / "none").read_bytes()
        names = {path.relative_to(folder): path for path in sorted(folder.glob("**/*"))}
        found.append(
            {
                str(name): (path.is_dir(), path.is_file() and path.read_text())
                for name, path in names.items()
            }
        )
        assert not (folder / "d").exists() and folder.is_dir() and folder.absolute() == folder
    assert found[0] == found[1]


def test_a_study_in_a_bucket_is_shared_by_claims(bucket):
    """Two workers take every run once; what is done is recorded."""
    folder, made = as_path("gs://runs/study"), []
    grid = dataclasses.replace(GRID, models=(VIT,), tasks=())
    study = Study("tiny", (grid,))

    def train(run, config, workdir):
        made.append(run.key)
        time.sleep(0.5)
        checkpoint = workdir / "checkpoints" / str(config["steps"])
        (checkpoint / "commit_success.txt").write_bytes(b"")
        return {"steps": config["steps"], "evaluations": []}

    def worker():
        work(study, Store(folder), train, say=lambda text: None, poll=0.1)

    threads = [threading.Thread(target=worker) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(made) == sorted(run.key for run in expand(study))
    assert {status.state for status in statuses(study, Store(folder))} == {"done"}
    assert len(read_results(folder / "results.jsonl")) == len(made)


def test_prepared_data_are_read_from_a_bucket(bucket, tmp_path, monkeypatch):
    """By data_dir, by path and by the environment; what isn't there is an error."""
    for i in range(4):
        file = tmp_path / "photos" / "ab"[i % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9), (i, 0, 0)).save(file)
    prepare(str(tmp_path / "photos"), str(tmp_path / "data"), "photos", shards=2)
    as_path("gs://runs/data").upload(tmp_path / "data")
    expected = open_source("photos", "train", str(tmp_path / "data")).records
    for name, data_dir in (("photos", "gs://runs/data"), ("gs://runs/data/photos/1.0.0", None)):
        source = open_source(name, "train", data_dir)
        assert source.class_names == ("a", "b")
        assert [source.records[i] for i in range(4)] == [expected[i] for i in range(4)]
    as_path("gs://runs/data/photos/1.0.0/photos-train.array_record-00001-of-00002").unlink()
    with pytest.raises(FileNotFoundError, match="00001-of-00002"):
        open_source("photos", "train", "gs://runs/data")
    with pytest.raises(FileNotFoundError, match="cifar10 is not prepared: gs://runs/data"):
        open_source("cifar10", "train", "gs://runs/data")


def test_images_in_a_bucket_are_told_to_be_mounted(bucket):
    as_path("gs://runs/pictures/cat/a.jpg").write_bytes(b"")
    for read in (
        lambda: open_source("gs://runs/pictures", "train"),
        lambda: find_images(["gs://runs/pictures"]),
        lambda: prepare("gs://runs/pictures", "somewhere"),
    ):
        with pytest.raises(ValueError, match="gcsfuse --implicit-dirs -o ro runs /mnt/runs"):
            read()
    with pytest.raises(FileNotFoundError, match="there is no gs://runs/nothing"):
        open_source("gs://runs/nothing", "train")


def test_weights_in_a_bucket(bucket, whole):
    """Written and read, as a file and as a folder."""
    model = load(whole)
    for name, format in (("weights.npz", "npz"), ("folder", "orbax")):
        model.save(f"gs://runs/weights/{name}", format)
        found = load(f"gs://runs/weights/{name}").params
        np.testing.assert_array_equal(
            found["head"]["kernel"], model.params["head"]["kernel"], err_msg=name
        )
