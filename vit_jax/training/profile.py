"""Writes an XProf trace of some steps: device and host activity, to the microsecond."""

from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import jax

from vit_jax.config import InputError
from vit_jax.parallel.run_files import written_locally
from vit_jax.training.clock import Clock


def parse_window(text: str) -> range:
    """Parses "100:105" to steps 100 to 105, and "" to none. Raises ValueError otherwise."""
    if not text:
        return range(0)
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise InputError(
            f"profile_steps = {text!r}: expected the first and the last step, such as '100:105'"
        )
    return range(int(first), int(last) + 1)


class Profile:
    """Traces the steps of a window into `workdir/profile`, with files for each process.

    A run that resumes within the window traces the rest; one that ends there keeps its part.
    """

    def __init__(self, workdir: Path, window: str, clock: Clock):
        self._folder, self._window, self._clock = workdir / "profile", parse_window(window), clock
        self._tracing, self._local = False, ExitStack()

    def step(self, step: int, state: Any) -> AbstractContextManager:
        """Context for a step's call, so that the trace shows its number; `state` is its input.

        At the window's borders it waits for the previous steps.
        """
        if (step in self._window) != self._tracing:
            with self._clock.within("profile"):
                jax.block_until_ready(state)
                self._stop() if self._tracing else self._start()
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def _start(self) -> None:
        folder = self._local.enter_context(written_locally(self._folder))
        jax.profiler.start_trace(str(folder))
        self._tracing = True

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self._local.close()
        self._tracing = False

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *error: object) -> None:
        if self._tracing:
            self._stop()
