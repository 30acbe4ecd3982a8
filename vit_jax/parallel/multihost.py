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
from jax._src.clusters import ClusterEnv
from jax.experimental import multihost_utils

from vit_jax.config import InputError
from vit_jax.parallel.preemption import PREEMPTED, Preemption, Sigterm  # noqa: F401 (for others)

# A process that is silent for this long counts as dead, and all others end.
HEARTBEAT_SECONDS = 60

# In which all processes of a run must come. A run of which one process was killed needs most: the
# others notice it after a heartbeat's time, and its launcher starts them again.
JOIN_SECONDS = 2 * HEARTBEAT_SECONDS

_FACTS_BYTES = 4096
_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_ALL_HERE = "all here"
_LINGER_SECONDS = 10  # after an error, so that late processes are told about it
_QUIET_SECONDS = 10  # until a process says for which others it waits

T = TypeVar("T")


def initialize(distributed: bool, seconds: float = JOIN_SECONDS) -> None:
    """Joins the processes of a cluster. Call it before any other use of jax.

    Detects TPU pods, SLURM and the other clusters that jax knows. Elsewhere set
    JAX_COORDINATOR_ADDRESS=host:port (a free port of process 0), JAX_NUM_PROCESSES and
    JAX_PROCESS_ID. SIGTERM ends the process with `PREEMPTED`: at once before all have come, then
    as `Preemption` does, and the second at once again.

    Args:
        distributed: joins nothing if False.
        seconds: in which all processes must come.

    Raises:
        ValueError: no cluster, or processes that don't fit together; on every process. Or this is
            one of several tasks of SLURM and `distributed` is False.
        TimeoutError: process 0 doesn't answer.
        OSError: process 0 can't listen at its port.
    """
    if not distributed:
        _check_not_one_of_several()
        return
    if not 0 < seconds < 1e6:
        raise InputError(f"{seconds} seconds to join the other processes: expected 1 or more")
    known = {}
    if found := _cluster(seconds):
        with Sigterm(PREEMPTED, "told to end (SIGTERM) before all processes had come"):
            _roll_call(*found, seconds)
        names = ("coordinator_address", "num_processes", "process_id")
        known = dict(zip(names, found, strict=True))
    try:
        jax.distributed.initialize(  # handles SIGTERM from now on
            initialization_timeout=math.ceil(seconds),
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            **known,
        )
    except ValueError as error:
        raise InputError(
            f"--distributed: jax finds no cluster ({error}): run under SLURM or on a TPU pod, or "
            f"set {', '.join(_VARIABLES)}"
        ) from error
    # jax's end of a process that has lost another is SIGABRT with a message. The stacks of all
    # threads, which absl adds, tell nothing of it.
    signal.signal(signal.SIGABRT, signal.SIG_DFL)
    Sigterm(PREEMPTED).__enter__()  # as long as the process lives


def _cluster(seconds: float) -> tuple[str, int, int] | tuple[()]:
    """Process 0's address, the number of processes and this one's, of the variables or from jax.

    () where jax knows no cluster. Raises ValueError for what can't be.
    """
    if found := {name: os.environ[name] for name in _VARIABLES if name in os.environ}:
        return _checked(found)
    try:
        address, processes, process, _ = ClusterEnv.auto_detect_unset_distributed_params(
            *(None, None, None, None, None), math.ceil(seconds)
        )
    except ValueError as error:  # a variable that is no number
        raise InputError(f"--distributed: the cluster's variables are wrong: {error}") from error
    if address is None:
        return ()
    if not 0 <= process < processes:
        raise InputError(
            f"--distributed: found process {process} of {processes}, with process 0 at {address}: "
            "expected process 0 to N-1 of N. Look at the cluster's variables (SLURM_NTASKS)"
        )
    return address, processes, process


def _checked(found: dict[str, str]) -> tuple[str, int, int]:
    """Returns process 0's address, the number of processes and this one's; ValueError if wrong."""
    address, *numbers = (found.get(name, "") for name in _VARIABLES)
    host, _, port = address.rpartition(":")
    if host and all(n.isdecimal() for n in (port, *numbers)):
        processes, process = map(int, numbers)
        if 0 < int(port) < 1 << 16 and process < processes:
            return address, processes, process
    shown = ", ".join(f"{name}={value}" for name, value in found.items())
    raise InputError(
        f"found {shown}: expected all of JAX_COORDINATOR_ADDRESS=host:port, "
        "JAX_NUM_PROCESSES=N and JAX_PROCESS_ID=0 to N-1"
    )


def _check_not_one_of_several() -> None:
    """ValueError in a task of `srun` that has others beside it: they would all train alone.

    The script of a batch job and a shell of `salloc` have the job's variables, and are one process.
    """
    process = os.environ.get("SLURM_PROCID")
    step = {"SLURM_STEP_ID", "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS"} & os.environ.keys()
    several = os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ.get("SLURM_NTASKS", "1")
    if process is None or not (step or process != "0") or jax.distributed.is_initialized():
        return
    if several != "1":
        raise InputError(
            f"this is task {process} of {several} of srun, and each would train for itself: add "
            "--distributed for one run of all, or start one with srun --ntasks=1"
        )


def _roll_call(address: str, processes: int, process: int, patience: float = JOIN_SECONDS) -> None:
    """Waits until all processes have reported consistent settings to process 0.

    Raises ValueError on every process that reported, if settings differ or processes are missing.
    jax itself would wait for minutes without naming the cause. jax uses the address afterwards.
    """
    me = {"process": process, "of": processes, "host": socket.gethostname(), "jax": jax.__version__}
    deadline = time.monotonic() + patience
    if process == 0:
        try:
            answer = _call_roll(int(address.rpartition(":")[2]), me, deadline)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            answer = _ask_who_is_there(address, me, error)
    else:
        answer = _answer_roll_call(address, me, deadline)
    if answer != _ALL_HERE:
        raise InputError(answer)


def _ask_who_is_there(address: str, me: dict[str, Any], error: OSError) -> str:
    """What another process 0 of this run says, which listens at the port; OSError if it is none."""
    try:
        return _answer_roll_call(address, me, time.monotonic() + _LINGER_SECONDS)
    except TimeoutError:
        raise OSError(
            f"process 0 can't listen at {address}: {os.strerror(error.errno)}. Another program or "
            "an older run uses the port: end it, or choose a free one for JAX_COORDINATOR_ADDRESS "
            "(under SLURM JAX_COORDINATOR_PORT)"
        ) from error


def _call_roll(port: int, me: dict[str, Any], deadline: float) -> str:
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
        answer = "\n".join([f"{problem}; there are:", *lines]) if problem else _ALL_HERE
        for connection in filter(None, heard):
            with connection, suppress(OSError):  # one that has ended since
                connection.sendall(answer.encode())
    return answer


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


def _answer_roll_call(address: str, me: dict[str, Any], deadline: float) -> str:
    """On other processes: reports this process's settings to process 0, returns its result."""
    host, _, port = address.rpartition(":")
    # An older run with a dead process ends in this time and frees the port.
    patience = min(deadline, time.monotonic() + 1.5 * HEARTBEAT_SECONDS)
    tells_at = time.monotonic() + _QUIET_SECONDS
    while True:
        try:
            connection = socket.create_connection((host.strip("[]"), int(port)), timeout=5)
            with connection, connection.makefile("r") as answer:
                connection.sendall((json.dumps(me) + "\n").encode())
                connection.settimeout(max(0.01, deadline + _LINGER_SECONDS - time.monotonic()))
                if heard := answer.read():
                    return heard
            until, problem = patience, "all its processes have connected, or an older run uses it"
        except (ConnectionResetError, BrokenPipeError, UnicodeDecodeError):
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
