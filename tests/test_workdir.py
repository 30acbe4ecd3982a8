"""The workdir of a run, and the file of a result."""

import subprocess
import sys
from pathlib import Path

import pytest

from vit_jax.parallel.run_files import locked_output
from vit_jax.training.workdir import open_workdir


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "say where to keep this run with --workdir=FOLDER"),
        ("s3://bucket/run", "s3://bucket/run: .*(orbax doesn't support s3://: mount|s3fs)"),
        ("az://bucket/run", "az://bucket/run: expected a folder, gs://BUCKET/PATH or s3://BUCKET"),
    ],
)
def test_what_is_no_folder_is_told_what_to_do(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        open_workdir(name, {})
    assert not list(tmp_path.iterdir())


def test_two_processes_do_not_write_one_result(tmp_path):
    """The second names the first at once; a kill, or an error, leaves what was there."""
    result, link = tmp_path / "result.json", tmp_path / "link"
    link.symlink_to(result)
    result.write_text("before")
    code = (
        "import pathlib, sys, time; from vit_jax.parallel.run_files import locked_output\n"
        "with locked_output(pathlib.Path(sys.argv[1])): print(flush=True); time.sleep(600)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, result], stdout=subprocess.PIPE)
    holder.stdout.readline()
    named = rf"another process writes .* \(process {holder.pid} on "
    with pytest.raises(OSError, match=named), locked_output(link):
        raise AssertionError
    holder.kill()
    holder.wait()
    with pytest.raises(ZeroDivisionError), locked_output(result):
        raise ZeroDivisionError
    assert result.read_text() == "before"
    with locked_output(link) as write:
        assert result.read_text() == "before"
        write("after")
    assert result.read_text() == "after" and link.is_symlink()
    assert sorted(tmp_path.iterdir()) == [link, result]


@pytest.mark.parametrize("name", ["", "missing/result.json"])
def test_an_output_that_cannot_be_written_is_told_at_once(tmp_path, name):
    with pytest.raises(OSError, match=r"is a folder|No such file"), locked_output(tmp_path / name):
        raise AssertionError
    with locked_output(Path("/dev/null")) as write:
        write("nothing")
