"""Runs the real command on a disk that fills up, and on one that becomes read-only: file systems
in a mount namespace of this test."""

import re
import subprocess
import sys

import pytest
from processes import ROOT, command, equal_runs, pretrain

STEPS = 60
SCRIPT = """
set -e
mkdir -p {workdir}
mount -t tmpfs -o size={size} none {workdir}
echo "== full"
set +e
{command}
echo "== code $?"
set -e
mount -o remount,size=1g {workdir}
echo "== read-only"
{command} &
while [ ! -d {workdir}/checkpoints ] || [ "$(wc -l < {workdir}/metrics.jsonl)" -lt {lines} ]; do
  sleep 0.01
done
mount --bind {workdir}/checkpoints {workdir}/checkpoints
mount -o remount,bind,ro {workdir}/checkpoints
set +e
wait $!
echo "== code $?"
set -e
umount {workdir}/checkpoints
echo "== mended"
{command}
echo "== code $?"
cp -r {workdir} {copy}
"""


def namespaces():
    """Whether this system allows mounting file systems in a namespace."""
    try:
        tried = ["unshare", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"]
        return subprocess.run(tried, check=False, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


@pytest.mark.slow  # four starts of the command
@pytest.mark.skipif(not namespaces(), reason="needs user namespaces")
def test_full_and_read_only_disks(tmp_path):
    code, _, err = command(*pretrain(tmp_path / "whole", STEPS))
    assert code == 0, err
    saved = tmp_path / "whole" / "checkpoints" / str(STEPS)
    size = sum(file.stat().st_size for file in saved.rglob("*"))
    module, *arguments = pretrain(tmp_path / "run", STEPS)
    script = SCRIPT.format(
        workdir=tmp_path / "run",
        copy=tmp_path / "copy",
        size=size * 3 // 2,  # room for one checkpoint
        lines=30,
        command=" ".join([sys.executable, "-m", f"vit_jax.{module}", *arguments]),
    )
    done = subprocess.run(
        ["unshare", "--map-root-user", "--mount", "bash", "-c", script],
        check=False,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout
    full, read_only, mended = re.split("== (?:read-only|mended)\n", done.stdout)
    assert "No space left" in full and "== code 1" in full
    assert "Read-only file system" in read_only and "== code 1" in read_only
    assert "== code 0" in mended
    for before, after in ((full, read_only), (read_only, mended)):
        if reported := re.findall(r"step (\d+) is saved", before):
            assert f"from step {reported[-1]} of {STEPS}" in after
    equal_runs(tmp_path / "copy", tmp_path / "whole")
