"""Several processes as one run: joining, agreeing, being preempted together."""

import json
import os
import secrets
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

# Exit code of a run that was told to end, has saved, and goes on when started again (EX_TEMPFAIL).
PREEMPTED = 75
# A process that has not been heard of for so long is taken for dead, and ends all others.
HEARTBEAT_SECONDS = 60

_FACTS_BYTES = 4096


def initialize(distributed: bool) -> None:
    """Joins the cluster's processes, before any other use of jax.

    TPU pods, SLURM and the other clusters that jax knows are detected; elsewhere set
    JAX_COORDINATOR_ADDRESS=host:port, JAX_NUM_PROCESSES and JAX_PROCESS_ID. Nothing is caught: a
    job whose processes don't find each other would train as many private models.
    """
    if not distributed:
        return
    variables = {"num_processes": "JAX_NUM_PROCESSES", "process_id": "JAX_PROCESS_ID"}
    given = {name: int(os.environ[v]) for name, v in variables.items() if v in os.environ}
    jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT_SECONDS, **given)


def is_main() -> bool:
    """Whether this process is the one that writes records."""
    return jax.process_index() == 0


def check_agreement(facts: dict[str, Any]) -> None:
    """ValueError, on every process, unless the facts (short, for JSON) are the same on all."""
    if jax.process_count() == 1:
        return
    text = json.dumps(facts, sort_keys=True).encode()
    if len(text) > _FACTS_BYTES:
        raise ValueError(f"facts of {len(text)} bytes: expected at most {_FACTS_BYTES}")
    padded = np.frombuffer(text.ljust(_FACTS_BYTES), np.uint8)
    everyones = [json.loads(bytes(row)) for row in multihost_utils.process_allgather(padded)]
    lines = []
    for name in sorted(set().union(*everyones)):
        values = [seen.get(name) for seen in everyones]
        if any(value != values[0] for value in values):
            seen = ", ".join(f"process {i}: {value!r}" for i, value in enumerate(values))
            lines.append(f"  {name}: {seen}")
    if lines:
        raise ValueError(
            "the processes don't agree:\n"
            + "\n".join(lines)
            + "\nStart the same command with the same versions on every host, on shared storage."
        )


def check_shared(folder: Path) -> None:
    """ValueError, on every process, unless all see the same folder.

    A host where a mount is missing would keep its part of every checkpoint to itself.
    """
    if jax.process_count() == 1:
        return
    mark = folder / ".shared"
    token = str(multihost_utils.broadcast_one_to_all(np.array(secrets.randbits(31))))
    if is_main():
        mark.write_text(token)
    barrier("marked")
    sees = mark.exists() and mark.read_text() == token
    everyone = multihost_utils.process_allgather(np.array(sees))
    if is_main():
        mark.unlink()
    if not everyone.all():
        raise ValueError(
            f"processes {np.flatnonzero(~everyone).tolist()} don't see what process 0 writes to "
            f"{folder}: put the workdir on storage that all hosts have mounted"
        )


def everyones(value: float) -> np.ndarray:
    """The value of each process: float64 [processes]."""
    if jax.process_count() == 1:
        return np.array([value])
    # jax would make float32 of it.
    parts = np.frombuffer(np.float64(value).tobytes(), np.uint32)
    return multihost_utils.process_allgather(parts).view(np.float64)[:, 0]


def all_agree(value: bool) -> bool:
    """Whether it is true on every process."""
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.process_allgather(np.array(value)).all())


def barrier(name: str) -> None:
    """Waits until every process is here."""
    multihost_utils.sync_global_devices(name)


class Preemption:
    """Notices SIGTERM, sent to any process, and lets all stop at the same step."""

    def __enter__(self) -> "Preemption":
        self._told = False
        self._previous = None
        # Among several processes jax's own coordination listens for the signal.
        alone = not jax.distributed.is_initialized()
        if alone and threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._tell)
        return self

    def _tell(self, number: int, frame: FrameType | None) -> None:
        self._told = True

    def reached(self, step: int) -> bool:
        """Whether to save and stop after this step. To be asked after every one."""
        if jax.distributed.is_initialized():
            return multihost_utils.reached_preemption_sync_point(step)
        return self._told

    def __exit__(self, *error: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)
