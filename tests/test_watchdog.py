"""Processes that hang, are told to end meanwhile, or lose another."""

import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from processes import cluster, finish, pretrain

from vit_jax.parallel import multihost, watchdog
from vit_jax.parallel.watchdog import Watchdog, waits_for


@pytest.fixture
def ended(monkeypatch):
    """What would have ended the process: (event, [(exit code, message)])."""
    event, ends = threading.Event(), []

    def end(code, message, stacks=False):
        ends.append((code, message))
        event.set()

    monkeypatch.setattr(watchdog, "end", end)
    return event, ends


def test_a_thread_without_progress_ends_the_process(ended):
    event, ends = ended
    with Watchdog(0.3 / 60, "trial 3"):
        with Watchdog(None):  # inside another: never
            for step in range(8):
                waits_for(f"step {step}")
                assert not event.wait(0.1)
        assert not ends
        waits_for("input of step 9")
        assert event.wait(10)
    code, message = ends[0]
    assert code == 1 and re.search(r"trial 3: input of step 9 \(\d s\)", message)
    waits_for("nobody listens")
    assert "something outside of a run" in watchdog.waiting()


def test_sigterm_while_blocked_ends_at_the_second():
    """The first is left to the run, which may save; several at once are one."""
    code = (
        "import threading\n"
        "from vit_jax.parallel.preemption import Preemption\n"
        "from vit_jax.parallel.watchdog import Watchdog, waits_for\n"
        "with Watchdog(60), Preemption() as preemption:\n"
        "    waits_for('the storage')\n"
        "    print(flush=True)\n"
        "    threading.Lock().acquire() and threading.Event().wait()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.readline()
    for _ in range(3):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.05)
    time.sleep(1.2)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == multihost.PREEMPTED
    assert "without saving, by a second SIGTERM" in err and "waits for the storage" in err


JOIN = ("--join_seconds=20", "--config.hang_minutes=10")


@pytest.mark.slow
def test_processes_killed_before_and_in_the_roll_call(tmp_path):
    """Those that wait end in the time they were given, by name, or on SIGTERM at once."""

    def arguments(i):
        return pretrain(tmp_path / "run", 12, *JOIN)

    processes = cluster(4, 1, arguments)
    processes[1].kill()
    assert "waiting for processes [1] of 4" in processes[0].stderr.readline()
    processes[2].kill()
    processes[3].terminate()
    began = time.monotonic()
    codes, errors = finish(processes, timeout=60)
    assert time.monotonic() - began < 30
    assert codes == [1, -signal.SIGKILL, -signal.SIGKILL, multihost.PREEMPTED]
    assert "error: processes [1, 2, 3] of 4 did not connect; there are:" in errors[0]
    assert "told to end (SIGTERM) before all processes had come" in errors[3]


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_process_killed_after_the_roll_call(tmp_path, killed):
    """The other ends at once, to be started again, and names it; one that is paused goes on."""
    processes = cluster(2, 1, lambda i: pretrain(tmp_path / "run", 100_000, *JOIN))
    metrics = tmp_path / "run" / "metrics.jsonl"

    def wait_for(steps):
        while not (metrics.exists() and metrics.read_text().count("\n") > steps):
            assert all(p.poll() is None for p in processes), finish(processes)[1]
            time.sleep(0.01)

    wait_for(2)
    processes[killed].send_signal(signal.SIGSTOP)
    time.sleep(1.5 * multihost.HEARTBEAT_SECONDS)
    processes[killed].send_signal(signal.SIGCONT)
    wait_for(metrics.read_text().count("\n") + 2)
    processes[killed].kill()
    began = time.monotonic()
    codes, errors = finish(processes, timeout=120)
    assert time.monotonic() - began < 5
    assert codes[1 - killed] == multihost.PREEMPTED
    last = errors[1 - killed].strip().splitlines()[-1]
    assert last.startswith("error: another process of this run has ended: process")
    assert f"process {killed} on {socket.gethostname()}. It was killed" in last
    assert "Traceback" not in errors[1 - killed] and "Thread 0x" not in errors[1 - killed]
