"""Run time by state, the cost of restarts, and waits for input while devices idle."""

import time

import jax
import numpy as np
import pytest

from vit_jax.training import clock as clock_module
from vit_jax.training import metrics
from vit_jax.training.clock import Clock, Starts, add_up, process_age, shares


@pytest.fixture
def now(monkeypatch):
    """A clock that the test sets: now[0]."""
    moment = [100.0]
    monkeypatch.setattr(clock_module.time, "perf_counter", lambda: moment[0])
    monkeypatch.setattr(clock_module.time, "time", lambda: moment[0])
    return moment


def test_every_second_belongs_to_one_state(now):
    clock = Clock(age=3.0)
    now[0] += 2
    with clock.within("compile"):
        now[0] += 10
        with clock.within("input"):
            now[0] += 1
        now[0] += 5
    clock.turn("train")
    now[0] += 20
    clock.move(4.0, "train", "input")
    seconds = clock.read()
    assert {state: s for state, s in seconds.items() if s} == {
        "start": 5,
        "compile": 15,
        "input": 5,
        "train": 16,
    }
    assert sum(seconds.values()) == 3 + now[0] - 100
    assert sum(shares(seconds).values()) == pytest.approx(1)


def test_compilations_are_found_wherever_they_happen():
    with Clock() as clock, clock.within("evaluate"):
        began = time.perf_counter()
        jax.jit(lambda x: jax.numpy.sort(x * 3.25) @ x)(np.ones(7)).block_until_ready()
        took = time.perf_counter() - began
    seconds = clock.read()
    assert 0 < seconds["compile"] < took
    assert seconds["evaluate"] >= 0
    jax.jit(lambda x: jax.numpy.sort(x * 1.25) @ x)(np.ones(7)).block_until_ready()
    assert clock.read()["compile"] == seconds["compile"]  # no longer listens


def test_the_age_of_this_process():
    assert time.process_time() / 20 < process_age() < 24 * 3600


def start(began, ended, from_step, to_step, train):
    idle = ended - began - train
    seconds = {"train": train, "compile": idle}
    return {"began": began, "ended": ended, "from_step": from_step, "to_step": to_step, "chips": 4,
            "seconds": seconds}  # fmt: skip


def test_steps_made_again_are_lost_and_pauses_told():
    """Runs to step 100, resumes at 80, runs to 120, resumes at 60 (damaged checkpoint), ends."""
    starts = [
        start(0, 150, 0, 100, 100),
        start(200, 300, 80, 120, 80),
        start(310, 400, 60, 130, 70),
    ]
    seconds = add_up(starts)
    # The first start loses steps 60 to 100, the second all of its steps.
    assert seconds["lost"] == pytest.approx(40 + 80)
    assert seconds["train"] == pytest.approx(60 + 70)
    assert seconds["compile"] == pytest.approx(50 + 20 + 20)
    assert seconds["down"] == pytest.approx(50 + 10)
    assert sum(seconds.values()) == pytest.approx(400)


def test_clocks_that_differ_make_no_negative_time():
    """The second start's host is a day behind."""
    starts = [start(1e6, 1e6 + 100, 0, 10, 50), start(1e6 - 86400, 1e6 - 86300, 10, 20, 50)]
    seconds = add_up(starts)
    assert seconds["down"] == 0 and sum(seconds.values()) == 200


def test_starts_are_kept_from_process_to_process(tmp_path, now):
    first = Starts(tmp_path, Clock(), 0, chips=8)
    assert first.count == 1
    now[0] += 1800
    first.keep(10)
    assert first.chip_hours() == pytest.approx(4)
    assert not list(tmp_path.glob("*.partial"))
    now[0] += 60
    clock = Clock()
    clock.turn("train")
    second = Starts(tmp_path, clock, 10, chips=4)
    now[0] += 1740
    second.keep(20)
    assert second.count == 2
    assert second.chip_hours() == pytest.approx(4 + 4 * 1740 / 3600)
    assert second.seconds()["down"] == 60
    assert second.goodput() == "48% (start 50%, down 2%, this start alone 100%)"
    assert second.summary() == (
        "took 1:00:00, 2 starts, 5.93 chip-hours: goodput 48% (start 50%, down 2%, this start "
        "alone 100%)"
    )


def make_recorder(workdir, clock, log_every):
    """Makes a recorder of a run on 8 chips."""
    return metrics.Recorder(
        metrics.Metrics(workdir, steps=100),
        clock,
        Starts(workdir, clock, 0, chips=8),
        start=0,
        log_every=log_every,
        batch_size=8,
        flops=lambda start, stop: 8 * (stop - start),
        devices=8,
    )


@pytest.mark.parametrize(
    ("finished", "asked", "arrived", "stall"),
    [
        (10.0, 8.0, 9.0, 0.0),  # the batch was there before the step was over
        (10.0, 8.0, 12.0, 2.0),
        (10.0, 11.0, 12.5, 1.5),
    ],
)
def test_input_is_waited_for_only_while_devices_idle(
    tmp_path, monkeypatch, finished, asked, arrived, stall
):
    clock = Clock()
    recorder = make_recorder(tmp_path, clock, log_every=50)
    monkeypatch.setattr(metrics, "_finished_at", lambda values: finished)
    monkeypatch.setattr(metrics.time, "perf_counter", iter([asked, arrived]).__next__)
    with recorder:
        recorder.add(1, {"loss": jax.numpy.ones(())})
        with recorder.waiting():
            pass
        recorder.add(2, {"loss": jax.numpy.ones(())})
    assert clock.seconds["input"] == pytest.approx(stall)


def test_replaced_examples_are_counted_between_records(tmp_path):
    clock = Clock()
    recorder = make_recorder(tmp_path, clock, log_every=2)
    with recorder:
        for step, skipped in enumerate((1, 4, 0, 0, 2, 0), 1):
            values = {"loss": jax.numpy.ones(()), "skipped": jax.numpy.array(skipped)}
            recorder.add(step, values)
        recorder.flush()
    assert [r.get("skipped", 0) for r in metrics.read_metrics(tmp_path)] == [5, 0, 2]
