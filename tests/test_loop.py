"""The training loop in this process: resuming, stopping, saving, evaluating."""

import dataclasses
import io
import json
import os
import sys

import chex
import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from vit_jax.config import build
from vit_jax.parallel.lanes import make_lanes
from vit_jax.training import loop, workdir
from vit_jax.training.metrics import CLOCK, Metrics, read_metrics
from vit_jax.training.step import init_state
from vit_jax.weights.trained import load


def config(**changes):
    values = {
        "model": {"variant": "ViT-nano/8", "depth": 1, "dtype": "float32", "pool": "gap"},
        "data": {"dataset": "digits", "preprocess": "resize|flip"},
        "image_size": 16,
        "batch_size": 16,
        "steps": 8,
        "schedule": {"peak": 1e-3, "warmup": 2},
        "checkpoint": {"every": 3},
        "log_every": 1,
        **changes,
    }
    return build(loop.TrainConfig, values)


def run(workdir, devices=1, **changes):
    lane = make_lanes(devices)[0]
    return loop.train(loop.prepare(config(**changes), str(workdir), lane=lane))


def saved_steps(workdir):
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir())


def deterministic(records):
    return [{k: v for k, v in r.items() if k not in {*CLOCK, "seconds"}} for r in records]


class Stopped(Exception):
    pass


def stop_at(monkeypatch, step):
    """Interrupts the loop after `step`, as any error would."""
    add = loop.Recorder.add

    def stopping(self, done, values):
        if done == step:
            raise Stopped
        add(self, done, values)

    monkeypatch.setattr(loop.Recorder, "add", stopping)


@pytest.mark.parametrize(
    ("mesh", "ema_decay"), [({"fsdp": 1}, None), ({"fsdp": 8, "min_size": 64}, 0.9)]
)
def test_interrupted_equals_uninterrupted(tmp_path, monkeypatch, mesh, ema_decay):
    evaluation = {
        "evaluators": {"test": {"data": {"dataset": "digits", "split": "test[:50]"}}},
        "eval_every": 3,
        "ema_decay": ema_decay,
        "mesh": mesh,
        "devices": 8,
    }
    run(tmp_path / "whole", **evaluation)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, 5)
        run(tmp_path / "stopped", **evaluation)
    assert saved_steps(tmp_path / "stopped") == [3]
    run(tmp_path / "stopped", **evaluation)
    ours, theirs = (load(tmp_path / name).params for name in ("whole", "stopped"))
    chex.assert_trees_all_equal(ours, theirs)
    ours, theirs = (read_metrics(tmp_path / name) for name in ("whole", "stopped"))
    assert deterministic(ours) == deterministic(theirs)
    assert [r["step"] for r in ours if "test/accuracy" in r] == [3, 6, 8]
    check_times(theirs, tmp_path / "stopped")


def check_times(records, workdir):
    """Checks the times of a run that stopped after step 5 and resumed from step 3."""
    trained = [r for r in records if "loss" in r]
    for record in trained:
        assert {*CLOCK} - {"mfu", "seconds"} <= record.keys()  # no peak of a CPU is known
        times = [v for k, v in record.items() if k.startswith("time_")]
        assert record["goodput"] + sum(times) == pytest.approx(1)
        assert record["goodput"] > 0 and min(times) >= -1e-9
        assert record["img_per_sec_per_chip"] == pytest.approx(record["img_per_sec"] / 8)
    hours = [r["chip_hours"] for r in trained]
    assert hours == sorted(hours)
    assert trained[-1]["eta"] == 0 < trained[-2]["eta"]
    assert trained[2]["time_down"] == 0 < trained[3]["time_down"]
    starts = json.loads((workdir / "starts.json").read_text())
    assert [(s["from_step"], s["to_step"]) for s in starts] == [(0, 3), (3, 8)]


def test_nothing_is_compiled_after_the_first_steps(tmp_path, monkeypatch):
    """Neither steps, nor saves, nor evaluations after the first compile anything again."""
    evaluation = {"data": {"dataset": "digits", "split": "test[:50]"}, "batch_size": 16}
    compiled, add = [], loop.Recorder.add
    monkeypatch.setattr(
        loop.Recorder,
        "add",
        lambda self, done, values: (compiled.append(done), add(self, done, values)),
    )

    def listen(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append("compiled")

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        run(tmp_path, evaluators={"test": evaluation}, eval_every=2)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert "compiled" in compiled[: compiled.index(1)]
    assert compiled[compiled.index(4) :] == [4, 5, 6, 7, 8]  # the first checkpoint is of step 3


def test_an_implicit_transfer_is_an_error(tmp_path, monkeypatch):
    """A batch that is still on the host is rejected: TPUs would wait for it in every step."""
    put, calls = loop.put_batch, []

    def forgetful(mesh, batch):
        calls.append(1)
        return put(mesh, batch) if len(calls) < 3 else batch

    monkeypatch.setattr(loop, "put_batch", forgetful)
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        run(tmp_path)
    assert len(calls) == 3


def test_a_finished_run_is_left_alone(tmp_path):
    first = run(tmp_path)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    assert run(tmp_path) == first
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_not_finite_stops_and_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    """The update of step 5 is not finite; the loop finds it by step 6, before the save."""
    program = loop.Programs.at

    def breaking(programs, step):
        compiled = program(programs, step)

        def wrapped(state, batch):
            state, values = compiled(state, batch)
            if int(state.step) >= 5:
                with jax.transfer_guard("allow"):
                    values = {**values, "param_norm": values["param_norm"] * np.nan}
            return state, values

        return wrapped

    monkeypatch.setattr(loop.Programs, "at", breaking)
    with pytest.raises(FloatingPointError) as error:
        run(tmp_path, log_every=100)
    text = str(error.value)
    assert "not finite after step 6" in text and "steps 4 to 6" in text
    assert "finite after step 3" in text
    assert saved_steps(tmp_path) == [3]
    monkeypatch.undo()
    run(tmp_path, log_every=100)
    assert saved_steps(tmp_path) == [6, 8]


def test_a_real_divergence_is_noticed(tmp_path):
    with pytest.raises(FloatingPointError, match="Lower the learning rate"):
        run(
            tmp_path,
            schedule={"peak": 1e38, "warmup": 0, "decay": "constant"},
            optimizer={"name": "sgd", "clip_norm": None},
        )


def test_what_is_kept(tmp_path):
    run(tmp_path, steps=10, checkpoint={"every": 1, "keep_last": 2, "keep_every": 4})
    assert saved_steps(tmp_path) == [4, 8, 9, 10]
    trained = load(tmp_path / "checkpoints" / "4")
    params, description = trained.params, trained.description
    newest = load(tmp_path).params
    assert np.abs(params["embedding"]["kernel"] - newest["embedding"]["kernel"]).max() > 0
    assert description["num_classes"] == 10 and description["image_size"] == [16, 16]
    assert description["model"]["variant"] == "ViT-nano/8"


def test_epochs_count_the_examples(tmp_path):
    prepared = loop.prepare(config(steps=None, epochs=1.5), str(tmp_path))
    assert prepared.steps == int(np.ceil(1.5 * 1198 / 16))


def test_what_matters_may_not_change(tmp_path):
    run(tmp_path)
    for changes, message in [
        ({"optimizer": {"b1": 0.8}}, "optimizer.b1: 0.9 there, 0.8 here"),
        ({"seed": 1}, "seed: 0 there, 1 here"),
        ({"steps": 9}, "steps: 8 there, 9 here"),
    ]:
        with pytest.raises(ValueError, match=message):
            loop.prepare(config(**changes), str(tmp_path))


def test_fields_newer_than_a_run_have_their_defaults(tmp_path):
    """A run that an older version began resumes."""
    file = tmp_path / "config.json"
    workdir.keep_same(file, config())
    there = json.loads(file.read_text())
    del there["augmentation"], there["schedule"]["drops"]
    file.write_text(json.dumps(there))
    with pytest.raises(ValueError, match=r"mixup: 0\.0 there, 0\.2 here"):
        workdir.keep_same(file, config(augmentation={"mixup": 0.2}))
    workdir.keep_same(file, config())
    assert json.loads(file.read_text())["augmentation"]["mixup"] == 0.0
    file.write_text(json.dumps({**there, "gone": 1}))
    with pytest.raises(ValueError, match="gone: 1 there, None here"):
        workdir.keep_same(file, config())


def test_speed_may_change(tmp_path, monkeypatch):
    """Another mesh, remat and accumulation resume the same run."""
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, 5)
        run(tmp_path / "a", devices=8)
    model = {"variant": "ViT-nano/8", "depth": 1, "dtype": "float32", "pool": "gap"}
    run(
        tmp_path / "a",
        devices=8,
        mesh={"fsdp": 4, "min_size": 64},
        accumulation=2,
        model={**model, "remat": "full"},
    )
    run(tmp_path / "b")
    ours, theirs = (load(tmp_path / name).params for name in "ab")
    chex.assert_trees_all_close(ours, theirs, atol=2e-5, rtol=0)


def test_an_unfinished_line_is_cut_off(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n{"step": 3, "lo')
    with Metrics(tmp_path, steps=5, resumed_step=2) as metrics:
        metrics.write(3, {"loss": 1.0})
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2, 3]
    with Metrics(tmp_path, steps=5, resumed_step=1):
        pass
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_on_a_terminal_and_lines_elsewhere(tmp_path, monkeypatch):
    values = {
        "loss": 1.25,
        "img_per_sec": 12345.0,
        "img_per_sec_per_chip": 3086.25,
        "mfu": 0.456,
        "input_wait": 0.01,
        "goodput": 0.9,
        "eta": 120.0,
        "chip_hours": 1.5,
    }
    shown = {}
    for stream in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stream)
        with Metrics(tmp_path, steps=100) as metrics:
            metrics.progress(40, values, "90% (save 10%)")
        shown[stream.isatty()] = stream.getvalue()
    assert "40/100" in shown[True] and "loss=1.2500" in shown[True] and "MFU=45.6%" in shown[True]
    assert shown[False] == (
        "step 40/100  loss 1.2500  img/s 12,345  img/s/chip 3,086  MFU 45.6%  "
        "goodput 90% (save 10%)  ETA 02:00  chip-hours 1.50\n"
    )


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboardX")
    with Metrics(tmp_path, steps=5) as metrics:
        metrics.write(3, {"loss": 1.0})
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"loss" in events.read_bytes()


def test_a_trace_and_compiled_programs_are_kept(tmp_path):
    """Both in the workdir, though jax has compiled before; a second run compiles less."""
    hits = []

    def listener(event, **_):
        hits.append(event.endswith("cache_hits"))

    cache = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    jax.monitoring.register_event_listener(listener)
    try:
        run(tmp_path / "a", steps=4, profile_steps="2:3")
        assert not any(hits)
        compiled = tmp_path / "a" / "compiled"
        assert list(compiled.glob("jit_*step-*-cache"))
        run(tmp_path / "b", steps=4, compilation_cache=str(compiled))
        assert any(hits)
        assert not (tmp_path / "b" / "compiled").exists()
        run(tmp_path / "c", steps=2, compilation_cache="")
        assert not (tmp_path / "c" / "compiled").exists()
        assert jax.config.jax_compilation_cache_dir is None
    finally:
        jax.monitoring.unregister_event_listener(listener)
        jax.config.update("jax_compilation_cache_dir", cache)
        compilation_cache.reset_cache()
    (trace,) = (tmp_path / "a" / "profile").rglob("*.xplane.pb")
    events = [
        event
        for plane in jax.profiler.ProfileData.from_file(str(trace)).planes
        for line in plane.lines
        for event in line.events
    ]
    assert {dict(e.stats)["step_num"] for e in events if e.name == "train"} == {2, 3}
    assert any("dot" in e.name for e in events)  # the devices' work is in it


def test_a_trace_that_the_run_ends_within(tmp_path):
    run(tmp_path, steps=3, profile_steps="3:9")
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_checkpoints_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load(tmp_path)
    (tmp_path / "checkpoints" / "5.orbax-checkpoint-tmp").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="no complete checkpoint"):
        load(tmp_path)


def test_workdirs(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="say where to keep this run"):
        loop.prepare(config(), "")
    with pytest.raises(ValueError, match="expected a folder"):
        loop.prepare(config(), "az://bucket/run")
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        loop.prepare(config(), str(tmp_path / "file"))
    monkeypatch.setattr(workdir.os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(PermissionError, match="not writable"):
        loop.prepare(config(), str(tmp_path))
    assert os.listdir(tmp_path) == ["file"]


def test_the_compiled_step_never_recompiles(tmp_path):
    prepared = loop.prepare(config(), str(tmp_path))
    with loop.use_mesh(prepared.mesh):
        key = jax.random.key(0)
        state = jax.jit(
            lambda key: init_state(prepared.model, prepared.optimizer, key, use_ema=False),
            out_shardings=prepared.shardings,
        )(key)
        batches = prepared.batches(0)
        batch = loop.put_batch(prepared.mesh, next(batches))
        with loop.Programs(prepared, batch, 0, prepared.clock) as programs:
            step = programs.at(0)
        batches.close()
        with pytest.raises(TypeError):
            step(state, {**batch, "image": batch["image"][:8]})


def test_config_errors():
    for changes, message in [
        ({"epochs": 1.0}, "set exactly one"),
        ({"steps": None}, "set exactly one"),
        ({"steps": None, "epochs": 0.0}, "epochs = 0.0: expected more than 0"),
        ({"log_every": 0}, "log_every = 0"),
        ({"hang_minutes": 0.0}, "hang_minutes = 0.0: expected a positive number, or none"),
        ({"seed": 2**32}, "seed = 4294967296: expected 0 to 4294967295"),
        ({"data": {"dataset": "digits", "num_threads": -1}}, "data.num_threads = -1"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"checkpoint": {"every": 0}}, "checkpoint.every = 0"),
        ({"profile_steps": "7"}, "profile_steps = '7': expected the first and the last step"),
        ({"profile_steps": "9:7"}, "profile_steps = '9:7'"),
    ]:
        with pytest.raises(ValueError, match=message):
            config(**changes)
    assert dataclasses.asdict(config())["optimizer"]["name"] == "adamw"
