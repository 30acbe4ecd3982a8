"""The launchers, against stand-ins that record their calls, and the launch page."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from vit_jax.__main__ import VERBS

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "experiments/launch"
TPU = ["--name=l16", "--zone=us-west4-a", "--workdir=/mnt/my runs/l16", "--poll=0"]
GKE = ["--cluster=pod", "--zone=us-west4-a", "--workload=l16", "--workdir=/mnt/runs/l16"]
SLURM = ["--nodes=2", "--gpus-per-node=4", "--python=python"]
CONFIG = "--config=configs/pretrain/paper.py:ViT-L/16,dataset=imagenet21k"
RECIPE = ["--", CONFIG, "--config.loss.name=it's|a b"]
SHELLCHECK = shutil.which(
    "shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
)
# Records its call. Of its answers, "words of a call|exit code|what to print", the first that fits
# is given and used up; without one it succeeds in silence.
STAND_IN = f"""#!{sys.executable}
import json, os, pathlib, sys
here = pathlib.Path(__file__)
with open(here.parent.parent / "calls", "a") as file:
    print(json.dumps([here.name, *sys.argv[1:]]), file=file)
answers = here.parent.parent / f"answers.{{here.name}}"
lines = answers.read_text().splitlines() if answers.exists() else []
for number, line in enumerate(lines):
    pattern, code, text = line.split("|")
    if pattern in " ".join(sys.argv):
        answers.write_text("\\n".join(lines[:number] + lines[number + 1:]))
        print(text)
        sys.exit(int(code))
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """The launchers and recipes in a repository of their own, with a commit."""
    path = tmp_path_factory.mktemp("launch") / "checkout"
    shutil.copytree(LAUNCH, path / "experiments/launch")
    shutil.copytree(ROOT / "configs", path / "configs")
    git(path, "init", "--quiet")
    commit(path)
    return path


def git(checkout, *arguments):
    who = ["-c", "user.name=me", "-c", "user.email=me@here", "-c", "core.hooksPath=/dev/null"]
    command = ["git", *who, *arguments]
    return subprocess.check_output(command, cwd=checkout, text=True).strip()


def commit(checkout):
    git(checkout, "add", "--all")
    git(checkout, "commit", "--quiet", "--message=all")


class Desk:
    """A checkout, with the stand-ins first in PATH."""

    def __init__(self, path: Path, checkout: Path):
        self.path, self.checkout, self.bin = path, checkout, path / "bin"
        self.bin.mkdir()
        for name in ("gcloud", "xpk", "kubectl", "sbatch", "srun", "scontrol", "sleep", "python"):
            self.stand_in(name)

    def stand_in(self, name):
        (self.bin / name).write_text(STAND_IN)
        (self.bin / name).chmod(0o755)

    def answers(self, program, *lines):
        (self.path / f"answers.{program}").write_text("\n".join(lines))

    def run(self, script, *arguments, **environment):
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))}
        path = f"{self.bin}:{os.environ['PATH']}"
        return subprocess.run(
            [self.checkout / "experiments/launch" / script, *arguments],
            cwd=self.path,  # anywhere
            env={**clean, "PATH": path, **environment},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def calls(self):
        file = self.path / "calls"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def steps(self):
        """The subcommands of gcloud, in order."""
        return [call[4] for call in self.calls() if call[0] == "gcloud"]


@pytest.fixture
def desk(tmp_path, checkout):
    return Desk(tmp_path, checkout)


def value(call, flag):
    """Returns the flag's first value: the command's own, not one that it passes on."""
    return next(a.removeprefix(f"--{flag}=") for a in call if a.startswith(f"--{flag}="))


def failed(done, *words, code=2):
    assert done.returncode == code, done.stdout + done.stderr
    for word in words:
        assert word in done.stderr


def test_tpu_vm_launch(desk):
    desk.answers(
        "gcloud",
        "describe|0|WAITING_FOR_RESOURCES",
        "describe|0|PROVISIONING",
        *["describe|0|ACTIVE"] * 3,
        "systemctl show|0|running",
        "systemctl show|0|exited",
    )
    setup = "sudo mount fs:/runs '/mnt/my runs'"
    done = desk.run(
        "tpu_vm.sh", "launch", *TPU, f"--setup={setup}", "--data-dir=/mnt/da ta", *RECIPE
    )
    assert done.returncode == 0, done.stderr
    assert desk.steps() == [
        *["create", "describe", "describe", "describe"],
        *["scp", "ssh", "ssh", "ssh"],  # the checkout, setup, install, start
        *["describe", "ssh", "describe", "ssh", "delete"],
    ]
    gcloud = [call for call in desk.calls() if call[0] == "gcloud"]
    for call in gcloud:
        assert call[1:4] == ["compute", "tpus", "queued-resources"]
        assert value(call, "zone") == "us-west4-a" and "--quiet" in call
    assert gcloud[0][5:] == [
        *["l16", "--zone=us-west4-a", "--quiet", "--accelerator-type=v5litepod-256"],
        *["--runtime-version=v2-alpha-tpuv5-lite", "--node-id=l16"],
    ]
    archive, target = gcloud[4][5:7]
    assert target == "l16:vit_jax.tar.gz"
    with tarfile.open(archive) as file:
        assert "experiments/launch/common.sh" in file.getnames()
    for call in gcloud[4:8]:
        assert "--node=all" in call and "--worker=all" in call
    assert value(gcloud[5], "command") == setup
    assert "--editable '.[tpu]'" in value(gcloud[6], "command")
    assert "--force" in gcloud[-1]


def test_what_a_tpu_vm_runs(desk):
    """The command of `start`, run by a shell as the VM's would run it."""
    done = desk.run(
        "tpu_vm.sh", "start", *TPU, "--max-restarts=3", "--data-dir=/mnt/da ta", *RECIPE
    )
    assert done.returncode == 0, done.stderr
    command = value(desk.calls()[-1], "command")
    (desk.path / "calls").unlink()
    desk.stand_in("sudo")
    environment = {"PATH": f"{desk.bin}:/usr/bin:/bin", "HOME": "/home/me", "USER": "me"}
    subprocess.run(["bash", "-c", command], check=True, env=environment)
    stop, reset, start = desk.calls()
    assert stop[1:3] == ["systemctl", "stop"] and reset[1:3] == ["systemctl", "reset-failed"]
    assert start[1] == "systemd-run"
    assert "RestartForceExitStatus=75" in start and "StartLimitBurst=4" in start
    assert start[start.index("--uid=me") :] == [
        *["--uid=me", "--working-directory=/home/me/vit_jax", "/usr/bin/env"],
        f"PATH=/home/me/vit_jax/.venv/bin:{environment['PATH']}",
        *["env", "TFDS_DATA_DIR=/mnt/da ta", "python", "-m", "vit_jax.pretrain", *RECIPE[1:]],
        *["--workdir=/mnt/my runs/l16", "--distributed"],
    ]


def test_a_preempted_slice_is_created_again(desk):
    desk.answers(
        "gcloud",
        "describe|0|ACTIVE",
        "describe|0|SUSPENDING",
        "describe|0|SUSPENDED",
        *["describe|0|ACTIVE"] * 4,
        "systemctl show|255|",  # a VM that no longer answers
        "systemctl show|0|dead",  # rebooted
        "systemctl show|0|exited",
    )
    done = desk.run("tpu_vm.sh", "watch", *TPU, "--num-slices=2", "--capacity=spot", *RECIPE)
    assert done.returncode == 0, done.stderr
    steps = [step for step in desk.steps() if step != "describe"]
    again = ["delete", "create", "scp", "ssh", "ssh"]
    assert steps == ["ssh", *again, "ssh", *again[2:], "ssh", "delete"]
    create = next(call for call in desk.calls() if "create" in call)
    assert create[-3:] == ["--node-count=2", "--node-prefix=l16", "--spot"]
    assert "restart 2 of 20" in done.stderr


def test_fewer_slices_will_do(desk):
    """After an hour in the queue; a preempted run asks for all of them again."""
    fewer = ["--num-slices=4", "--min-slices=1", "--accelerator-type=v5p-64", "--poll=1800"]
    desk.answers(
        "gcloud",
        *["describe|0|WAITING_FOR_RESOURCES"] * 6,
        *["describe|0|ACTIVE"] * 2,
        "describe|0|SUSPENDED",
        *["describe|0|ACTIVE"] * 2,
        "systemctl show|0|running",
        "systemctl show|0|exited",
    )
    done = desk.run("tpu_vm.sh", "launch", *TPU, *fewer, *RECIPE)
    assert done.returncode == 0, done.stderr
    creates = [call for call in desk.calls() if "create" in call]
    asked = [["--node-count=4", "--node-prefix=l16"], ["--node-count=2", "--node-prefix=l16"]]
    assert [call[-2:] for call in creates[:2]] == asked and creates[2][-1] == "--node-id=l16"
    assert creates[3][-2:] == asked[0] and len(creates) == 4
    assert desk.steps().count("delete") == 4
    assert "l16: 1 of 4 slices, after 60 minutes" in done.stderr
    (start, *_) = (call for call in desk.calls() if "pretrain" in " ".join(call))
    assert "--config.mesh.devices=128" in value(start, "command")


@pytest.mark.parametrize(("given", "used"), [("4", 4), ("3", 2), ("2", 2), ("1", 1), ("9", 4)])
def test_fewer_nodes_will_do(desk, given, used):
    flags = ["--nodes=4", "--gpus-per-node=8", "--python=python", "--min-nodes=1"]
    flags += ["--process-per=node", "--workdir=gs://b/runs", *RECIPE]
    assert desk.run("slurm.sbatch", *flags).returncode == 0
    assert value(desk.calls()[0], "nodes") == "1-4"
    done = subprocess.run(
        [desk.checkout / "experiments/launch/slurm.sbatch", *flags],
        cwd=desk.checkout,
        env={
            **os.environ,
            "PATH": f"{desk.bin}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "9",
            "SLURM_JOB_NUM_NODES": given,
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    srun = desk.calls()[1]
    assert value(srun, "nodes") == value(srun, "ntasks") == str(used)
    assert "--config.mesh.devices=32" in srun
    assert (f"{used} of 4 nodes, since {given}" in done.stderr) == (used < 4)


def test_restarts_end(desk):
    desk.answers("gcloud", *["describe|0|ACTIVE", "systemctl show|0|dead"] * 3)
    done = desk.run("tpu_vm.sh", "watch", *TPU, "--max-restarts=2", *RECIPE)
    failed(done, "dead after 2 restarts")
    assert "delete" not in desk.steps()


@pytest.mark.parametrize(
    ("answers", "steps", "code"),
    [
        (["create|3|"], ["create"], 3),
        (["describe|1|"] * 3, ["create", *["describe"] * 3], 1),
        (["describe|0|FAILED"], ["create", "describe"], 2),
        (["describe|0|ACTIVE", "scp|4|"], ["create", "describe", "scp"], 4),
        (["describe|0|ACTIVE", "editable|5|"], ["create", "describe", "scp", "ssh"], 5),
        (["describe|0|ACTIVE", "pretrain|6|"], ["create", "describe", "scp", "ssh", "ssh"], 6),
    ],
)
def test_nothing_goes_on_after_a_failure(desk, answers, steps, code):
    desk.answers("gcloud", *answers)
    done = desk.run("tpu_vm.sh", "launch", *TPU, *RECIPE)
    failed(done, code=code)
    assert desk.steps() == steps
    if code > 2:
        assert (
            f"exit code {code} from: gcloud compute tpus queued-resources {steps[-1]}"
            in done.stderr
        )


def test_a_failed_run_keeps_its_vms(desk):
    desk.answers("gcloud", *["describe|0|ACTIVE"] * 2, "systemctl show|0|failed")
    failed(desk.run("tpu_vm.sh", "launch", *TPU, *RECIPE), "the run failed", "cost money")
    assert "delete" not in desk.steps()


def test_gke(desk):
    done = desk.run("gke_xpk.sh", "launch", *GKE, "--storage=data,runs", "--num-slices=2", *RECIPE)
    assert done.returncode == 0, done.stderr
    (call,) = desk.calls()
    assert call[:3] == ["xpk", "workload", "create"]
    assert [value(call, f) for f in ("cluster", "zone", "workload")] == ["pod", "us-west4-a", "l16"]
    assert value(call, "tpu-type") == "v5litepod-256" and value(call, "num-slices") == "2"
    assert "--storage=data" in call and "--storage=runs" in call
    assert value(call, "restart-on-exit-codes") == "75" and value(call, "max-restarts") == "20"
    words = shlex.split(value(call, "command"))
    assert words == [
        *["pip", "install", "--quiet", ".[tpu]", "&&", "exec", "python", "-m", "vit_jax.pretrain"],
        *[*RECIPE[1:], "--workdir=/mnt/runs/l16", "--distributed"],
    ]
    assert (
        len(git(desk.checkout, "worktree", "list").splitlines()) == 1
    )  # the image's checkout is gone

    assert desk.run("gke_xpk.sh", "logs", *GKE).returncode == 0
    assert desk.run("gke_xpk.sh", "delete", *GKE).returncode == 0
    assert desk.calls()[1][:3] == ["kubectl", "logs", "--follow"]
    assert desk.calls()[2][:3] == ["xpk", "workload", "delete"]


def test_a_gke_failure_is_reported(desk):
    desk.answers("xpk", "create|7|")
    failed(desk.run("gke_xpk.sh", "launch", *GKE, *RECIPE), "exit code 7 from: xpk", code=7)
    assert len(git(desk.checkout, "worktree", "list").splitlines()) == 1


def test_gke_gives_the_sigterm_to_python(desk):
    """xpk signals the shell it starts; with `exec` that shell has become Python."""
    assert desk.run("gke_xpk.sh", "launch", *GKE, *RECIPE).returncode == 0
    command = value(desk.calls()[0], "command")
    (desk.bin / "pip").write_text("#!/bin/sh\n")
    trap = "import signal, sys; signal.signal(15, lambda *_: sys.exit(75))"
    code = f"{trap}; print('ready', flush=True); signal.pause()"
    (desk.bin / "python").write_text(f'#!/bin/sh\nexec {sys.executable} -c "{code}"\n')
    for name in ("pip", "python"):
        (desk.bin / name).chmod(0o755)
    # The lines of xpk's container that matter here.
    script = f"trap 'kill -SIGTERM $!' SIGTERM\n({command}) & wait $!; wait $!; exit $?"
    environment = {"PATH": f"{desk.bin}:/usr/bin:/bin"}
    with subprocess.Popen(
        ["bash", "-c", script], env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "ready\n"
        process.terminate()
        assert process.wait(timeout=30) == 75


@pytest.mark.parametrize(("per", "tasks"), [("gpu", 4), ("node", 1)])
def test_slurm(desk, tmp_path, per, tasks):
    flags = [*SLURM, f"--workdir={tmp_path}/my runs", f"--process-per={per}", *RECIPE]
    done = desk.run("slurm.sbatch", *flags)
    assert done.returncode == 0, done.stderr
    (call,) = desk.calls()
    assert call[0] == "sbatch" and (tmp_path / "my runs").is_dir()
    assert value(call, "nodes") == "2" and value(call, "ntasks-per-node") == str(tasks)
    assert value(call, "signal") == "TERM@300" and "--requeue" in call
    assert value(call, "chdir") == str(desk.checkout)
    script = call.index("experiments/launch/slurm.sbatch")
    assert call[script + 1 :] == flags

    # The same arguments in the job, where SLURM runs a copy of the script from the checkout.
    copy = tmp_path / "spool" / "slurm_script"
    copy.parent.mkdir()
    shutil.copy(desk.checkout / "experiments/launch/slurm.sbatch", copy)
    desk.answers("srun", "|75|")
    environment = {**os.environ, "PATH": f"{desk.bin}:{os.environ['PATH']}", "SLURM_JOB_ID": "9"}
    done = subprocess.run(
        [copy, *call[script + 1 :]], cwd=desk.checkout, env=environment, check=False
    )
    assert done.returncode == 75
    srun, requeue = desk.calls()[1:]
    assert requeue == ["scontrol", "requeue", "9"]
    assert value(srun, "ntasks") == str(2 * tasks)
    # One process a GPU is jax's default on SLURM; any other needs its devices named.
    devices = ["env", "JAX_LOCAL_DEVICE_IDS=0,1,2,3"] if per == "node" else []
    assert srun[srun.index("--kill-on-bad-exit=0") + 1 :] == [
        *[*devices, "python", "-m", "vit_jax.pretrain", *RECIPE[1:]],
        *[f"--workdir={tmp_path}/my runs", "--distributed"],
    ]


@pytest.mark.parametrize(
    ("answer", "restarts", "code", "calls"),
    [
        ("|75|", "20", 2, ["srun"]),
        ("|137|", "20", 2, ["srun"]),
        ("|137|", "19", 137, ["srun", "scontrol"]),  # a process was killed
        ("|1|", "0", 1, ["srun"]),
        ("|0|", "0", 0, ["srun"]),
    ],
)
def test_slurm_requeues_the_preempted_and_the_killed(desk, answer, restarts, code, calls):
    desk.answers("srun", answer)
    job = {"SLURM_JOB_ID": "9", "SLURM_RESTART_COUNT": restarts}
    script = desk.checkout / "experiments/launch/slurm.sbatch"
    done = subprocess.run(
        [script, *SLURM, "--workdir=/runs", *RECIPE],
        cwd=desk.checkout,
        env={**os.environ, "PATH": f"{desk.bin}:{os.environ['PATH']}", **job},
        capture_output=True,
        check=False,
    )
    assert done.returncode == code
    assert [call[0] for call in desk.calls()] == calls


LAUNCHERS = {
    "tpu_vm.sh": ["launch", *TPU],
    "gke_xpk.sh": ["launch", *GKE],
    "slurm.sbatch": [*SLURM, "--workdir=/runs/l16"],
}


@pytest.mark.parametrize("script", LAUNCHERS)
def test_dry_run(desk, script):
    """Every line it prints is a command, exactly as it would run it."""
    arguments = [*LAUNCHERS[script], "--dry-run", *RECIPE]
    done = desk.run(script, *arguments)
    assert done.returncode == 0, done.stderr
    assert desk.calls() == []
    commands = [shlex.split(line) for line in done.stdout.splitlines()]
    desk.answers("gcloud", *["describe|0|ACTIVE"] * 2, "systemctl show|0|exited")
    arguments.remove("--dry-run")
    if script == "slurm.sbatch":
        mkdir, sbatch, srun = commands
        assert mkdir == ["mkdir", "-p", "/runs/l16"] and srun[0] == "srun"
        assert sbatch[0] == "sbatch" and sbatch[-len(arguments) :] == arguments
        return
    assert desk.run(script, *arguments).returncode == 0
    assert [c for c in commands if c[0] != "git"] == desk.calls()


@pytest.mark.parametrize("script", LAUNCHERS)
def test_the_transcript_shown_is_what_a_dry_run_prints(desk, script):
    shown = (LAUNCH / "transcripts" / f"{script}.txt").read_text()
    command, expected = shown.split("\n", 1)
    done = desk.run(*shlex.split(command.removeprefix("$ experiments/launch/")))
    assert done.returncode == 0, done.stderr
    printed = done.stdout.replace(git(desk.checkout, "rev-parse", "HEAD"), "COMMIT")
    assert printed.replace(f"{desk.checkout}", "CHECKOUT") == expected


@pytest.mark.parametrize("script", LAUNCHERS)
def test_help(desk, script):
    done = desk.run(script, "--help")
    assert done.returncode == 0 and "--workdir" in done.stdout and "--dry-run" in done.stdout
    assert "#" not in done.stdout


MISTAKES = {
    "recipe missing": (["--"], "no recipe: end with -- --config="),
    "recipe misspelt": (
        ["--", "--config=configs/pretrain/papr.py"],
        "no recipe configs/pretrain/p",
    ),
    "unknown flag": (["--colour=red", *RECIPE], "unknown flag --colour=red: expected --"),
    "flag without a value": (["--workdir", *RECIPE], "write --flag=value"),
    "relative workdir": (
        ["--workdir=runs", *RECIPE],
        "--workdir=runs: expected gs://BUCKET/PATH, or an absolute path",
    ),
    "other bucket": (
        ["--workdir=az://b/runs", *RECIPE],
        "expected gs://BUCKET/PATH, or an absolute",
    ),
    "data in a bucket": (
        ["--data-dir=gs://b/data", *RECIPE],
        "--data-dir=gs://b/data: expected a folder that every machine mounts",
    ),
    "workdir twice": ([*RECIPE, "--workdir=/x"], "--workdir=/x after --"),
    "not a number": (["--max-restarts=many", *RECIPE], "--max-restarts=many: expected a number"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("script", LAUNCHERS)
def test_mistakes_are_found_before_anything_runs(desk, script, mistake):
    arguments, message = MISTAKES[mistake]
    failed(desk.run(script, *LAUNCHERS[script], *arguments), message, script)
    assert desk.calls() == []


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("tpu_vm.sh", ["fly", *TPU, *RECIPE], "unknown action fly"),
        ("gke_xpk.sh", ["fly", *GKE, *RECIPE], "unknown action fly"),
        ("tpu_vm.sh", ["launch", *TPU[1:], *RECIPE], "--name is missing"),
        ("gke_xpk.sh", ["launch", *GKE[1:], *RECIPE], "--cluster is missing"),
        ("slurm.sbatch", [*SLURM, *RECIPE], "--workdir is missing"),
        ("tpu_vm.sh", ["create", *TPU, "--capacity=free"], "expected on-demand, spot or reserved"),
        (
            "slurm.sbatch",
            [*SLURM, "--workdir=/r", "--process-per=x", *RECIPE],
            "expected gpu or node",
        ),
        ("tpu_vm.sh", ["launch", *TPU, "--revision=v9", *RECIPE], "--revision=v9: no commit"),
        (
            "tpu_vm.sh",
            ["launch", *TPU, "--num-slices=4", "--min-slices=3", *RECIPE],
            "--min-slices=3: expected a divisor of 4",
        ),
        ("tpu_vm.sh", ["launch", *TPU, "--min-slices=2", *RECIPE], "expected a divisor of 1"),
        (
            "slurm.sbatch",
            [*SLURM, "--workdir=/r", "--min-nodes=0", *RECIPE],
            "--min-nodes=0: expected a number, 1 or more",
        ),
        (
            "slurm.sbatch",
            [*SLURM, "--workdir=/r", "--min-nodes=4", *RECIPE],
            "--min-nodes=4: expected a divisor of 2",
        ),
    ],
)
def test_mistakes_of_one_launcher(desk, script, arguments, message):
    failed(desk.run(script, *arguments), message)
    assert desk.calls() == []


def test_only_what_is_committed_is_launched(desk):
    recipe = desk.checkout / "configs/pretrain/mine.py"
    recipe.write_text("")
    mine = ["--", "--config=configs/pretrain/mine.py"]
    failed(desk.run("tpu_vm.sh", "launch", *TPU, *mine), "is not in git's HEAD: commit it")
    commit(desk.checkout)
    recipe.write_text("changed = True")
    done = desk.run("tpu_vm.sh", "launch", "--dry-run", *TPU, *mine)
    assert done.returncode == 0 and "uncommitted changes stay here" in done.stderr
    commit(desk.checkout)
    assert "uncommitted" not in desk.run("tpu_vm.sh", "launch", "--dry-run", *TPU, *mine).stderr


def test_a_missing_program_is_named(desk, tmp_path):
    for name in ("gcloud", "xpk", "sbatch"):
        (desk.bin / name).unlink()
    for name in ("bash", "git", "dirname", "mkdir", "seq"):
        (desk.bin / name).symlink_to(shutil.which(name))
    workdir = f"--workdir={tmp_path}/runs"
    for script, arguments in {**LAUNCHERS, "slurm.sbatch": [*SLURM, workdir]}.items():
        done = desk.run(script, *arguments, *RECIPE, PATH=str(desk.bin))
        failed(done, "is not installed here")


@pytest.mark.skipif(not SHELLCHECK, reason="shellcheck is not installed")
@pytest.mark.parametrize("script", LAUNCHERS)
def test_shellcheck(script):
    subprocess.run([SHELLCHECK, "--external-sources", LAUNCH / script], check=True, cwd=ROOT)


@pytest.mark.parametrize("script", ["tpu_vm.sh", "gke_xpk.sh", "slurm.sbatch"])
def test_a_workdir_in_a_bucket(desk, script):
    """Machines get what reads and writes one; no folder is made for it."""
    flags = [flag for flag in LAUNCHERS[script] if not flag.startswith("--workdir")]
    done = desk.run(script, *flags, "--dry-run", "--workdir=gs://b/runs", *RECIPE)
    assert done.returncode == 0, done.stderr
    assert "--workdir=gs://b/runs" in done.stdout
    assert "mkdir -p" not in done.stdout and "--output=gs" not in done.stdout
    assert (".[tpu,gcs]" in done.stdout) == (script != "slurm.sbatch")


def page_commands():
    """Returns the launchers' commands on the page, one per line."""
    blocks = (LAUNCH / "README.md").read_text().split("```")[1::2]
    lines = "\n".join(block.removeprefix("sh") for block in blocks).replace("\\\n", " ")
    return [line for line in lines.splitlines() if line.startswith("experiments/launch/")]


def test_the_pages_commands_run(desk):
    scripts = set()
    for line in page_commands():
        command, *rest = line.split("  #")[0].split(" -- ")
        script = Path(command.split()[0]).name
        if script.endswith(".py"):
            continue
        scripts.add(script)
        shown = " -- ".join([f"{command} --dry-run", *rest])
        environment = {
            **os.environ,
            "SETUP": "mount it",
            "ZONE": "us-west4-a",
            "BUCKET": "my-bucket",
        }
        done = subprocess.run(
            ["bash", "-c", shown],
            cwd=desk.checkout,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout
    assert scripts == set(LAUNCHERS)


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("tpu_vm.sh", ["--max-restarts=08", "--num-slices=010", "--poll=00"]),
        ("gke_xpk.sh", ["--max-restarts=08", "--num-slices=010"]),
        ("slurm.sbatch", ["--max-restarts=08", "--nodes=010", "--gpus-per-node=09"]),
    ],
)
def test_numbers_are_decimal(desk, script, flags):
    """Zeros in front, which bash takes for octal; none where one at least is needed."""
    done = desk.run(script, *LAUNCHERS[script], "--dry-run", *flags, *RECIPE)
    assert done.returncode == 0, done.stderr
    commands = done.stdout
    assert any(text in commands for text in ("StartLimitBurst=9", "max-restarts=8", "--ntasks=90"))
    assert any(text in commands for text in ("--node-count=10", "num-slices=10", "--nodes=10"))
    for flag in flags:
        name = flag.partition("=")[0]
        least = ("max-restarts", "poll")
        for wrong in ["-1", "1e3", "9" * 12] + ["00"] * (name.strip("-") not in least):
            done = desk.run(script, *LAUNCHERS[script], f"{name}={wrong}", *RECIPE)
            failed(done, f"{name}={wrong.replace('00', '0')}: expected a number")
    assert desk.calls() == []


@pytest.mark.slow  # it imports jax
def test_a_recipe_that_cannot_be_trained_is_not_launched():
    """For the devices that are asked for, with the Python that is there."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = [LAUNCH / "gke_xpk.sh", "launch", "--dry-run", *GKE, "--", CONFIG]
    for wrong, message in (
        ("--config.mesh.fsdp=3", "fsdp=3 x tensor=1 does not fit 256 devices"),
        ("--config.model.depht=3", "unknown field of config.model 'depht'"),
        ("", ""),
    ):
        done = subprocess.run(
            [*command, wrong][: None if wrong else -1],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert (message in done.stderr) and (done.returncode == 2) == bool(wrong), done.stderr


@pytest.mark.parametrize("kind", ["cuda", "tpu"])
def test_dockerfiles(kind):
    """Known instructions, the versions of setup.py, paths that are there and are all it needs."""
    file = LAUNCH / f"Dockerfile.{kind}"
    text, setup = file.read_text(), (ROOT / "setup.py").read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    steps = [line.partition(" ")[::2] for line in lines]
    order = ["FROM", "WORKDIR", "RUN", *["COPY"] * 4, "RUN", "ENV", "ENTRYPOINT", "CMD"]
    assert [name for name, _ in steps] == order

    image = re.fullmatch(r"python:3\.(\d+)-slim-\w+", steps[0][1])  # neither latest nor unnamed
    low, high = re.search(r'python_requires=">=3\.(\d+),<3\.(\d+)"', setup).groups()
    assert int(low) <= int(image[1]) < int(high)
    jax = re.search('JAX = "(.*)"', setup)[1]
    extra = re.search(rf'"{kind}": \[f"(jax\[\w+\]){{JAX}}"\]', setup)[1]
    runs = [shlex.split(what) for name, what in steps if name == "RUN"]
    assert [run[:3] for run in runs] == [["pip", "install", "--no-cache-dir"]] * 2
    assert [run[3] for run in runs] == [f"{extra}{jax}", f".[{kind}]"]

    copied = [what.split()[:-1] for name, what in steps if name == "COPY"]
    sources = [source for row in copied for source in row]
    assert all((ROOT / source).exists() for source in sources)
    read = {"setup.py", "pyproject.toml", *re.findall(r'Path\("([\w.]+)"\)', setup)}
    assert read | {"vit_jax", "configs", "experiments"} <= {*sources}
    (entry,) = (json.loads(what) for name, what in steps if name == "ENTRYPOINT")
    (default,) = (json.loads(what) for name, what in steps if name == "CMD")
    assert entry == ["vit_jax"] and f'"{entry[0]} = ' in setup and {*default} <= {*VERBS}
    assert f"docker build -f {file.relative_to(ROOT)} " in text
