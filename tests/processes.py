"""Starts the commands as users do, and reads the files they leave."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments.campaigns.kills import checkpoint_arrays, records

ROOT = Path(__file__).parent.parent
TINY = (
    "--config.model.depth=1",
    "--config.batch_size=8",
    "--config.checkpoint.every=4",
    "--config.log_every=1",
    "--config.eval_every=10",
    "--config.evaluators.validation.data.split=validation[:20]",
    "--config.evaluators.validation.batch_size=8",
)


def start(module, *arguments, **environment):
    """Starts a command."""
    return subprocess.Popen(
        [sys.executable, "-m", f"vit_jax.{module}", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def command(module, *arguments):
    """Runs a command to its end: (exit code, output, errors)."""
    process = start(module, *arguments)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


# Each command runs in a child of one process that has imported what takes seconds to import.
FORKS = """
import gc, json, os, runpy, sys
import vit_jax.classifier.workflow
gc.freeze()  # a child that ends doesn't look through all of it: 0.6 s
for module, arguments, out, err in json.load(sys.stdin):
    if not os.fork():
        for path, descriptor in ((out, 1), (err, 2)):
            os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY), descriptor)
        sys.argv = [module, *arguments]
        runpy.run_module(f"vit_jax.{module}", run_name="__main__", alter_sys=True)
        sys.exit()
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


def commands(folder, cases):
    """Runs commands to their ends: [(exit code, output, errors)]; `folder` is for logs."""
    files = [(folder / f"{i}.out", folder / f"{i}.err") for i in range(len(cases))]
    rows = [
        [module, list(map(str, arguments)), *map(str, pair)]
        for (module, *arguments), pair in zip(cases, files, strict=True)
    ]
    done = subprocess.run(
        [sys.executable, "-c", FORKS],
        input=json.dumps(rows),
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        timeout=300,
    )
    codes = map(int, done.stdout.split())
    return [
        (code, out.read_text(), err.read_text())
        for code, (out, err) in zip(codes, files, strict=True)
    ]


def free_port():
    """Returns a free port of this machine."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def cluster(processes, devices, arguments_of, environment_of=lambda i: {}):
    """Starts the processes of one run on this machine; arguments_of(i) are those of process i."""
    port = free_port()
    return [
        start(
            *arguments_of(i),
            "--distributed",
            JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{port}",
            JAX_NUM_PROCESSES=str(processes),
            JAX_PROCESS_ID=str(i),
            JAX_NUM_CPU_DEVICES=str(devices),
            JAX_CPU_COLLECTIVES_IMPLEMENTATION="gloo",
            **environment_of(i),
        )
        for i in range(processes)
    ]


def finish(processes, timeout=300):
    """Waits for processes; returns their exit codes and standard errors."""
    outputs = [process.communicate(timeout=timeout) for process in processes]
    return [process.returncode for process in processes], [err for _, err in outputs]


def pretrain(workdir, steps, *arguments):
    """Returns the arguments of a small pretraining."""
    config = f"--config=configs/pretrain/formula.py:classes=10,steps={steps}"
    return ("pretrain", config, f"--workdir={workdir}", *TINY, *arguments)


def equal_runs(workdir, other, gradients=0.0):
    """Asserts that two runs ended with the same state and recorded the same, up to rounding.

    `gradients`: tolerance relative to the largest gradient; SGD's momentum sums gradients up.
    """
    expected, found = checkpoint_arrays(other), checkpoint_arrays(workdir)
    assert expected.keys() == found.keys()
    for name, array in expected.items():
        if name != "step":
            atol = 1e-5 + gradients * np.abs(array).max() * ("['trace']" in name)
            np.testing.assert_allclose(found[name], array, atol=atol, rtol=0, err_msg=name)
    ours, theirs = records(workdir), records(other)
    assert [r["step"] for r in ours] == [r["step"] for r in theirs]
    for a, b in zip(ours, theirs, strict=True):
        if "grad_norm" in b:
            assert a.pop("grad_norm") == pytest.approx(b.pop("grad_norm"), rel=gradients, abs=1e-4)
        assert a == pytest.approx(b, abs=1e-4)
        if "loss" in b:
            assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
