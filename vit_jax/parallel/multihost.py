"""Several processes as one run: joining, agreeing, being preempted together."""

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

# Exit code of a run that was told to end, has saved, and goes on when started again (EX_TEMPFAIL).
PREEMPTED = 75
# A process that has not been heard of for so long is taken for dead, and ends all others.
HEARTBEAT_SECONDS = 60

_FACTS_BYTES = 4096
_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_ALL_HERE = "all here"
_LINGER_SECONDS = 10  # that processes which come late are still told what is wrong


def initialize(distributed: bool) -> None:
    """Joins the cluster's processes, before any other use of jax.

    TPU pods, SLURM and the other clusters that jax knows are detected; elsewhere set
    JAX_COORDINATOR_ADDRESS=host:port, of a free port at process 0, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID. A job whose processes don't find each other would train as many private models:
    ValueError or TimeoutError, on every process, says who was there.
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
        raise ValueError(
            f"--distributed: jax finds no cluster ({error}): run under SLURM or on a TPU pod, or "
            f"set {', '.join(_VARIABLES)}"
        ) from error


def _checked(found: dict[str, str]) -> tuple[str, int, int]:
    """The address of process 0, how many processes there are, and which of them this is."""
    address, *numbers = (found.get(name, "") for name in _VARIABLES)
    host, _, port = address.rpartition(":")
    if not (host and port.isdecimal() and all(n.isdecimal() for n in numbers)):
        shown = ", ".join(f"{name}={value}" for name, value in found.items())
        raise ValueError(
            f"found {shown}: expected all of JAX_COORDINATOR_ADDRESS=host:port, "
            "JAX_NUM_PROCESSES=N and JAX_PROCESS_ID=0 to N-1"
        )
    return address, int(numbers[0]), int(numbers[1])


def _roll_call(address: str, processes: int, process: int, patience: float = 300) -> None:
    """Returns when every process has told process 0 the same; an error goes to all that came.

    jax itself would wait for minutes and then tell nobody what the others had been told. It uses
    the address afterwards.
    """
    me = {"process": process, "of": processes, "host": socket.gethostname(), "jax": jax.__version__}
    deadline = time.monotonic() + patience
    if process == 0:
        answer = _call_roll(int(address.rpartition(":")[2]), me, deadline)
    else:
        answer = _answer_roll_call(address, me, deadline)
    if answer != _ALL_HERE:
        raise ValueError(answer)


def _call_roll(port: int, me: dict[str, Any], deadline: float) -> str:
    """As process 0: hears the others, and tells them what it finds."""
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
            except (OSError, ValueError, AttributeError):  # nobody came; a port scan came
                if time.monotonic() > deadline:
                    break
                continue
            heard.append(said)
            waiting.append(connection)
            ids = [other["process"] for other in heard]
            odd = len(set(ids)) < len(ids) or max(ids) >= me["of"]
            if not problem and (odd or any(o[k] != me[k] for o in heard for k in ("of", "jax"))):
                problem = "the processes don't fit together"
                deadline = min(deadline, time.monotonic() + _LINGER_SECONDS)  # for the others
        if not problem and len(heard) < me["of"]:
            missing = sorted(set(range(me["of"])) - {other["process"] for other in heard})
            problem = f"processes {missing} of {me['of']} did not come"
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
    """As another process: tells process 0 what this one was told, and hears its answer."""
    host, _, port = address.rpartition(":")
    # An older run, one process of which has died, ends by itself in this time and frees the port.
    patience = min(deadline, time.monotonic() + 1.5 * HEARTBEAT_SECONDS)
    while True:
        try:
            connection = socket.create_connection((host.strip("[]"), int(port)), timeout=5)
            with connection, connection.makefile("r") as answer:
                connection.sendall((json.dumps(me) + "\n").encode())
                connection.settimeout(max(0.01, deadline + _LINGER_SECONDS - time.monotonic()))
                if heard := answer.read():
                    return heard
            until, problem = patience, "it has all that it was told of, or an older run is there"
        except (ConnectionResetError, BrokenPipeError, UnicodeDecodeError):
            until, problem = patience, "something else listens there"
        except OSError as error:
            until, problem = deadline, str(error)
        if time.monotonic() > until:
            raise TimeoutError(f"{me}: no process 0 waits for this one at {address}: {problem}")
        time.sleep(0.2)


def is_main() -> bool:
    """Whether this process is the one that writes records."""
    return jax.process_index() == 0


def check_agreement(facts: dict[str, Any]) -> None:
    """ValueError, on every process, unless the facts (short, for JSON) are the same on all."""
    if jax.process_count() == 1:
        return
    text = json.dumps({"host": socket.gethostname(), "facts": facts}, sort_keys=True).encode()
    if len(text) > _FACTS_BYTES:
        raise ValueError(f"facts of {len(text)} bytes: expected at most {_FACTS_BYTES}")
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
        raise ValueError(
            "the processes don't agree:\n"
            + "\n".join(lines)
            + f"\nThe processes' hosts, in order: {', '.join(hosts)}. "
            "Start the same command with the same versions and data on every host, on shared "
            "storage."
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


def first_of_all(text: str) -> str:
    """The text of the first process that has one, on all processes; short; "" if none has any."""
    if jax.process_count() == 1:
        return text
    padded = np.frombuffer(text.encode()[:_FACTS_BYTES].ljust(_FACTS_BYTES), np.uint8)
    rows = multihost_utils.process_allgather(padded)
    return next(filter(None, (bytes(row).decode(errors="replace").strip() for row in rows)), "")


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
        self.told = False
        self._previous = None
        # Among several processes jax's own coordination listens for the signal.
        alone = not jax.distributed.is_initialized()
        if alone and threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._hear)
        return self

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.tell()

    def tell(self) -> None:
        """As the signal does."""
        self.told = True

    def reached(self, step: int) -> bool:
        """Whether to save and stop after this step. To be asked after every one."""
        if jax.distributed.is_initialized():
            return multihost_utils.reached_preemption_sync_point(step)
        return self.told

    def __exit__(self, *error: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)
