"""Output of a run: `metrics.jsonl`, other writers and a progress line."""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from itertools import takewhile
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from vit_jax.config import InputError
from vit_jax.costs.chips import PEAK_FLOPS
from vit_jax.parallel.multihost import everyones, is_main
from vit_jax.parallel.run_files import open_lines, write_whole
from vit_jax.training.clock import DOWN, LOST, STATES, Clock, Starts, shares
from vit_jax.training.writers import MetricsConfig, Writer, open_writers
from vit_jax.weights.trained import saved_steps

# Values measured by the clock. Only these differ between a run and its repetition.
CLOCK = (
    "img_per_sec",
    "img_per_sec_per_chip",
    "mfu",
    "input_wait",  # share of the time since the last record, for the process that waited longest
    "input_wait_process",
    "goodput",  # share of the run's wall time; time_* are the other states' shares
    "goodput_this_start",
    *(f"time_{state}" for state in (*STATES, LOST, DOWN) if state != "train"),
    "eta",  # seconds
    "chip_hours",
    "seconds",  # of an evaluation
)
# If devices wait for input for at least this share of time, the log says the job is input-bound.
INPUT_BOUND = 0.1


class Metrics:
    """Writes one JSON record per line, {"step": n, name: value, ...}, and shows progress.

    On resuming from step n, removes records of later steps, which will be written again, and a line
    that a killed process left unfinished. With a `label` all lines begin with it and there is no
    bar, since other runs write to the same terminal. Only the first process writes. Writers that
    can show the `recipe` do.
    """

    def __init__(
        self,
        workdir: Path,
        steps: int,
        resumed_step: int = 0,
        label: str = "",
        config: MetricsConfig | None = None,
        recipe: Mapping[str, Any] | None = None,
    ):
        self._bar = None
        self._file = None
        self._writers: list[Writer] = []
        self._advised = False
        self._prefix = f"{label}: " if label else ""
        self.steps = steps
        self.workdir = workdir
        if not is_main():
            return
        path = workdir / "metrics.jsonl"
        _truncate(path, resumed_step)
        self._file = open_lines(path)
        self._writers = open_writers(config or MetricsConfig(), workdir, resumed_step, recipe or {})
        if sys.stderr.isatty() and not label:
            self._bar = tqdm(total=steps, initial=resumed_step, unit="step", dynamic_ncols=True)
        for note in filter(None, (writer.note for writer in self._writers)):
            self.say(note)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Records scalars of a step; `flush` makes them durable."""
        if not self._file:
            return
        try:
            self._file.write(json.dumps({"step": step, **values}) + "\n")
        except OSError as error:
            if error.errno is None:  # from a bucket; it names the file
                raise
            raise OSError(error.errno, os.strerror(error.errno), self._file.name) from error
        for writer in self._writers:
            writer.write(step, values)

    def flush(self) -> None:
        """Returns once all records are stored, also in a bucket."""
        if self._file:
            self._file.flush()

    def progress(self, step: int, values: dict[str, float], goodput: str = "") -> None:
        """Shows loss, speed, goodput and time to go: a bar on a terminal, a line elsewhere.

        `values` is a record whose loss is the mean since the previous record; `goodput` replaces
        the plain number on a line.
        """
        shown = {"loss": f"{values['loss']:.4f}", "img/s": f"{values['img_per_sec']:,.0f}"}
        if self._bar is None:
            shown["img/s/chip"] = f"{values['img_per_sec_per_chip']:,.0f}"
        if "mfu" in values:
            shown["MFU"] = f"{values['mfu']:.1%}"
        shown["goodput"] = f"{values['goodput']:.0%}"
        input_bound = values["input_wait"] >= INPUT_BOUND
        if self._bar is not None:
            shown |= {"input-bound": f"{values['input_wait']:.0%}"} if input_bound else {}
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update(step - self._bar.n)
            return
        shown["goodput"] = goodput or shown["goodput"]
        shown["ETA"] = tqdm.format_interval(values["eta"])
        if "chip_hours" in values:
            shown["chip-hours"] = f"{values['chip_hours']:,.2f}"
        line = "  ".join(f"{k} {v}" for k, v in shown.items())
        if input_bound:
            where = f" (process {values['input_wait_process']})" * (jax.process_count() > 1)
            line += f"  input-bound: {values['input_wait']:.0%} of the time waits for data{where}"
        self.say(f"step {step}/{self.steps}  {line}")
        if input_bound and not self._advised:
            self._advised = True
            self.say(
                "input-bound: devices idle until a batch is ready. Try data.num_workers, "
                "data.num_threads, nearer storage or a cheaper data.preprocess"
            )

    def say(self, text: str) -> None:
        """Prints a line of text."""
        if is_main():
            tqdm.write(self._prefix + text, file=sys.stderr)

    def saved(self, step: int) -> None:
        """Prints that a checkpoint is complete."""
        self.say(f"step {step} is saved")

    def evaluated(self, step: int) -> bool:
        """Whether that step's evaluation is recorded; True on processes that don't record."""
        if not is_main():
            return True
        self.flush()
        records = read_metrics(self.workdir)
        return any(r["step"] == step and any("/" in name for name in r) for r in records)

    def last(self) -> dict[str, float]:
        """Returns the newest value of everything recorded."""
        self.flush()
        records = read_metrics(self.workdir) if is_main() else []
        return {name: value for record in records for name, value in record.items()}

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for resource in filter(None, (self._bar, self._file, *self._writers)):
            # On a full disk this fails again; the error that ends the run says more.
            with suppress(OSError) if kind else nullcontext():
                resource.close()


class Recorder:
    """Fetches each step's metrics while the next step runs, and records those due.

    Raises FloatingPointError, with the steps to look at, for values that aren't finite.
    """

    def __init__(
        self,
        metrics: Metrics,
        clock: Clock,
        starts: Starts,
        *,
        start: int,
        log_every: int,
        batch_size: int,
        flops: Callable[[int, int], int],
        devices: int,
    ):
        self.metrics, self._clock, self._starts = metrics, clock, starts
        self._log_every = log_every
        self._pending: tuple[int, dict[str, jax.Array]] | None = None
        self._checked = self._recorded = self._start = start
        self._skipped = 0  # broken examples since the last record
        self._losses: list[jax.Array] = []  # of the steps since the last record
        self._batch_size, self._flops = batch_size, flops
        peak = PEAK_FLOPS.get(jax.devices()[0].device_kind)
        self._peak = peak and peak * devices
        self._lap = dict(clock.read())
        # Another thread notes when a step finishes: only waits for input after that cost time.
        self._watcher = ThreadPoolExecutor(1)
        self._finished: Future[float] | None = None  # when the pending step finished
        self._waited = (0.0, 0.0)  # start and end of the wait for the next step's batch

    def add(self, step: int, values: dict[str, jax.Array]) -> None:
        """Takes the metrics of a step that is still running, and records the previous step's."""
        previous, self._pending = self._pending, (step, values)
        if previous:
            self._finish()
        self._finished = self._watcher.submit(_finished_at, values)
        if previous:
            self._record(*previous, must_check=False)

    def flush(self) -> None:
        """Waits for the newest step, checks its values, and records them if due."""
        if self._pending:
            self._finish()
            self._record(*self._pending, must_check=True)
        self._pending = None

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Times the block as the wait for the batch after the pending step's."""
        start = time.perf_counter()
        yield
        self._waited = start, time.perf_counter()

    def _finish(self) -> None:
        """Waits for the pending step, so that at most two run."""
        finished = self._finished.result()
        began, ended = self._waited
        self._clock.move(max(0.0, ended - max(began, finished)), "train", "input")
        self._waited = (0.0, 0.0)

    def _record(self, step: int, values: dict[str, jax.Array], must_check: bool) -> None:
        due = step % self._log_every == 0 or step == self.metrics.steps
        if "skipped" in values:
            self._skipped += int(values.pop("skipped"))
        self._losses.append(values["loss"])
        norms = [name for name in values if " " in name]  # of layers
        if not (due or must_check or norms):
            return
        fetched = {name: float(value) for name, value in jax.device_get(values).items()}
        if not all(map(math.isfinite, fetched.values())):
            saved = max(saved_steps(self.metrics.workdir), default=None)
            good = (
                "no checkpoint yet" if saved is None else f"the checkpoint of step {saved} is good"
            )
            shown = {k: v for k, v in fetched.items() if k not in norms or not math.isfinite(v)}
            raise FloatingPointError(
                f"not finite after step {step}: {shown}. It was finite after step "
                f"{self._checked}; {good} ({self.metrics.workdir}). Lower "
                "the learning rate, lengthen the warm-up, clip gradients, or look at the data of "
                f"steps {self._checked + 1} to {step}. To find the cause: "
                f"vit_jax replay --workdir={self.metrics.workdir} --step={step}"
            )
        self._checked = step
        if norms:  # without "/", which is in names of evaluations' values
            self.metrics.write(step, {n.replace("/", "."): fetched.pop(n) for n in norms})
        if due:
            if self._skipped:
                fetched["skipped"], self._skipped = self._skipped, 0
            fetched |= self._speed(step)
            self.metrics.write(step, fetched)
            mean = float(np.mean(jax.device_get(self._losses)))
            self._losses.clear()
            shown = {**fetched, "loss": mean}
            if jax.default_backend() == "cpu":
                del shown["chip_hours"]  # CPUs aren't billed as chips
            self.metrics.progress(step, shown, self._starts.goodput())

    def _speed(self, step: int) -> dict[str, float]:
        """Returns the clock's values for the steps since the last record, and for the run."""
        before, now = self._lap, self._clock.read()
        waits = everyones(now["input"] - before["input"])
        self._clock.move(waits.max() - (now["input"] - before["input"]), "train", "input")
        self._lap = self._clock.read()
        lap = {state: seconds - before[state] for state, seconds in self._lap.items()}
        running = lap["train"] + lap["input"]
        seconds = running / (step - self._recorded)
        flops, left = self._flops(self._recorded, step), self._flops(step, self.metrics.steps)
        self._recorded = step
        self._starts.keep(step, in_passing=True)
        run = shares(self._starts.seconds())
        stalls = (self._lap["evaluate"] + self._lap["save"]) / (step - self._start)
        values = {
            "img_per_sec": self._batch_size / seconds,
            "img_per_sec_per_chip": self._batch_size / seconds / self._starts.chips,
            "input_wait": lap["input"] / running,
            "input_wait_process": int(waits.argmax()),
            "goodput": run["train"],
            "goodput_this_start": shares(self._lap)["train"],
            **{f"time_{state}": share for state, share in run.items() if state != "train"},
            "eta": running * left / flops + (self.metrics.steps - step) * stalls,
            "chip_hours": self._starts.chip_hours(),
        }
        return values | ({"mfu": flops / running / self._peak} if self._peak else {})

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *error: object) -> None:
        self._watcher.shutdown(wait=False)


def _finished_at(values: dict[str, jax.Array]) -> float:
    jax.block_until_ready(values)
    return time.perf_counter()


def read_metrics(workdir: Path) -> list[dict[str, float]]:
    """Reads all records of a run, except a line that a killed process left unfinished.

    Raises ValueError, with the line number, for a line that isn't a record.
    """
    path = workdir / "metrics.jsonl"
    return [record for _, record in _records(path)]


def _records(path: Path) -> Iterator[tuple[str, dict[str, float]]]:
    """Yields (line, record) for each record; nothing without a file."""
    if not path.exists():
        return
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n"):
                return
            try:
                text = line.decode()
                record = json.loads(text)
                if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                    raise InputError("no step")
            except ValueError as error:
                raise InputError(
                    f"{path}, line {number} is damaged ({error}), found {line[:40]!r}: expected a "
                    "record in JSON. Delete the line: the run continues without the record"
                ) from error
            yield text, record


def _truncate(path: Path, last_step: int) -> None:
    if path.exists():
        records = takewhile(lambda record: record[1]["step"] <= last_step, _records(path))
        write_whole(path, "".join(line for line, _ in records))
