"""Several runs in one process: concurrent, independent, and stopped together."""

import threading
import time

import pytest

from vit_jax.parallel.lanes import make_lanes, side_by_side
from vit_jax.parallel.multihost import PREEMPTED


def test_devices_are_apart():
    lanes = [lane.devices for lane in make_lanes(3)]
    assert [len(devices) for devices in lanes] == [3, 3]  # of eight
    assert not {*lanes[0]} & {*lanes[1]}


def test_at_the_same_time():
    """Two jobs wait for each other; the third starts when a lane is free again."""
    meeting, seen = threading.Barrier(2), {}

    def job(lane):
        if lane.label != "c":
            meeting.wait(timeout=60)
        seen[lane.label] = lane.devices

    side_by_side(dict.fromkeys("abc", job), make_lanes(4))
    assert {*seen["a"]} | {*seen["b"]} == {d for lane in make_lanes(4) for d in lane.devices}
    assert not {*seen["a"]} & {*seen["b"]} and seen["c"] in (seen["a"], seen["b"])


def until_told(lane):
    """As `loop.train` does."""
    while not lane.preemption.reached(0):
        time.sleep(0.001)
    raise SystemExit(PREEMPTED)


def test_one_that_fails_ends_the_others():
    began = []

    def fail(lane):
        raise ValueError("not finite")

    jobs = {"a": until_told, "b": fail, "c": began.append}
    with pytest.raises(ValueError, match="not finite"):
        side_by_side(jobs, make_lanes(4))
    assert not began


@pytest.mark.parametrize("others", [[until_told], []])
def test_told_to_end_they_all_do(others):
    """SIGTERM's handler calls `tell`; also tests a signal that comes as the last job ends."""
    jobs = {str(i): job for i, job in enumerate([lambda lane: lane.preemption.tell(), *others])}
    with pytest.raises(SystemExit) as ended:
        side_by_side(jobs, make_lanes(4))
    assert ended.value.code == PREEMPTED
