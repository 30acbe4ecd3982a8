"""The newcomer's command, with few steps."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.long
def test_quickstart(tmp_path):
    command = [sys.executable, "-m", "experiments.quickstart", f"--workdir={tmp_path}"]
    done = subprocess.run(
        [*command, "--steps=8", "--transfer_steps=10"],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "strokes"
    with (folder / "table.csv").open() as file:
        table = list(csv.DictReader(file))
    assert len(table) == 5
    for row in table:
        assert row["accuracy on 599 held-out digits"] in done.stdout
        assert 0 <= float(row["pretrained"]) <= 100 and 0 <= float(row["random weights"]) <= 100
    # 1, 5, 10 and 25 shots of raw pixels, in closed form and so always the same. But computed in
    # float32, in which the class of one digit at 25 shots depends on the processor.
    *raw, last, none = [row["raw pixels"] for row in table]
    assert raw == ["52.9", "81.4", "87.2"] and last in ("90.2", "90.3") and not none
    for name in ("pretraining", "transfer", "fewshot"):
        assert f"{folder / name}.png" in done.stdout
        assert (folder / f"{name}.png").stat().st_size > 10_000
