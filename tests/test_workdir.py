"""The folder of a run."""

import pytest

from vit_jax.training.workdir import open_workdir


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "say where to keep this run with --workdir=FOLDER"),
        ("az://bucket/run", "az://bucket/run: expected a folder, gs://BUCKET/PATH or s3://BUCKET"),
    ],
)
def test_what_is_no_folder_is_told_what_to_do(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        open_workdir(name, {})
    assert not list(tmp_path.iterdir())
