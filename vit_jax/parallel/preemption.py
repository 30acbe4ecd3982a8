"""Stops on SIGTERM and Ctrl-C: all processes at the same step, with a checkpoint; or at once.

A handler of Python's `signal` runs between two lines of the main thread: never while that is
blocked in a read or in a collective. SIGTERM is therefore heard by a thread of its own as well.
"""

import faulthandler
import os
import signal
import threading
import time
from contextlib import ExitStack
from types import FrameType

import jax
from absl import logging
from jax.experimental import multihost_utils

from vit_jax.parallel.watchdog import end, waiting

# Exit code of a run that stopped on SIGTERM after saving; start it again to resume (EX_TEMPFAIL).
PREEMPTED = 75

_TOGETHER = 1.0  # seconds within which several SIGTERM count as one: some launchers send it twice


class Sigterm:
    """While entered, a thread hears SIGTERM, even if the main thread is blocked.

    With `first`, a message, the first SIGTERM ends the process. Otherwise the handler that was
    there is called, Python's or jax's, and the second SIGTERM ends the process. Enter it in the
    main thread.

    Args:
      code: the exit code.
      first: the message of a process that has nothing to save yet.
    """

    def __init__(self, code: int, first: str = ""):
        self._code, self._first = code, first

    def __enter__(self) -> "Sigterm":
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        threading.Thread(target=self._hear, args=[reader], name="sigterm", daemon=True).start()
        # The stack that it writes into the pipe at a SIGTERM is what wakes the thread.
        faulthandler.register(
            signal.SIGTERM, file=self._writer, all_threads=False, chain=not self._first
        )
        return self

    def __exit__(self, *error: object) -> None:
        faulthandler.unregister(signal.SIGTERM)
        os.close(self._writer)  # ends the thread

    def _hear(self, reader: int) -> None:
        heard = None
        while os.read(reader, 1 << 16):
            now = time.monotonic()
            if self._first:
                end(self._code, self._first)
            elif heard is None:
                heard = now
                logging.warning("SIGTERM: ends after this step. A second one ends at once")
            elif now - heard > _TOGETHER:
                end(self._code, f"ended at once, without saving, by a second SIGTERM. {waiting()}")
        os.close(reader)


class Preemption:
    """Detects SIGTERM and Ctrl-C on any process, so that all stop at the same step.

    `interrupted` is True after Ctrl-C in this process. Before the first step, Ctrl-C also calls the
    previous handler, which raises KeyboardInterrupt. A second Ctrl-C calls that handler's attribute
    `again`, or the handler itself if it has none: see `command_line.stoppable`.
    """

    def __enter__(self) -> "Preemption":
        self.told = self.interrupted = self._stepping = False
        self._previous, self._sigterm = {}, ExitStack()
        if threading.current_thread() is threading.main_thread():
            # With several processes jax handles SIGTERM itself.
            if not jax.distributed.is_initialized():
                self._previous[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._hear)
                self._sigterm.enter_context(Sigterm(PREEMPTED))
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
        self._sigterm.close()
        for number, handler in self._previous.items():
            signal.signal(number, handler)
