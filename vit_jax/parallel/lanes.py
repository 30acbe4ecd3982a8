"""Runs side by side in one process: each on devices of its own, in a thread of its own.

jax may be called from several threads at once ("Concurrency" in its documentation). Its mesh and
its transfer guard belong to a thread: whoever trains sets them in the thread that does.
"""

import dataclasses
import queue
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait

import jax

from vit_jax.parallel.multihost import PREEMPTED, Preemption


@dataclasses.dataclass(frozen=True)
class Lane:
    """Where a run goes: by default alone, over all devices of all processes."""

    devices: tuple[jax.Device, ...] | None = None
    label: str = ""  # that its lines begin with, among those of others
    preemption: Preemption | None = None  # that tells it to end together with the others


ALONE = Lane()


def make_lanes(size: int) -> list[Lane]:
    """As many lanes of `size` devices as there are in this process."""
    devices = jax.local_devices()
    starts = range(0, len(devices) - size + 1, size)
    return [Lane(tuple(devices[start : start + size])) for start in starts]


def side_by_side(jobs: Mapping[str, Callable[[Lane], None]], lanes: Sequence[Lane]) -> None:
    """Calls each job, by its label, with the first lane that is free.

    When SIGTERM comes, or a job fails, the others are told to end and no more are begun. The error
    is raised once all have ended; after SIGTERM it is `SystemExit(PREEMPTED)`.
    """
    free = queue.SimpleQueue()
    for lane in lanes:
        free.put(lane)
    with Preemption() as preemption, ThreadPoolExecutor(len(lanes)) as pool:

        def begin(label: str, job: Callable[[Lane], None]) -> None:
            if preemption.told:
                return
            lane = free.get()
            try:
                job(dataclasses.replace(lane, label=label, preemption=preemption))
            except BaseException:  # SystemExit too: nobody trains on when one has stopped
                preemption.tell()
                raise
            finally:
                free.put(lane)

        futures = [pool.submit(begin, *item) for item in jobs.items()]
        try:
            wait(futures)
        except KeyboardInterrupt:
            preemption.tell()
            raise
    failed = [error for future in futures if (error := future.exception())]
    if failed:
        raise min(failed, key=lambda error: isinstance(error, SystemExit))
    if preemption.told:
        raise SystemExit(PREEMPTED)
