"""Starts two commands in one workdir at once: one of them runs, the other says why it doesn't."""

import json
import shutil
import time
from collections import Counter
from pathlib import Path

import numpy as np

from experiments.campaigns.kills import PRETRAIN, TRANSFER, records, start_command


def campaign(count: int, seed: int, folder: Path) -> dict[str, int]:
    """Counts outcomes of pairs with different seeds, started up to two seconds apart."""
    rng, outcomes = np.random.default_rng(seed), Counter()
    for number in range(count):
        command = (PRETRAIN, TRANSFER)[number % 2]
        workdir = folder / str(number)
        shutil.rmtree(workdir, ignore_errors=True)
        outcome, errors = _pair(command, workdir, float(rng.uniform(0, 2)))
        outcomes[outcome] += 1
        print(json.dumps({"command": command[0], "outcome": outcome, "errors": errors}), flush=True)
    return dict(outcomes)


def _pair(command: tuple[str, ...], workdir: Path, apart: float) -> tuple[str, list[str]]:
    processes = []
    for seed in (1, 2):
        processes.append(start_command([*command, f"--workdir={workdir}", f"--config.seed={seed}"]))
        time.sleep(apart)
    outputs = [process.communicate()[0] for process in processes]
    codes = [process.returncode for process in processes]
    errors = [
        text.strip().splitlines()[-1] for code, text in zip(codes, outputs, strict=True) if code
    ]
    if sorted(map(bool, codes)) != [False, True]:
        return f"WRONG: exit codes {codes}", errors
    if "error: " not in errors[0] or str(workdir) not in errors[0]:
        return "WRONG: no explanation", errors
    seed = json.loads((workdir / "config.json").read_text())["seed"]
    if seed != codes.index(0) + 1:
        return "WRONG: the config of the other", errors
    steps = [r["step"] for r in records(workdir) if "loss" in r]
    whole = steps == sorted(set(steps)) and steps
    return ("one runs, one refuses" if whole else "WRONG: records"), errors
