"""Multi-process runs: initialization, agreement checks, and preemption."""

import errno
import json
import math
import os
import secrets
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from vit_jax.config import InputError
from vit_jax.parallel.cluster import VARIABLES, check_not_one_of_several, find_cluster
from vit_jax.parallel.peers import watch
from vit_jax.parallel.preemption import PREEMPTED, Preemption, Sigterm  # noqa: F401 (for others)

# A host that answers nothing for this long is gone, and the processes on the others end.
HEARTBEAT_SECONDS = 15

# In which all processes of a run must come. A run of which one host is gone needs most: the others
# notice it after a heartbeat's time, and their launcher starts them again.
JOIN_SECONDS = HEARTBEAT_SECONDS + 105

# jax ends all processes if one sends nothing for this long: so long may a process be paused.
_PAUSE_SECONDS = 600

# At the end the others wait for process 0, which may write a report.
_END_SECONDS = 3600

_FACTS_BYTES = 4096
_LINGER_SECONDS = 10  # after an error, so that late processes are told about it
_NO_ANSWER = (json.JSONDecodeError, KeyError, TypeError)  # of a server of something else
_QUIET_SECONDS = 10  # until a process says for which others it waits
_OLDER_RUN = 6  # heartbeats, in which an older run ends and frees the port

T = TypeVar("T")


def initialize(
    distributed: bool, seconds: float = JOIN_SECONDS, heartbeat: float = HEARTBEAT_SECONDS
) -> None:
    """Joins the processes of a cluster. Call it before any other use of jax.

    Detects TPU pods, SLURM and the other clusters that jax knows. Elsewhere set
    JAX_COORDINATOR_ADDRESS=host:port (a free port of process 0), JAX_NUM_PROCESSES and
    JAX_PROCESS_ID. SIGTERM ends the process with `PREEMPTED`: at once before all have come, then
    as `Preemption` does, and the second at once again.

    Args:
        distributed: joins nothing if False.
        seconds: in which all processes must come.
        heartbeat: seconds without an answer after which another host counts as gone. A process
            that is killed is noticed at once: see `peers.watch`.

    Raises:
        ValueError: no cluster, or processes that don't fit together; on every process. Or this is
            one of several tasks of SLURM and `distributed` is False.
        TimeoutError: process 0 doesn't answer.
        OSError: process 0 can't listen at its port.
    """
    if not distributed:
        check_not_one_of_several()
        return
    if not 0 < seconds < 1e6:
        raise InputError(f"{seconds} seconds to join the other processes: expected 1 or more")
    if not 3 <= heartbeat < 1e5:
        raise InputError(
            f"{heartbeat} seconds until a silent host counts as gone: expected 3 or more"
        )
    known = {}
    if found := find_cluster(seconds):
        with Sigterm(PREEMPTED, "told to end (SIGTERM) before all processes had come"):
            connections = _roll_call(*found, seconds)
        watch(connections, _name(found[2], socket.gethostname()), heartbeat)
        names = ("coordinator_address", "num_processes", "process_id")
        known = dict(zip(names, found, strict=True))
    try:
        jax.distributed.initialize(  # handles SIGTERM from now on
            initialization_timeout=math.ceil(seconds),
            heartbeat_timeout_seconds=_PAUSE_SECONDS,
            shutdown_timeout_seconds=_END_SECONDS,
            **known,
        )
    except ValueError as error:
        raise InputError(
            f"--distributed: jax finds no cluster ({error}): run under SLURM or on a TPU pod, or "
            f"set {', '.join(VARIABLES)}"
        ) from error
    # jax's end of a process that has lost another is SIGABRT with a message. The stacks of all
    # threads, which absl adds, tell nothing of it.
    signal.signal(signal.SIGABRT, signal.SIG_DFL)
    Sigterm(PREEMPTED).__enter__()  # as long as the process lives


def _name(process: int, host: str) -> str:
    return f"process {process} on {host}"


def _roll_call(
    address: str, processes: int, process: int, patience: float = JOIN_SECONDS
) -> dict[socket.socket, str]:
    """Waits until all processes have reported consistent settings to process 0.

    Returns connections to the others on process 0, elsewhere one to process 0, with their names.

    Raises ValueError on every process that reported, if settings differ or processes are missing.
    jax itself would wait for minutes without naming the cause. jax uses the address afterwards.
    """
    me = {"process": process, "of": processes, "host": socket.gethostname(), "jax": jax.__version__}
    deadline = time.monotonic() + patience
    if process == 0:
        try:
            return _call_roll(int(address.rpartition(":")[2]), me, deadline)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            _ask_who_is_there(address, me, error)
    return _answer_roll_call(address, me, deadline)


def _ask_who_is_there(address: str, me: dict[str, Any], error: OSError) -> None:
    """Raises what another process 0 of this run says, which listens there; OSError if none does."""
    try:
        _answer_roll_call(address, me, time.monotonic() + _LINGER_SECONDS)
    except TimeoutError:
        raise OSError(
            f"process 0 can't listen at {address}: {os.strerror(error.errno)}. Another program or "
            "an older run uses the port: end it, or choose a free one for JAX_COORDINATOR_ADDRESS "
            "(under SLURM JAX_COORDINATOR_PORT)"
        ) from error


def _call_roll(port: int, me: dict[str, Any], deadline: float) -> dict[socket.socket, str]:
    """On process 0: collects the others' reports and sends them the result."""
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    heard: dict[socket.socket | None, dict[str, Any]] = {None: me}
    problem, tells_at = "", time.monotonic() + _QUIET_SECONDS
    with socket.create_server(("", port), family=family, dualstack_ipv6=both) as server:
        waiting = []
        while len(heard) < me["of"] or problem or wait(waiting, 0):
            if (now := time.monotonic()) > deadline:
                break
            if now > tells_at:
                tells_at = deadline
                logging.warning(
                    "waiting for processes %s of %s, up to %.0f s",
                    *(_missing(heard), me["of"], deadline - now),
                )
            found = wait([server, *waiting], min(deadline, max(tells_at, now)) - now)
            for ready in sorted(found, key=lambda ready: ready is server):
                if ready is not server:  # a process that has reported says no more: it has ended
                    del heard[ready]
                    ready.close()
                elif connection := _accept(server, heard):
                    said = heard[connection]
                    ids = [other["process"] for other in heard.values()]
                    odd = len(set(ids)) < len(ids) or max(ids) >= me["of"]
                    if not problem and (odd or any(said[k] != me[k] for k in ("of", "jax"))):
                        problem = "the processes don't fit together"
                        deadline = min(deadline, now + _LINGER_SECONDS)  # for late processes
            waiting = [] if problem else [*filter(None, heard)]
        if not problem and len(heard) < me["of"]:
            problem = f"processes {_missing(heard)} of {me['of']} did not connect"
        lines = [
            f"  process {o['process']} of {o['of']} on {o['host']}, jax {o['jax']}"
            for o in sorted(heard.values(), key=lambda o: o["process"])
        ]
        advice = "Look at the logs of those that are missing; --join_seconds waits longer"
        lines += [advice] * ("did not connect" in problem)
        problem = problem and "\n".join([f"{problem}; there are:", *lines])
        answer = {"problem": problem, "process 0": _name(0, me["host"])}
        del heard[None]
        for connection in heard:
            with suppress(OSError):  # one that has ended since
                connection.sendall((json.dumps(answer) + "\n").encode())
    if problem:
        raise InputError(problem)
    return {connection: _name(o["process"], o["host"]) for connection, o in heard.items()}


def _accept(server: socket.socket, heard: dict) -> socket.socket | None:
    """Adds the report of a process that connects to `heard`; None for anything else."""
    try:
        connection, _ = server.accept()
        connection.settimeout(5)
        with connection.makefile("r") as lines:
            said = json.loads(lines.readline())
        if said.keys() != heard[None].keys():
            raise ValueError
    except (OSError, ValueError, AttributeError):  # a port scan
        return None
    heard[connection] = said
    return connection


def _missing(heard: dict) -> list[int]:
    """The processes that have not reported."""
    return sorted(set(range(heard[None]["of"])) - {said["process"] for said in heard.values()})


def _answer_roll_call(
    address: str, me: dict[str, Any], deadline: float
) -> dict[socket.socket, str]:
    """On other processes: reports this process's settings to process 0."""
    host, _, port = address.rpartition(":")
    patience = min(deadline, time.monotonic() + _OLDER_RUN * HEARTBEAT_SECONDS)
    tells_at = time.monotonic() + _QUIET_SECONDS
    while True:
        try:
            connection = socket.create_connection((host.strip("[]"), int(port)), timeout=5)
            connection.sendall((json.dumps(me) + "\n").encode())
            connection.settimeout(max(0.01, deadline + _LINGER_SECONDS - time.monotonic()))
            with connection.makefile("r") as lines:
                answer = lines.readline()
            if answer:
                answer = json.loads(answer)
                if answer["problem"]:
                    raise InputError(answer["problem"])
                return {connection: answer["process 0"]}
            until, problem = patience, "all its processes have connected, or an older run uses it"
        except (ConnectionResetError, BrokenPipeError, UnicodeDecodeError, *_NO_ANSWER):
            until, problem = patience, "something else listens there"
        except OSError as error:
            until, problem = deadline, str(error)
        now = time.monotonic()
        if now > until:
            raise TimeoutError(
                f"{me}: process 0 does not answer at {address}: {problem}. Look at its log; "
                "--join_seconds waits longer"
            )
        if now > tells_at:
            tells_at = deadline
            logging.warning(
                "waiting for process 0 at %s, up to %.0f s: %s", address, until - now, problem
            )
        time.sleep(0.2)


def is_main() -> bool:
    """Whether this is process 0, which writes logs and files."""
    return jax.process_index() == 0


def check_agreement(facts: dict[str, Any]) -> None:
    """Raises ValueError on every process unless `facts` are the same on all.

    `facts` are serialized as JSON, in at most 4096 bytes.
    """
    if jax.process_count() == 1:
        return
    text = json.dumps({"host": socket.gethostname(), "facts": facts}, sort_keys=True).encode()
    if len(text) > _FACTS_BYTES:
        raise InputError(f"facts of {len(text)} bytes: expected at most {_FACTS_BYTES}")
    padded = np.frombuffer(text.ljust(_FACTS_BYTES), np.uint8)
    rows = [json.loads(bytes(row)) for row in multihost_utils.process_allgather(padded)]
    everyones, hosts = ([row[part] for row in rows] for part in ("facts", "host"))
    lines = []
    for name in sorted(set().union(*everyones)):
        values = [seen.get(name) for seen in everyones]
        if any(value != values[0] for value in values):
            seen = ", ".join(f"process {i}: {value!r}" for i, value in enumerate(values))
            lines.append(f"  {name}: {seen}")
    if lines:
        raise InputError(
            "the processes don't agree:\n"
            + "\n".join(lines)
            + f"\nThe processes' hosts, in order: {', '.join(hosts)}. "
            "Start the same command with the same versions and data on every host, on shared "
            "storage."
        )


def check_shared(folder: Path) -> None:
    """Raises ValueError on every process unless all see the same folder.

    A host without the shared mount would write its shards of checkpoints to its own disk.
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
        raise InputError(
            f"processes {np.flatnonzero(~everyone).tolist()} don't see what process 0 writes to "
            f"{folder}: put the workdir on storage that all hosts have mounted"
        )


def everyones(value: float) -> np.ndarray:
    """Gathers a value from every process: float64 [processes]."""
    if jax.process_count() == 1:
        return np.array([value])
    # As uint32, because jax would convert float64 to float32.
    parts = np.frombuffer(np.float64(value).tobytes(), np.uint32)
    return multihost_utils.process_allgather(parts).view(np.float64)[:, 0]


def first_of_all(text: str) -> str:
    """Returns on every process the first non-empty text of all, cut to 4096 bytes, or ""."""
    if jax.process_count() == 1:
        return text
    padded = np.frombuffer(text.encode()[:_FACTS_BYTES].ljust(_FACTS_BYTES), np.uint8)
    rows = multihost_utils.process_allgather(padded)
    return next(filter(None, (bytes(row).decode(errors="replace").strip() for row in rows)), "")


def on_main(make: Callable[[], T]) -> T | None:
    """Returns what `make` returns, on process 0, and None on the others.

    An OSError that it raises is raised on all processes.
    """
    made, problem = None, ""
    if is_main():
        try:
            made = make()
        except OSError as error:
            problem = str(error)
    if problem := first_of_all(problem):
        raise OSError(problem)
    return made


def all_agree(value: bool) -> bool:
    """Returns whether `value` is True on every process."""
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.process_allgather(np.array(value)).all())


def barrier(name: str) -> None:
    """Waits until every process has reached the barrier of this name."""
    multihost_utils.sync_global_devices(name)
