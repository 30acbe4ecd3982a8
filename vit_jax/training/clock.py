"""Accounts for a run's time: every second since its command began belongs to one state.

Goodput is the share of wall time spent in training steps that count. Time in other states is
counted separately, over all starts of a run. `starts.json` in the workdir records the steps and the
seconds by state of each start.
"""

import datetime
import json
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from vit_jax.parallel.multihost import is_main
from vit_jax.parallel.run_files import Rewritten, read_json
from vit_jax.parallel.watchdog import waits_for

STATES = (
    "start",  # imports, joining the other processes, checks, initial parameters
    "restore",
    "compile",  # of anything: the step, the initialisation, evaluations
    "train",
    "input",  # devices idle because the next batch isn't ready
    "evaluate",
    "save",  # only while a checkpoint blocks steps; the rest runs in the background
    "profile",  # writing the trace
)
# Over several starts also: training of steps that had to be repeated, and time between starts.
LOST, DOWN = "lost", "down"

STARTS = "starts.json"
_COMPILED = "/jax/core/compile/backend_compile_duration"


def process_age() -> float:
    """Seconds since this process began; 0 if the system has no /proc."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    except FileNotFoundError:
        return 0.0
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


class Clock:
    """Attributes time to states, beginning `age` seconds ago with "start".

    While entered, it detects all compilations in the thread that entered it. `seconds` has seconds
    by state, up to the last change of state; `read` counts up to now.
    """

    def __init__(self, age: float = 0.0):
        self.seconds = dict.fromkeys(STATES, 0.0)
        self._state, self._since = "start", time.perf_counter() - age
        self.began = time.time() - age

    def turn(self, state: str) -> None:
        """Sets the state from now on."""
        now = time.perf_counter()
        self.seconds[self._state] += now - self._since
        self._state, self._since = state, now

    @contextmanager
    def within(self, state: str) -> Iterator[None]:
        """Sets the state inside the block, then restores it. Tells the watchdog."""
        before = self._state
        waits_for(state)
        self.turn(state)
        try:
            yield
        finally:
            self.turn(before)

    def move(self, seconds: float, source: str, target: str) -> None:
        """Reattributes seconds from `source` to `target`."""
        self.seconds[source] -= seconds
        self.seconds[target] += seconds

    def read(self) -> dict[str, float]:
        """Returns seconds by state until now; they add up to the age of the command."""
        self.turn(self._state)
        return dict(self.seconds)

    def _compiled(self, event: str, seconds: float, **_: Any) -> None:
        if event == _COMPILED and threading.get_ident() == self._thread:
            self.move(seconds, self._state, "compile")

    def __enter__(self) -> "Clock":
        self._thread = threading.get_ident()  # other runs may compile in other threads
        jax.monitoring.register_event_duration_secs_listener(self._compiled)
        return self

    def __exit__(self, *error: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._compiled)


class Starts:
    """The starts of a run, this one last; rewrites `starts.json` as the run proceeds."""

    def __init__(self, workdir: Path, clock: Clock, step: int, chips: float):
        self._file, self._clock = Rewritten(workdir / STARTS), clock
        earlier = read_starts(workdir)
        self._this = {"began": clock.began, "from_step": step, "to_step": step, "chips": chips}
        self._all = [*earlier, self._this]
        self.count, self.chips = len(self._all), chips

    def keep(self, step: int, in_passing: bool = False) -> None:
        """Records that this start has reached `step`; `in_passing` as in `Rewritten.write`."""
        self._this |= {"ended": time.time(), "to_step": step, "seconds": self._clock.read()}
        self._write(in_passing)

    def saved(self, step: int) -> None:
        """Records that `step` has a checkpoint, so that its loss is noticed."""
        self._this["saved"] = step
        self._write()

    def _write(self, in_passing: bool = False) -> None:
        if is_main():
            self._file.write(json.dumps(self._all, indent=1) + "\n", in_passing)

    def seconds(self) -> dict[str, float]:
        """Returns seconds of the run by state, with `LOST` and `DOWN`, as of the last `keep`."""
        return add_up(self._all)

    def goodput(self) -> str:
        """Returns goodput as text, with the other states' shares in brackets."""
        run = shares(self.seconds())
        rest = sorted(((v, k) for k, v in run.items() if k != "train" and v >= 0.005), reverse=True)
        parts = [f"{state} {share:.0%}" for share, state in rest]
        if self.count > 1:
            parts.append(f"this start alone {shares(self._this['seconds'])['train']:.0%}")
        return f"{run['train']:.0%}" + f" ({', '.join(parts)})" * bool(parts)

    def chip_hours(self) -> float:
        """Returns the chip-hours of all starts, as of the last `keep`."""
        return sum(s["chips"] * sum(s["seconds"].values()) for s in self._all) / 3600

    def summary(self, on_chips: bool = True) -> str:
        """Returns the run's time as text, as of the last `keep`, with chip-hours if `on_chips`."""
        whole = datetime.timedelta(seconds=round(sum(self.seconds().values())))
        starts = f", {self.count} starts" * (self.count > 1)
        hours = f", {self.chip_hours():,.2f} chip-hours" * on_chips
        return f"took {whole}{starts}{hours}: goodput {self.goodput()}"


def read_starts(workdir: Path) -> list[dict[str, Any]]:
    """Reads the starts of a run, oldest first; empty without `starts.json`."""
    if not (file := workdir / STARTS).exists():
        return []
    keys = ("began", "ended", "from_step", "to_step", "chips", "seconds")
    remedy = "remove it: the run then forgets how its time was spent"
    return read_json(file, remedy, list, keys)


def add_up(starts: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Adds up seconds by state over the starts of one run, oldest first.

    Steps after the one that a later start resumed from are lost, with their share of the time. If
    hosts' clocks differ, a pause may look negative; it counts as 0.
    """
    total = dict.fromkeys((*STATES, LOST, DOWN), 0.0)
    for i, start in enumerate(starts):
        for state, seconds in start["seconds"].items():
            total[state] += seconds
        if later := starts[i + 1 :]:
            made = start["to_step"] - start["from_step"]
            back_to = max(min(s["from_step"] for s in later), start["from_step"])
            if made and back_to < start["to_step"]:
                lost = start["seconds"]["train"] * (start["to_step"] - back_to) / made
                total["train"] -= lost
                total[LOST] += lost
            total[DOWN] += max(0.0, later[0]["began"] - start["ended"])
    return total


def shares(seconds: dict[str, float]) -> dict[str, float]:
    """Returns each state's share of the sum."""
    whole = sum(seconds.values())
    return {state: value / whole for state, value in seconds.items()}
