"""Multi-process runs: initialization, agreement checks, and preemption."""

import json
import os
import secrets
import signal
import socket
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from vit_jax.config import InputError

# Exit code of a run that stopped on SIGTERM after saving; start it again to resume (EX_TEMPFAIL).
PREEMPTED = 75
# A process that is silent for this long counts as dead, and all others end.
HEARTBEAT_SECONDS = 60

_FACTS_BYTES = 4096
_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_ALL_HERE = "all here"
_LINGER_SECONDS = 10  # after an error, so that late processes are told about it


def initialize(distributed: bool) -> None:
    """Joins the processes of a cluster. Call it before any other use of jax.

    Detects TPU pods, SLURM and the other clusters that jax knows. Elsewhere set
    JAX_COORDINATOR_ADDRESS=host:port (a free port of process 0), JAX_NUM_PROCESSES and
    JAX_PROCESS_ID.

    Args:
        distributed: does nothing if False.

    Raises:
        ValueError: no cluster, or processes that don't fit together; on every process.
        TimeoutError: process 0 doesn't answer.
    """
    if not distributed:
        return
    found = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
    if found:
        address, processes, process = _checked(found)
        _roll_call(address, processes, process)
        known = {"num_processes": processes, "process_id": process}
    else:
        known = {}
    try:
        jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT_SECONDS, **known)
    except ValueError as error:
        raise InputError(
            f"--distributed: jax finds no cluster ({error}): run under SLURM or on a TPU pod, or "
            f"set {', '.join(_VARIABLES)}"
        ) from error


def _checked(found: dict[str, str]) -> tuple[str, int, int]:
    """Returns process 0's address, the number of processes and this one's; ValueError if wrong."""
    address, *numbers = (found.get(name, "") for name in _VARIABLES)
    host, _, port = address.rpartition(":")
    if not (host and port.isdecimal() and all(n.isdecimal() for n in numbers)):
        shown = ", ".join(f"{name}={value}" for name, value in found.items())
        raise InputError(
            f"found {shown}: expected all of JAX_COORDINATOR_ADDRESS=host:port, "
            "JAX_NUM_PROCESSES=N and JAX_PROCESS_ID=0 to N-1"
        )
    return address, int(numbers[0]), int(numbers[1])


def _roll_call(address: str, processes: int, process: int, patience: float = 300) -> None:
    """Waits until all processes have reported consistent settings to process 0.

    Raises ValueError on every process that reported, if settings differ or processes are missing.
    jax itself would wait for minutes without naming the cause. jax uses the address afterwards.
    """
    me = {"process": process, "of": processes, "host": socket.gethostname(), "jax": jax.__version__}
    deadline = time.monotonic() + patience
    if process == 0:
        answer = _call_roll(int(address.rpartition(":")[2]), me, deadline)
    else:
        answer = _answer_roll_call(address, me, deadline)
    if answer != _ALL_HERE:
        raise InputError(answer)


def _call_roll(port: int, me: dict[str, Any], deadline: float) -> str:
    """On process 0: collects the others' reports and sends them the result."""
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    heard, waiting, problem = [me], [], ""
    with socket.create_server(("", port), family=family, dualstack_ipv6=both) as server:
        while len(heard) < me["of"] or problem:
            server.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                connection, _ = server.accept()
                connection.settimeout(5)
                with connection.makefile("r") as lines:
                    said = json.loads(lines.readline())
                if said.keys() != me.keys():
                    raise ValueError
            except (OSError, ValueError, AttributeError):  # a timeout or a port scan
                if time.monotonic() > deadline:
                    break
                continue
            heard.append(said)
            waiting.append(connection)
            ids = [other["process"] for other in heard]
            odd = len(set(ids)) < len(ids) or max(ids) >= me["of"]
            if not problem and (odd or any(o[k] != me[k] for o in heard for k in ("of", "jax"))):
                problem = "the processes don't fit together"
                deadline = min(deadline, time.monotonic() + _LINGER_SECONDS)  # for late processes
        if not problem and len(heard) < me["of"]:
            missing = sorted(set(range(me["of"])) - {other["process"] for other in heard})
            problem = f"processes {missing} of {me['of']} did not connect"
        lines = [
            f"  process {o['process']} of {o['of']} on {o['host']}, jax {o['jax']}"
            for o in sorted(heard, key=lambda o: o["process"])
        ]
        answer = "\n".join([f"{problem}; there are:", *lines]) if problem else _ALL_HERE
        for connection in waiting:
            with connection:
                connection.sendall(answer.encode())
    return answer


def _answer_roll_call(address: str, me: dict[str, Any], deadline: float) -> str:
    """On other processes: reports this process's settings to process 0, returns its result."""
    host, _, port = address.rpartition(":")
    # An older run with a dead process ends in this time and frees the port.
    patience = min(deadline, time.monotonic() + 1.5 * HEARTBEAT_SECONDS)
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
        if time.monotonic() > until:
            raise TimeoutError(f"{me}: process 0 does not answer at {address}: {problem}")
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


def all_agree(value: bool) -> bool:
    """Returns whether `value` is True on every process."""
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.process_allgather(np.array(value)).all())


def barrier(name: str) -> None:
    """Waits until every process has reached the barrier of this name."""
    multihost_utils.sync_global_devices(name)


class Preemption:
    """Detects SIGTERM and Ctrl-C on any process, so that all stop at the same step.

    `interrupted` is True after Ctrl-C in this process. Before the first step, Ctrl-C also calls the
    previous handler, which raises KeyboardInterrupt. A second Ctrl-C calls that handler's attribute
    `again`, or the handler itself if it has none: see `command_line.stoppable`.
    """

    def __enter__(self) -> "Preemption":
        self.told = self.interrupted = self._stepping = False
        self._previous = {}
        if threading.current_thread() is threading.main_thread():
            # With several processes jax handles SIGTERM itself.
            if not jax.distributed.is_initialized():
                self._previous[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._hear)
            handler = signal.getsignal(signal.SIGINT)
            if handler is signal.default_int_handler or hasattr(handler, "again"):
                self._previous[signal.SIGINT] = signal.signal(signal.SIGINT, self._hear)
        return self

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            handler = self._previous[number]
            if self.interrupted:
                getattr(handler, "again", handler)(number, frame)
            elif not self._stepping:
                handler(number, frame)
            self.interrupted = True
            if jax.distributed.is_initialized():
                signal.raise_signal(signal.SIGTERM)  # jax forwards it to all processes
        self.tell()

    def tell(self) -> None:
        """Requests a stop, as a signal does."""
        self.told = True

    def reached(self, step: int) -> bool:
        """Returns whether to save and stop after this step. Call it after every step."""
        self._stepping = True
        if jax.distributed.is_initialized():
            return multihost_utils.reached_preemption_sync_point(step)
        return self.told

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
