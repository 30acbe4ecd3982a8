"""Kills one of several processes of a run: the others end soon, and say which one is gone."""

import json
import shutil
import socket
import subprocess
import time
from collections import Counter
from itertools import product
from pathlib import Path

from experiments.campaigns.kills import PRETRAIN, start_command
from vit_jax.parallel.preemption import PREEMPTED

JOIN_SECONDS = 20  # in which all processes must come
NOTICED_SECONDS = 5  # in which those that have come notice that another one is killed
STARTED_SECONDS = 20  # in which Python and jax are imported
PHASES = ("before the roll call", "in the roll call", "before step 1", "in a step")


def campaign(count: int, seed: int, folder: Path) -> dict[str, int]:
    """Counts outcomes for 2 and 4 processes and each phase; process 0 or the last is killed."""
    cases = [
        (phase, processes, killed)
        for phase, processes in product(PHASES, (2, 4))
        for killed in (0, processes - 1)
        if phase != "in the roll call" or processes > 2  # a third one comes late
    ]
    outcomes = Counter()
    for number in range(count):
        phase, processes, killed = cases[(seed + number) % len(cases)]
        workdir = folder / str(number)
        shutil.rmtree(workdir, ignore_errors=True)
        seconds, problem = _kill_one(workdir, phase, processes, killed)
        outcomes["WRONG: " + problem if problem else "they end"] += 1
        print(
            json.dumps(
                {"phase": phase, "processes": processes, "killed": killed, "seconds": seconds}
            ),
            flush=True,
        )
    return dict(outcomes)


def _kill_one(workdir: Path, phase: str, processes: int, killed: int) -> tuple[float, str]:
    """Seconds until all others have ended, and what is wrong with that."""
    late = 1 if phase == "in the roll call" else None
    port = _free_port()
    runs = {i: _start(workdir, port, processes, i) for i in range(processes) if i != late}
    together = phase in PHASES[2:]
    if phase == "in the roll call":
        while "waiting for processes [1]" not in runs[0].stdout.readline():
            pass
    elif together:
        file = workdir / ("metrics.jsonl" if phase == "in a step" else "config.json")
        while not (file.exists() and file.stat().st_size):
            time.sleep(0.01)
    runs.pop(killed).kill()
    began, seconds = time.monotonic(), 0.0
    for i, run in runs.items():
        said = "".join(run.communicate()[0].partition("error: ")[1:])
        seconds = max(seconds, round(time.monotonic() - began, 1))
        expected = PREEMPTED if together else 1
        named = f"process {killed} on {socket.gethostname()}" if together else "process"
        if run.returncode != expected or named not in said:
            return seconds, f"process {i} ends with {run.returncode}: {said}"
    late = seconds > (NOTICED_SECONDS if together else JOIN_SECONDS + STARTED_SECONDS)
    return seconds, "too late" * late


def _start(workdir: Path, port: int, processes: int, process: int) -> subprocess.Popen:
    arguments = [*PRETRAIN, "--config.steps=100000", f"--workdir={workdir}"]
    return start_command(
        [*arguments, "--distributed", f"--join_seconds={JOIN_SECONDS}"],
        JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{port}",
        JAX_NUM_PROCESSES=str(processes),
        JAX_PROCESS_ID=str(process),
        JAX_NUM_CPU_DEVICES="1",
        JAX_CPU_COLLECTIVES_IMPLEMENTATION="gloo",
    )


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
