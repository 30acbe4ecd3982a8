"""Keeps the results of measurements as they come, within a time budget.

A measurement ends in one of four ways, and gpu.json says which: `values`; `out_of_memory`;
`failed`, with the message; `skipped`, if it would not have fitted into the time left. The file is
replaced after each, so that a killed command loses only the measurement under way. The next start
keeps values and out of memory, and measures the rest.
"""

import contextlib
import datetime
import json
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from experiments.benchmarks.gpu.worker import Failed, Worker
from vit_jax.config import InputError
from vit_jax.parallel.run_files import read_json, write_whole

LEAST_SECONDS = 20  # a worker may take at least this long for an answer
REHEARSAL_SECONDS = 900
REMEDY = "choose another --output, or remove it to measure everything again"


class Bench:
    """The results of a folder, and the time that is left.

    Attributes:
      folder: of gpu.json, log.txt and traces.
      rehearsal: whether all sizes are tiny and the device is a CPU.
      scratch: a folder for data and compiled programs that the next start does without.
    """

    def __init__(
        self,
        folder: Path,
        scratch: Path,
        machine: dict[str, Any],
        rehearsal: bool,
        seconds: float,
    ):
        self.folder, self.scratch, self.rehearsal = folder, scratch, rehearsal
        self._file = folder / "gpu.json"
        self.results = read_results(self._file)
        here = {"rehearsal": rehearsal, "gpu": machine["gpu"]}
        if machine["gpu"] == "none" and not rehearsal:  # what needs no GPU is added elsewhere
            if not self.results["starts"]:
                raise InputError(f"no results of a GPU in {self._file}: measure other parts first")
            here.pop("gpu")
        for key, value in here.items():
            if self.results.setdefault(key, value) != value:
                raise InputError(
                    f"{self._file} has results with {key} = {self.results[key]!r}, this start has "
                    f"{value!r}: {REMEDY}"
                )
        now = datetime.datetime.now().isoformat(timespec="seconds")
        self.results["starts"].append({"date": now, **machine})
        self._deadline = self._end = time.monotonic() + seconds
        self._write()

    def until(self, share: float) -> None:
        """Lets the next measurements use the budget up to `share` of what is left of it now."""
        self._deadline = time.monotonic() + share * (self._end - time.monotonic())

    @property
    def left(self) -> float:
        """Seconds that the next measurements may take together."""
        return self._deadline - time.monotonic()

    def has(self, name: str) -> bool:
        """Whether a measurement needs no repetition."""
        return bool({"values", "out_of_memory"} & self.results["measurements"].get(name, {}).keys())

    def values(self, name: str) -> dict[str, Any] | None:
        """Returns the values of a measurement, if it has any."""
        return self.results["measurements"].get(name, {}).get("values")

    def room(self, names: str | list[str], seconds: float) -> bool:
        """Whether `seconds` are left; otherwise records the measurements as skipped."""
        if seconds <= self.left:
            return True
        why = f"takes about {seconds:.0f} s, {max(self.left, 0):.0f} s were left"
        for name in [names] if isinstance(names, str) else names:
            if not self.has(name):
                self._keep(name, {"skipped": why})
        return False

    def measure(
        self, name: str, function: Callable[[], dict[str, Any]], seconds: float = 0.0
    ) -> dict[str, Any] | None:
        """Measures unless the results have it; returns the values, None without any.

        Args:
          name: the key in the results; its first word is the part.
          function: measures. An error becomes the result; its traceback goes to log.txt.
          seconds: what it takes, about; it is skipped if less is left.
        """
        if self.has(name):
            return self.values(name)
        if not self.room(name, seconds):
            return None
        began = time.monotonic()
        try:
            found: dict[str, Any] | Failed = function()
        except Failed as error:
            found = error
        except Exception as error:  # a mistake in one must not cost the other measurements
            found = self.explain(error)
        self.record(name, found, time.monotonic() - began)
        return self.values(name)

    def explain(self, error: Exception) -> Failed:
        """Writes the traceback to log.txt; returns the failure to record."""
        with (self.folder / "log.txt").open("a") as log:
            traceback.print_exception(error, file=log)
        return Failed(f"{type(error).__name__}: {error}")

    def record(self, name: str, found: dict[str, Any] | Failed, seconds: float) -> None:
        """Keeps the values of a measurement, or why it has none, and the seconds it took."""
        kind = "values"
        if isinstance(found, Failed):
            kind, found = "out_of_memory" if found.out_of_memory else "failed", str(found)
        self._keep(name, {kind: found, "seconds": round(seconds, 1)})

    @property
    def environment(self) -> dict[str, str]:
        """Variables of the processes that measure."""
        return {
            "JAX_COMPILATION_CACHE_DIR": str(self.scratch / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            # Two frameworks share the memory, and the pool grows to what a step needs.
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95",
            "JAX_PLATFORMS": "cpu" if self.rehearsal else "cuda,cpu",
        }

    @contextlib.contextmanager
    def worker(self, what: str, environment: dict[str, str] | None = None) -> Iterator[Worker]:
        """A process for measurements: see `Worker`. Its errors go to log.txt."""
        environment = {**self.environment, **(environment or {})}
        worker = Worker(what, self.folder / "log.txt", environment)
        try:
            yield worker
        except BaseException:
            worker.close(patience=0)
            raise
        worker.close()

    def patience(self, seconds: float) -> float:
        """Seconds to wait for an answer that should take `seconds`: no more than what is left."""
        if self.rehearsal:
            return REHEARSAL_SECONDS
        return max(LEAST_SECONDS, min(4 * seconds, self._end - time.monotonic()))

    def _keep(self, name: str, found: dict[str, Any]) -> None:
        start = len(self.results["starts"]) - 1
        self.results["measurements"][name] = {**found, "start": start}
        self._write()
        shown = json.dumps({k: v for k, v in found.items() if k != "seconds"})
        print(f"{name}: {shown[:400]}", flush=True)

    def _write(self) -> None:
        write_whole(self._file, json.dumps(self.results, indent=1) + "\n")


def read_results(file: Path) -> dict[str, Any]:
    """Reads gpu.json; without it, returns empty results. Raises ValueError for a damaged file."""
    if not file.exists():
        return {"starts": [], "measurements": {}}
    results = read_json(file, REMEDY, dict, ("starts", "measurements"))
    rows = results["measurements"].values() if isinstance(results["measurements"], dict) else [None]
    if not (isinstance(results["starts"], list) and all(isinstance(row, dict) for row in rows)):
        raise InputError(f"{file} is damaged (starts or measurements aren't rows): {REMEDY}")
    return results
