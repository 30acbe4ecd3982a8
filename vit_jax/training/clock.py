"""Where a run's time goes: every second since its command began belongs to one state.

Goodput is the share of the wall time that went into training steps which count. What the other
states took is told apart, over all starts of a run: `starts.json` in the workdir keeps, for each,
its steps and the seconds of its states.
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
    "input",  # devices idle because the next batch isn't there
    "evaluate",
    "save",  # as long as a checkpoint keeps steps from running; the rest is in the background
    "profile",  # writing the trace
)
# Over several starts, besides: `train` of steps that had to be made again, and between two starts.
LOST, DOWN = "lost", "down"

STARTS = "starts.json"
_COMPILED = "/jax/core/compile/backend_compile_duration"


def process_age() -> float:
    """Seconds since this process began; 0 where the system doesn't tell."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    except FileNotFoundError:
        return 0.0
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


class Clock:
    """Attributes time to states, beginning `age` seconds ago with "start".

    While entered, it finds compilations by itself, wherever they happen in the thread that entered
    it. `seconds` is by state, the current one's up to the last change; `read` is up to now.
    """

    def __init__(self, age: float = 0.0):
        self.seconds = dict.fromkeys(STATES, 0.0)
        self._state, self._since = "start", time.perf_counter() - age
        self.began = time.time() - age

    def turn(self, state: str) -> None:
        """What follows is `state`."""
        now = time.perf_counter()
        self.seconds[self._state] += now - self._since
        self._state, self._since = state, now

    @contextmanager
    def within(self, state: str) -> Iterator[None]:
        """What is inside is `state`, what follows is as before. Tells the watchdog."""
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
        """Seconds by state until now; their sum is the age of the command."""
        self.turn(self._state)
        return dict(self.seconds)

    def _compiled(self, event: str, seconds: float, **_: Any) -> None:
        if event == _COMPILED and threading.get_ident() == self._thread:
            self.move(seconds, self._state, "compile")

    def __enter__(self) -> "Clock":
        self._thread = threading.get_ident()  # in others, other runs may compile
        jax.monitoring.register_event_duration_secs_listener(self._compiled)
        return self

    def __exit__(self, *error: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._compiled)


class Starts:
    """The starts of a run, this one the last: `starts.json`, rewritten while it goes on."""

    def __init__(self, workdir: Path, clock: Clock, step: int, chips: float):
        self._file, self._clock = Rewritten(workdir / STARTS), clock
        earlier = read_starts(workdir)
        self._this = {"began": clock.began, "from_step": step, "to_step": step, "chips": chips}
        self._all = [*earlier, self._this]
        self.count, self.chips = len(self._all), chips

    def keep(self, step: int, in_passing: bool = False) -> None:
        """Writes down that this start has come to `step`; `in_passing` as `Rewritten.write`."""
        self._this |= {"ended": time.time(), "to_step": step, "seconds": self._clock.read()}
        self._write(in_passing)

    def saved(self, step: int) -> None:
        """Writes down that there is a checkpoint of `step`, so that its loss is noticed."""
        self._this["saved"] = step
        self._write()

    def _write(self, in_passing: bool = False) -> None:
        if is_main():
            self._file.write(json.dumps(self._all, indent=1) + "\n", in_passing)

    def seconds(self) -> dict[str, float]:
        """Seconds of the run by state, `LOST` and `DOWN` among them, as of the last `keep`."""
        return add_up(self._all)

    def goodput(self) -> str:
        """For people: the share of training, and in brackets where the rest went."""
        run = shares(self.seconds())
        rest = sorted(((v, k) for k, v in run.items() if k != "train" and v >= 0.005), reverse=True)
        parts = [f"{state} {share:.0%}" for share, state in rest]
        if self.count > 1:
            parts.append(f"this start alone {shares(self._this['seconds'])['train']:.0%}")
        return f"{run['train']:.0%}" + f" ({', '.join(parts)})" * bool(parts)

    def chip_hours(self) -> float:
        """Of all starts, as of the last `keep`."""
        return sum(s["chips"] * sum(s["seconds"].values()) for s in self._all) / 3600

    def summary(self, on_chips: bool = True) -> str:
        """For people: the whole run's time, as of the last `keep`; chip-hours if `on_chips`."""
        whole = datetime.timedelta(seconds=round(sum(self.seconds().values())))
        starts = f", {self.count} starts" * (self.count > 1)
        hours = f", {self.chip_hours():,.2f} chip-hours" * on_chips
        return f"took {whole}{starts}{hours}: goodput {self.goodput()}"


def read_starts(workdir: Path) -> list[dict[str, Any]]:
    """The starts of a run, oldest first; none where there is no `starts.json`."""
    if not (file := workdir / STARTS).exists():
        return []
    keys = ("began", "ended", "from_step", "to_step", "chips", "seconds")
    remedy = "remove it: the run then forgets what its time was spent on"
    return read_json(file, remedy, list, keys)


def add_up(starts: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Seconds by state over the starts of one run, oldest first.

    Steps beyond the one that a later start went back to are lost, and their share of the time with
    them. Hosts whose clocks differ may make a pause look negative: it counts as none.
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
    """Each state's share of the whole."""
    whole = sum(seconds.values())
    return {state: value / whole for state, value in seconds.items()}
