"""What a run says while it runs: `metrics.jsonl`, TensorBoard when installed, a progress line."""

import importlib.util
import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import jax
from tqdm import tqdm

from vit_jax.analysis.chips import PEAK_FLOPS
from vit_jax.parallel.multihost import is_main

# Measured by the clock: the only values that differ between a run and its repetition.
CLOCK = ("img_per_sec", "img_per_sec_per_device", "mfu", "input_wait", "seconds")


class Metrics:
    """Writes one JSON record a line, {"step": n, name: value, ...}, and shows progress.

    On resuming from step n, records of later steps, which will be made again, are cut off, and
    with them a line that a killed process left unfinished.
    """

    def __init__(self, workdir: Path, steps: int, resumed_step: int = 0):
        self._bar = None
        self._file = None
        self._board = None
        self.steps = steps
        self.workdir = workdir
        if not is_main():
            return
        path = workdir / "metrics.jsonl"
        _truncate(path, resumed_step)
        self._file = path.open("a", buffering=1)
        if importlib.util.find_spec("tensorboardX"):
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=resumed_step + 1)
        if sys.stderr.isatty():
            self._bar = tqdm(total=steps, initial=resumed_step, unit="step", dynamic_ncols=True)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Records scalars of a step; they are on the disk's way when this returns."""
        if not self._file:
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        if self._board:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def progress(self, step: int, values: dict[str, float], seconds_per_step: float) -> None:
        """Shows loss, speed and time to go: a bar on a terminal, a line elsewhere."""
        shown = {"loss": f"{values['loss']:.4f}", "img/s": f"{values['img_per_sec']:,.0f}"}
        if "mfu" in values:
            shown["MFU"] = f"{values['mfu']:.1%}"
        if self._bar is not None:
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update(step - self._bar.n)
            return
        to_go = seconds_per_step * (self.steps - step)
        shown["ETA"] = tqdm.format_interval(to_go)
        self.say(f"step {step}/{self.steps}  " + "  ".join(f"{k} {v}" for k, v in shown.items()))

    def say(self, text: str) -> None:
        """A line of text for people."""
        if is_main():
            tqdm.write(text, file=sys.stderr)

    def evaluated(self, step: int) -> bool:
        """Whether an evaluation of that step is recorded; processes that don't record say yes."""
        if not is_main():
            return True
        records = read_metrics(self.workdir)
        return any(r["step"] == step and any("/" in name for name in r) for r in records)

    def last(self) -> dict[str, float]:
        """The newest value of everything recorded."""
        records = read_metrics(self.workdir) if is_main() else []
        return {name: value for record in records for name, value in record.items()}

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for resource in (self._bar, self._file, self._board):
            if resource is not None:
                resource.close()


class Stopwatch:
    """Time of training alone."""

    def __init__(self):
        self.reset()

    def reset(self) -> float:
        """Starts anew; returns the seconds since the last start."""
        now = time.perf_counter()
        seconds = now - getattr(self, "_start", now)
        self._start, self._waited = now, 0.0
        return seconds

    def lap(self, steps: int) -> tuple[float, float]:
        """(seconds a step, share of them that waited for input) since the last lap."""
        waited = self._waited
        seconds = self.reset()
        return seconds / steps, waited / seconds

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts what is inside as waiting for input."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves out what is inside: evaluation, checkpoints."""
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start


class Recorder:
    """Fetches each step's metrics once the next step is under way, and records those due.

    Raises FloatingPointError for values that are not finite, naming the steps to look at.
    """

    def __init__(
        self,
        metrics: Metrics,
        stopwatch: Stopwatch,
        *,
        start: int,
        log_every: int,
        batch_size: int,
        flops_per_image: int,
    ):
        self._metrics, self._stopwatch, self._log_every = metrics, stopwatch, log_every
        self._pending: tuple[int, dict[str, jax.Array]] | None = None
        self._checked = self._recorded = start
        self._skipped = 0  # broken examples since the last record
        self._batch_size, self._flops = batch_size, flops_per_image * batch_size
        peak = PEAK_FLOPS.get(jax.devices()[0].device_kind)
        self._peak = peak and peak * jax.device_count()

    def add(self, step: int, values: dict[str, jax.Array]) -> None:
        """Takes the metrics of a step that is still under way, and records those before it."""
        previous, self._pending = self._pending, (step, values)
        if previous:
            self._record(*previous, must_check=False)

    def flush(self) -> None:
        """Waits for the newest step, records it if it is due, and checks it in any case."""
        if self._pending:
            self._record(*self._pending, must_check=True)
        self._pending = None

    def _record(self, step: int, values: dict[str, jax.Array], must_check: bool) -> None:
        jax.block_until_ready(values)  # never more than two steps under way
        due = step % self._log_every == 0 or step == self._metrics.steps
        if "skipped" in values:
            self._skipped += int(values.pop("skipped"))
        if not (due or must_check):
            return
        fetched = {name: float(value) for name, value in jax.device_get(values).items()}
        if not all(map(math.isfinite, fetched.values())):
            raise FloatingPointError(
                f"not finite after step {step}: {fetched}. It was finite after step "
                f"{self._checked}; the last checkpoint in {self._metrics.workdir} is good. Lower "
                "the learning rate, lengthen the warm-up, clip gradients, or look at the data of "
                f"steps {self._checked + 1} to {step}."
            )
        self._checked = step
        if not due:
            return
        seconds, waited = self._stopwatch.lap(step - self._recorded)
        self._recorded = step
        fetched["img_per_sec"] = self._batch_size / seconds
        fetched["img_per_sec_per_device"] = fetched["img_per_sec"] / jax.device_count()
        fetched["input_wait"] = waited
        if self._skipped:
            fetched["skipped"], self._skipped = self._skipped, 0
        if self._peak:
            fetched["mfu"] = self._flops / seconds / self._peak
        self._metrics.write(step, fetched)
        self._metrics.progress(step, fetched, seconds)


def read_metrics(workdir: Path) -> list[dict[str, float]]:
    """All records of a run."""
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def _truncate(path: Path, last_step: int) -> None:
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        if not line.endswith("\n") or json.loads(line)["step"] > last_step:
            break
        kept.append(line)
    partial = path.with_suffix(".partial")
    partial.write_text("".join(kept))
    partial.replace(path)
