"""Concurrent runs in one process, each in its own thread on its own devices.

jax supports calls from several threads ("Concurrency" in its documentation). Its mesh and transfer
guard are per thread, so each run sets them in its own.
"""

import dataclasses
import queue
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait

import jax

from vit_jax.parallel.preemption import PREEMPTED, Preemption


@dataclasses.dataclass(frozen=True)
class Lane:
    """The devices of one run; by default all devices of all processes."""

    devices: tuple[jax.Device, ...] | None = None
    label: str = ""  # prefix of the run's log lines
    preemption: Preemption | None = None  # shared by concurrent runs, so that all stop together


ALONE = Lane()


def make_lanes(size: int) -> list[Lane]:
    """Divides this process's devices into lanes of `size`; drops a remainder."""
    devices = jax.local_devices()
    starts = range(0, len(devices) - size + 1, size)
    return [Lane(tuple(devices[start : start + size])) for start in starts]


def side_by_side(jobs: Mapping[str, Callable[[Lane], None]], lanes: Sequence[Lane]) -> None:
    """Runs jobs concurrently, one per lane.

    After SIGTERM, Ctrl-C or a failed job, running jobs are told to stop and no more are started.

    Args:
        jobs: label -> function of a lane.
        lanes: each is used by one job at a time.

    Raises:
        SystemExit: with `PREEMPTED` after SIGTERM, once all jobs have ended.
        KeyboardInterrupt: after Ctrl-C, once all jobs have ended; after a second one immediately.
        Exception: the error of a failed job, once all jobs have ended.
    """
    free = queue.SimpleQueue()
    for lane in lanes:
        free.put(lane)
    pool = ThreadPoolExecutor(len(lanes))
    with Preemption() as preemption:

        def begin(label: str, job: Callable[[Lane], None]) -> None:
            if preemption.told:
                return
            lane = free.get()
            try:
                job(dataclasses.replace(lane, label=label, preemption=preemption))
            except BaseException:  # SystemExit too: when one job stops, all do
                preemption.tell()
                raise
            finally:
                free.put(lane)

        futures = [pool.submit(begin, *item) for item in jobs.items()]
        try:
            wait(futures)
        except KeyboardInterrupt:
            preemption.tell()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        pool.shutdown()
    failed = [error for future in futures if (error := future.exception())]
    if failed:
        raise min(failed, key=lambda error: isinstance(error, (SystemExit, KeyboardInterrupt)))
    if preemption.interrupted:
        raise KeyboardInterrupt("stopped: the same command goes on")
    if preemption.told:
        raise SystemExit(PREEMPTED)
