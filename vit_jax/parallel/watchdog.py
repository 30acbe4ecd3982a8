"""Ends a process that hangs, and says in what: storage, input, another process.

The thread that is blocked, in a read or in a collective, can't tell: another one looks at the time.
"""

import faulthandler
import os
import socket
import sys
import threading
import time

from vit_jax.command_line import before_exit

_CHECKS = 60  # of the time, within the limit

_watchdogs: dict[int, "Watchdog"] = {}  # of threads, by their idents


def waits_for(what: str) -> None:
    """Tells this thread's watchdog, if there is one, of progress, and what comes next."""
    told, watchdog = (what, time.monotonic()), _watchdogs.get(threading.get_ident())
    while watchdog:
        watchdog.told, watchdog = told, watchdog.outer


class Watchdog:
    """While entered, ends the process if the thread that entered it tells no progress for too long.

    Progress is a call of `waits_for`. The process writes the stacks of all threads and what was
    waited for, and exits with code 1. Time in which the whole process is suspended doesn't count.

    Args:
      minutes: the limit; None for no limit. The second SIGTERM still tells what was waited for.
      label: of the run, where several go side by side.
    """

    def __init__(self, minutes: float | None, label: str = ""):
        self._minutes, self._label = minutes, f"{label}: " * bool(label)
        self._ended = threading.Event()

    def __enter__(self) -> "Watchdog":
        self._thread = threading.get_ident()
        self.outer = _watchdogs.get(self._thread)
        _watchdogs[self._thread] = self
        waits_for("the start")
        if self._minutes:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        if self.outer:
            _watchdogs[self._thread] = self.outer
        else:
            del _watchdogs[self._thread]

    def _watch(self) -> None:
        seen, silent, interval = self.told, 0, 60 * self._minutes / _CHECKS
        while not self._ended.wait(interval):
            silent = silent + 1 if self.told is seen else 0
            seen = self.told
            if silent >= _CHECKS:
                end(
                    1,
                    f"error: no progress for {self._minutes:g} minutes. {waiting()}. Above "
                    "is what each thread does. Mend what it waits for and start again: the "
                    "same command goes on. If it is only slow: a higher --config.hang_minutes",
                    stacks=True,
                )


def waiting() -> str:
    """What this process waits for: a sentence for people."""
    now = time.monotonic()
    shown = [
        f"{watchdog._label}{what} ({now - since:.0f} s)"
        for watchdog in list(_watchdogs.values())
        for what, since in [watchdog.told]
    ]
    found = ", ".join(shown) or "something outside of a run"
    return f"Process {os.getpid()} on {socket.gethostname()} waits for {found}"


def end(code: int, message: str, stacks: bool = False) -> None:
    """Ends the process with a last message, waiting for nothing."""
    if stacks:
        faulthandler.dump_traceback(sys.__stderr__)
    print(message, file=sys.stderr, flush=True)
    for tell in before_exit:
        tell(code)
    os._exit(code)
