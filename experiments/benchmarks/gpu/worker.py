"""Runs measurements in a process of their own, which may die, hang or hold the device's memory.

`Worker` starts the process, which imports a class and makes an instance. A request is the name of a
method and its arguments; the answer is the values that it returns, or its error. Requests and
answers are lines of JSON. What the process prints goes to a log.
"""

import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parents[3]
# How frameworks say that memory is short.
_OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "out of memory", "OutOfMemory", "CUBLAS_STATUS_ALLOC")


class Failed(Exception):
    """A measurement failed; the message is one line."""

    def __init__(self, message: str):
        lines = [line.strip() for line in message.splitlines() if line.strip()]
        super().__init__((lines or ["no message"])[0][:500])
        self.out_of_memory = any(sign in message for sign in _OUT_OF_MEMORY)


class Worker:
    """A process that holds an instance of a class.

    Args:
      what: module:class; the instance is made by the first request, "start", with its arguments.
      log: file that its output is appended to when it ends.
      environment: variables added to this process's.
    """

    def __init__(self, what: str, log: Path, environment: dict[str, str]):
        self._what, self._log, self._environment = what, log, {**os.environ, **environment}
        self._launch()

    def _launch(self) -> None:
        self._output = _new_output()
        self._answers, theirs = os.pipe()
        command = [sys.executable, "-m", "experiments.benchmarks.gpu.worker", self._what]
        self._process = subprocess.Popen(
            [*command, str(theirs)],
            cwd=ROOT,
            env=self._environment,
            stdin=subprocess.PIPE,
            stdout=self._output,
            stderr=self._output,
            pass_fds=[theirs],
        )
        os.close(theirs)
        self._received, self._started = b"", False

    def start(self, patience: float, **arguments: Any) -> None:
        """Makes the instance; in a new process, if the old one has ended."""
        if self._process.poll() is not None:
            self.close()
            self._launch()
        if not self._started:
            self.call(patience, "start", **arguments)
            self._started = True

    def tell(self, method: str, **arguments: Any) -> None:
        """Sends a request; `hear` returns its answer."""
        if self._answers is None:
            return
        with contextlib.suppress(BrokenPipeError):  # it has ended: `hear` says so
            self._process.stdin.write(json.dumps([method, arguments]).encode() + b"\n")
            self._process.stdin.flush()

    def hear(self, patience: float) -> Any:
        """Returns the oldest request's answer.

        Raises Failed for an error, if the process ends, or after `patience` seconds.
        """
        if self._answers is None:
            raise Failed("its process has ended")
        deadline = time.monotonic() + patience
        while b"\n" not in self._received:
            left = max(0, deadline - time.monotonic())
            ready, _, _ = select.select([self._answers], [], [], left)
            chunk = os.read(self._answers, 1 << 16) if ready else b""
            if not chunk:
                last = self.close(patience=5 if ready else 0)
                why = f"ended with code {self._process.returncode}: {last}"
                raise Failed(why if ready else f"no answer within {patience:.0f} s")
            self._received += chunk
        line, _, self._received = self._received.partition(b"\n")
        answer = json.loads(line)
        if "error" in answer:
            raise Failed(answer["error"])
        return answer["values"]

    def call(self, patience: float, method: str, **arguments: Any) -> Any:
        """Sends a request and returns its answer, as `hear`."""
        self.tell(method, **arguments)
        return self.hear(patience)

    def close(self, patience: float = 5) -> str:
        """Ends the process, forcibly after `patience` seconds; returns its last line of output.

        All of its output is appended to the log.
        """
        if self._answers is None:
            return ""
        with contextlib.suppress(BrokenPipeError, subprocess.TimeoutExpired):
            self._process.stdin.close()
            self._process.wait(patience)
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        os.close(self._answers)
        self._answers = None
        return _append(self._log, self._what, self._output)


def run_module(
    arguments: Sequence[str],
    log: Path,
    environment: dict[str, str],
    patience: float,
    stop: Callable[[], bool] = lambda: False,
) -> None:
    """Runs a module with its arguments to its end, or kills it when `stop` returns true.

    Raises Failed if it fails, or after `patience` seconds.
    """
    output, deadline, stopped = _new_output(), time.monotonic() + patience, False
    process = subprocess.Popen(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=output,
        stderr=output,
    )
    while process.poll() is None:
        stopped = stop()
        if stopped or time.monotonic() > deadline:
            process.kill()
            process.wait()
        time.sleep(0.02)
    last = _append(log, " ".join(arguments), output)
    if time.monotonic() > deadline:
        raise Failed(f"{arguments[0]} did not end within {patience:.0f} s")
    if process.returncode and not stopped:
        raise Failed(f"{arguments[0]} ended with code {process.returncode}: {last}")


def _new_output() -> IO[str]:
    return tempfile.TemporaryFile("w+", errors="replace")


def _append(log: Path, title: str, output: IO[str]) -> str:
    """Appends a process's output to the log; returns its last line."""
    with output, log.open("a") as file:
        output.seek(0)
        text = output.read()
        file.write(f"--- {title}\n{text}")
    return next((line for line in reversed(text.splitlines()) if line.strip()), "no message")


def serve(what: str, answers: int) -> None:
    """Answers the requests of standard input until it ends."""
    module, _, name = what.partition(":")
    instance = None
    with os.fdopen(answers, "w") as output:
        for line in sys.stdin:
            method, arguments = json.loads(line)
            try:
                if method == "start":
                    instance, values = getattr(import_module(module), name)(**arguments), None
                else:
                    values = getattr(instance, method)(**arguments)
                answer = {"values": values}
            except Exception as error:  # the parent keeps it as the measurement's result
                traceback.print_exc()
                said = str(error) or traceback.extract_tb(error.__traceback__)[-1].line
                answer = {"error": f"{type(error).__name__}: {said}"}
            output.write(json.dumps(answer) + "\n")
            output.flush()


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
