"""Notices in seconds that another process of a run is gone, and says which.

From the roll call on, process 0 keeps a TCP connection to each other process. The kernel closes the
connections of a process that is killed, and a host that is gone answers no keepalive probe. A
process that computes, compiles or is paused keeps its connection, for however long.
"""

import atexit
import json
import math
import socket
import threading
import time
from contextlib import suppress
from multiprocessing.connection import wait

import jax

from vit_jax.command_line import before_exit
from vit_jax.parallel.preemption import PREEMPTED
from vit_jax.parallel.watchdog import end

_PROBES = 2  # without an answer, after which the kernel closes a connection
_LINGER_SECONDS = 5  # so that each process can report an error that all have


def watch(connections: dict[socket.socket, str], me: str, seconds: float) -> None:
    """Ends this process as soon as another one is gone, from now on.

    The exit code is `PREEMPTED`, on which launchers start a run again, if that process was killed
    or its host is gone, and 1 if it failed. An ordinary exit ends nothing.

    Args:
      connections: to the other processes, on process 0; elsewhere to process 0. With their names.
      me: this process's name.
      seconds: without an answer of a host, after which it counts as gone.
    """
    interval = max(1, math.floor(seconds / (_PROBES + 1)))
    for connection in connections:
        connection.settimeout(None)
        for level, option, value in (
            (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
            (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, interval),
            (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, interval),
            (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _PROBES),
        ):
            connection.setsockopt(level, option, value)

    left = threading.Event()

    def leave(code: int) -> None:
        left.set()
        _tell(connections, me, code)

    def leave_with_the_others() -> None:
        jax.distributed.shutdown()  # waits for all; one that is killed meanwhile is noticed
        leave(0)

    before_exit.append(leave)
    atexit.register(leave_with_the_others)
    threading.Thread(target=_listen, args=[connections, left], name="peers", daemon=True).start()


def _tell(connections: dict[socket.socket, str], who: str, code: int | None) -> None:
    """Tells the others that a process has ended; its exit code is None if it didn't say."""
    for connection in list(connections):
        with suppress(OSError):  # gone as well
            connection.sendall((json.dumps([who, code]) + "\n").encode())


def _listen(connections: dict[socket.socket, str], left: threading.Event) -> None:
    while connections:
        for connection in wait(list(connections)):
            name = connections.pop(connection)
            try:
                said = connection.makefile("r").readline()
            except OSError:  # its host is gone
                said = ""
            who, code = json.loads(said) if said else (name, None)
            if code != 0 and not left.is_set():
                _tell(connections, who, code)
                _end(who, code)


def _end(who: str, code: int | None) -> None:
    again = code in (None, PREEMPTED)
    how = (
        "It was killed (out of memory?) or its host is gone"
        if code is None
        else f"Its exit code is {code}, and its log says why"
    )
    if not again:
        time.sleep(_LINGER_SECONDS)
    end(
        PREEMPTED if again else 1,
        f"error: another process of this run has ended: {who}. {how}. Start the same command on "
        "all to resume from the newest checkpoint, if there is one",
    )
