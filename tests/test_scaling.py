"""The study's grid, claims and runner, with a fake training loop; one real run."""

import dataclasses
import itertools
import json
import os
import runpy
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from experiments.scaling import runner
from experiments.scaling.__main__ import main, show
from experiments.scaling.cost import estimate, total
from experiments.scaling.runner import Store, statuses, work
from experiments.scaling.study import (
    Budget,
    Choice,
    Grid,
    Model,
    PretrainingSet,
    Run,
    Study,
    Task,
    expand,
    load_study,
    merge,
)
from experiments.scaling.table import write_csv
from vit_jax.config import build
from vit_jax.costs.flops import training_flops
from vit_jax.costs.topology import parse_topology
from vit_jax.models.variants import ModelConfig, build_model
from vit_jax.parallel.claims import Claims

ROOT = Path(__file__).parent.parent
RECIPE = {
    "image_size": 16,
    "batch_size": 8,
    "data": {"dataset": "strokes/10", "num_threads": 1},
    "model": {"dtype": "float32"},
    "schedule": {"peak": 1e-3, "warmup": 1, "decay": "constant"},
    "checkpoint": {"every": 2},
}
VIT = Model("ViT", "ViT", {"model.variant": "ViT-mu/8", "model.mlp_dim": 16})
RESNET = Model("R", "ResNet", {"model.variant": "R26x1", "model.stages": [1]})
SETS = tuple(PretrainingSet(f"{n}", n, {"data.split": f"train[:{n}]"}) for n in (8, 16))
TUNING = {
    **RECIPE,
    "data": {"dataset": "digits", "split": "train[:50]"},
    "steps": 2,
    "schedule": {"peak": 1e-3, "warmup": 1, "decay": "cosine"},
    "classification": {"test": {"data": {"dataset": "digits", "split": "test[:16]"},
                                "batch_size": 8}},
}  # fmt: skip
GRID = Grid(RECIPE, (VIT, RESNET), SETS, (Budget(4),), tasks=(Task("digits", TUNING),))
STUDY = Study("tiny", (GRID,))


def store(folder, **kwargs):
    return Store(Path(folder), **kwargs)


def fake(log=None, fails=()):
    """A training loop that only writes a checkpoint."""

    def train(run, config, workdir):
        if log is not None:
            log.append(run.key)
        (workdir / "checkpoints" / str(config["steps"])).mkdir(parents=True)
        if any(word in run.key for word in fails):
            raise FloatingPointError("not finite after step 3")
        evaluations = [{"step": config["steps"], "test/accuracy": 0.5}]
        return {"steps": config["steps"], "evaluations": evaluations}

    return train


def states(study, where):
    return {s.run.key: s.state for s in statuses(study, where)}


def quiet(text):
    pass


def test_names_are_stable_and_say_what_defines_a_run():
    runs = expand(STUDY)
    assert len(runs) == 8 == len({run.name for run in runs})
    assert runs[0].name == "ViT_8_4_steps_seed_0-" + runs[0].hash
    # Golden: the name of a run must never change once its study has begun.
    assert runs[0].hash == "b87f36eeb1"
    config = runs[0].config
    for field, same in (("mesh.fsdp", True), ("data.data_dir", True), ("optimizer.b2", False)):
        other = Run("pretrain", runs[0].labels, merge(config, {field: 1}))
        assert (other.name == runs[0].name) == same, field


def test_a_trunk_serves_all_budgets_and_is_no_part_of_a_name():
    budgets = (Budget(20), Budget(10), Budget(40))
    grid = Grid(RECIPE, (VIT,), SETS[:1], budgets, cooldown=0.2)
    runs = {run.key: run for run in expand(Study("s", (grid,)))}
    branch = runs["ViT | 8 | 20 steps | seed 0"]
    trunk = runs["ViT | 8 | 16 steps | seed 0 | trunk"]
    assert branch.trunk == trunk.name and branch.trunk_steps == trunk.config["steps"] == 16
    assert trunk.trunk == runs["ViT | 8 | 8 steps | seed 0 | trunk"].name
    assert branch.config["schedule"]["cooldown"] == 4
    alone = expand(Study("s", (dataclasses.replace(grid, budgets=budgets[:1]),)))
    assert [run.name for run in alone] == [branch.name] and alone[0].trunk is None
    with pytest.raises(ValueError, match="7 epochs: branches need budgets in steps"):
        expand(Study("s", (dataclasses.replace(grid, budgets=(Budget(epochs=7),)),)))


def test_without_pretraining_tasks_start_from_random_weights():
    grid = dataclasses.replace(GRID, models=(VIT,), sets=(PretrainingSet("nothing", 0, {}),))
    (run,) = expand(Study("s", (grid,)))
    assert run.key == "ViT | nothing | seed 0 | digits" and run.init is None
    assert "init" not in run.config and run.config["model"]["mlp_dim"] == 16


def test_what_others_write_at_the_same_time_is_collected_and_read(tmp_path, monkeypatch):
    where, run = store(tmp_path), expand(STUDY)[0]
    work(STUDY, where, fake(), only=run.name, say=quiet)
    read = where.records

    def late():  # another process records a run between the reading and the writing
        monkeypatch.setattr(where, "records", read)
        found = read()
        work(STUDY, store(tmp_path), fake(), only=expand(STUDY)[1].name, say=quiet)
        return found

    monkeypatch.setattr(where, "records", late)
    assert len(where.collect()) == len(runner.read_results(where.results)) == 2
    metrics = where.workdir(run.name) / "metrics.jsonl"
    for text, step in (('{"st', 0), ('{"step": 3}\n{"step": 4', 3)):
        metrics.write_text(text)
        assert runner._progress(where, run) == f"at step {step}"


def test_a_claim_outlives_the_retry_of_what_failed(tmp_path):
    where = store(tmp_path)
    run = expand(STUDY)[0]
    work(STUDY, where, fake(fails=[run.key]), only=run.name, say=quiet)
    with where.claims.take(run.name):
        assert where.forget_failed() == [] and where.claims.is_held(run.name)
    assert where.forget_failed() == [run.name]
    assert states(STUDY, where)[run.key] == "interrupted" and where.claims.deaths(run.name) == 0


def test_grids_that_overlap_share_runs_and_must_agree():
    assert len(expand(Study("s", (GRID, GRID)))) == 8
    other = dataclasses.replace(GRID, recipe=merge(RECIPE, {"batch_size": 16}))
    with pytest.raises(ValueError, match="batch_size: 8 there, 16 here"):
        expand(Study("s", (GRID, other)))


def test_all_is_made_once_in_order_and_recorded(tmp_path):
    log = []
    found = work(STUDY, store(tmp_path), fake(log), say=quiet)
    assert log == [run.key for run in expand(STUDY)]
    assert {s.state for s in found} == {"done"}
    work(STUDY, store(tmp_path), fake(log), say=quiet)
    assert len(log) == 8
    record = json.loads((tmp_path / "results.jsonl").read_text().splitlines()[0])
    assert record["labels"]["family"] in ("ViT", "ResNet")
    assert record["evaluations"][0]["test/accuracy"] == 0.5
    # The records alone tell which runs are done: the runs' folder may be gone.
    elsewhere = store(tmp_path / "new", results=tmp_path / "results.jsonl")
    assert set(states(STUDY, elsewhere).values()) == {"done"}


def test_a_failed_run_is_recorded_and_the_rest_goes_on(tmp_path):
    found = work(STUDY, store(tmp_path), fake(fails=["R | 8 | 4 steps | seed 0"]), say=quiet)
    by_key = {s.run.key: s for s in found}
    assert by_key["R | 8 | 4 steps | seed 0"].state == "failed"
    assert "FloatingPointError: not finite" in by_key["R | 8 | 4 steps | seed 0"].note
    assert by_key["R | 8 | 4 steps | seed 0 | digits"].state == "blocked"
    assert sum(s.state == "done" for s in found) == 6
    assert store(tmp_path).forget_failed() == [by_key["R | 8 | 4 steps | seed 0"].run.name]


def test_an_edited_study_adds_new_runs_and_refuses_changed_ones(tmp_path):
    work(STUDY, store(tmp_path), fake(), say=quiet)
    wider = dataclasses.replace(VIT, fields={**VIT.fields, "model.width": 64})
    grid = dataclasses.replace(GRID, models=(wider, RESNET), seeds=(0, 1))
    log, said = [], []
    found = work(Study("tiny", (grid,)), store(tmp_path), fake(log), say=said.append)
    assert log and all("seed 1" in key for key in log) and len(log) == 8
    changed = [s for s in found if s.state == "changed"]
    assert {s.run.key for s in changed} == {k for k in states(STUDY, store(tmp_path)) if "ViT" in k}
    assert "model.width: None there, 64 here" in "\n".join(said)


def test_an_init_that_is_gone_is_made_again(tmp_path):
    grid = dataclasses.replace(GRID, models=(VIT,), sets=SETS[:1], tasks=())
    work(Study("tiny", (grid,)), store(tmp_path), fake(), say=quiet)
    checkpoints = tmp_path / "runs" / expand(Study("s", (grid,)))[0].name / "checkpoints"
    (checkpoints / "4").rename(checkpoints / "2")  # another process is about to make it again
    grid = dataclasses.replace(grid, tasks=GRID.tasks)
    log = []

    def train(run, config, workdir):
        (workdir / "checkpoints").mkdir(parents=True, exist_ok=True)
        return fake(log)(run, config, workdir)

    work(Study("tiny", (grid,)), store(tmp_path), train, say=quiet)
    assert log == ["ViT | 8 | 4 steps | seed 0", "ViT | 8 | 4 steps | seed 0 | digits"]


def test_missing_data_is_said_before_anything_is_trained(tmp_path):
    recipe = merge(TUNING, {"data.dataset": "cifar10", "data.data_dir": str(tmp_path)})
    grid = dataclasses.replace(GRID, tasks=(*GRID.tasks, Task("cifar", recipe)))
    said, log = [], []
    found = work(Study("tiny", (grid,)), store(tmp_path), fake(log), say=said.append)
    without = [s for s in found if s.state == "no data"]
    assert {s.run.labels["task"] for s in without} == {"cifar"} and len(without) == 4
    assert len(log) == 8 and sum("cifar10 is not prepared" in text for text in said) == 1
    assert said[0].startswith("NO DATA")


WORKER = """
import sys, time
sys.path[:0] = [{root!r}, {tests!r}]
from pathlib import Path
from test_scaling import STUDY, fake
from experiments.scaling.runner import Store, work

def train(run, config, workdir):
    with open({log!r}, "a") as file:
        file.write(run.key + "\\n")
    time.sleep({seconds})
    return fake()(run, config, workdir)

work(STUDY, Store(Path({folder!r})), train, poll=0.05)
"""


def worker(tmp_path, seconds):
    code = WORKER.format(
        root=str(ROOT),
        tests=str(ROOT / "tests"),
        log=str(tmp_path / "log"),
        folder=str(tmp_path / "study"),
        seconds=seconds,
    )
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)


def test_two_processes_share_a_study_and_a_killed_one_is_replaced(tmp_path):
    log = tmp_path / "log"
    killed = worker(tmp_path, 60)
    while not log.exists():
        time.sleep(0.02)
    killed.kill()
    killed.wait()
    where = store(tmp_path / "study")
    first = expand(STUDY)[0]
    assert states(STUDY, where)[first.key] == "interrupted"  # and nobody waits for the lease
    both = [worker(tmp_path, 0.2) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    made = log.read_text().splitlines()
    assert made.count(first.key) == 2 and len(made) == 9  # every other run once
    assert set(states(STUDY, where).values()) == {"done"}


def test_what_another_ended_before_the_claim_is_not_made_again(tmp_path, monkeypatch):
    where, log = store(tmp_path), []
    take = where.claims.take

    def late(name, progress):  # another process makes it between the reading and the claim
        if not log:
            monkeypatch.setattr(where.claims, "take", take)
            work(STUDY, store(tmp_path), fake(log), only=name, say=quiet)
        return take(name, progress)

    monkeypatch.setattr(where.claims, "take", late)
    work(STUDY, where, fake(log), say=quiet)
    assert log == [run.key for run in expand(STUDY)]


def test_claims_have_one_winner(tmp_path):
    claims = [Claims(tmp_path, lease=2.0) for _ in range(8)]
    barrier = threading.Barrier(8)
    won = []

    def race(claim):
        barrier.wait()
        held = claim.take("a")
        if held:
            won.append(held)

    threads = [threading.Thread(target=race, args=(claim,)) for claim in claims]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    with won[0]:
        time.sleep(2.5)  # longer than the lease: it beats
        assert claims[1].take("a") is None and claims[1].is_held("a")
    assert claims[1].newest("a").released and claims[1].deaths("a") == 0
    for expected in (1, 2):  # taken and never let go
        assert claims[2].take("a", "at 3")
        os.utime(tmp_path / f"a.{expected + 1}", (1, 1))
        assert not claims[2].is_held("a") and claims[2].deaths("a") == expected
    assert claims[2].take("a", "at 4") and claims[2].deaths("a") == 0  # it got further


def test_a_run_that_kills_its_processes_comes_last(tmp_path):
    where, made = store(tmp_path), []
    run = expand(STUDY)[0]
    for number in range(1, runner.DEATHS + 1):
        assert where.claims.take(run.name, "0")
        os.utime(tmp_path / "claims" / f"{run.name}.{number}", (1, 1))

    def train(run, config, workdir):
        made.append(run.key)
        return fake()(run, config, workdir)

    assert {s.state for s in work(STUDY, where, train, say=quiet)} == {"done"}
    independent = [r.key for r in expand(STUDY) if not (r.init or r.trunk)]
    assert [key for key in made if key in independent][-1] == run.key


def test_the_claim_of_a_process_that_has_ended_expires_at_once(tmp_path):
    claims = Claims(tmp_path)
    claims.take("a")
    (file,) = tmp_path.glob("a.1")
    assert claims.is_held("a")
    mine, ended = f":{os.getpid()}@", subprocess.Popen(["true"])
    ended.wait()
    file.write_text(file.read_text().replace(mine, f":{ended.pid}@"))
    assert not claims.is_held("a") and claims.take("a")
    (tmp_path / "a.2").write_text(file.read_text().replace("@", "@elsewhere"))
    assert claims.is_held("a")  # of that machine's processes nothing is known here


def test_a_machine_may_set_what_defines_no_run(tmp_path):
    seen = []

    def train(run, config, workdir):
        seen.append(config["mesh"])
        return fake()(run, config, workdir)

    work(STUDY, store(tmp_path), train, free={"mesh.fsdp": 2}, say=quiet)
    assert seen == [{"fsdp": 2}] * 8
    with pytest.raises(ValueError, match=r"optimizer\.b2 is part of a run"):
        work(STUDY, store(tmp_path), train, free={"optimizer.b2": 0.9}, say=quiet)


def test_crossover_has_matched_budgets_and_needs_tuned_rates(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="expected crossover or crossover:rates"):
        load_study("crossover:rate")
    proxies = expand(load_study("crossover:rates"))
    names = {(run.labels["sweep"].split()[0], run.labels["model"]) for run in proxies}
    rows = [{"sweep": f, "model": m, "best rate": 0.001 * i} for i, (f, m) in enumerate(names)]
    tuned = tmp_path / "rates.csv"
    study = runpy.run_path(str(ROOT / "experiments/scaling/studies/crossover.py"))
    monkeypatch.setitem(study["tuned"].__globals__, "TUNED", tuned)
    with pytest.raises(ValueError, match="run and draw --study=crossover:rates first"):
        study["get_study"]()
    write_csv(tuned, rows)
    runs = [run for run in expand(study["get_study"]()) if run.kind == "pretrain"]
    assert len(runs) == len(names) * (4 + 3) * 3
    rates = {(row["sweep"], row["model"]): row["best rate"] for row in rows}
    for run in runs:
        family, model = run.labels["set"].split()[0], run.labels["model"]
        assert run.config["schedule"]["peak"] == rates[family, model]
        assert run.config["data"]["dataset"] == f"{family}/100"
    for model, flops in study["FLOPS"].items():
        config = next(run.config for run in runs if run.labels["model"] == model)
        built = build_model(build(ModelConfig, config["model"]), study["CLASSES"], (16, 16))
        assert training_flops(built) == flops


def test_h200_fits_into_minutes_and_needs_tuned_rates(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="expected h200, h200:rates or h200:rehearsal"):
        load_study("h200:rate")
    file, tuned = runpy.run_path(str(ROOT / "experiments/scaling/studies/h200.py")), tmp_path / "r"
    monkeypatch.setitem(file["tuned"].__globals__, "TUNED", tuned)
    with pytest.raises(ValueError, match="run and draw --study=h200:rates first"):
        file["get_study"]()
    families = {model.name: model.family for model in file["MODELS"]}
    rows = [{"sweep": "strokes", "model": m, "best rate": 1e-3 * i} for i, m in enumerate(families)]
    write_csv(tuned, rows[1:])
    with pytest.raises(ValueError, match="no rate of ViT-Ti/4 on strokes: finish --study=h200:ra"):
        file["get_study"]()
    write_csv(tuned, rows)

    proxies, runs = expand(load_study("h200:rates")), expand(file["get_study"]())
    assert not {run.name for run in proxies} & {run.name for run in runs}
    assert Counter(families.values()) == {"ViT": 2, "ResNet": 2, "hybrid": 1}
    pretrained = [run for run in runs if run.kind == "pretrain"]
    for run, row in itertools.product(pretrained, rows):
        if run.labels["model"] == row["model"]:
            assert run.config["schedule"]["peak"] == row["best rate"]
    sizes = {run.labels["examples"] for run in pretrained}
    assert max(sizes) >= 1000 * min(sizes)
    # What a program doesn't depend on: images, seed, learning rate.
    arguments = {"data.split": "", "seed": 0, "schedule.peak": 1.0}
    programs = {Run("pretrain", {}, merge(r.config, arguments)).hash for r in proxies + pretrained}
    budgets = {run.labels["budget"] for run in pretrained}
    assert len(programs) == len(budgets) * len(families) == 15

    h200 = parse_topology("h200:1")
    costs = [estimate(run, h200, 0.4, None) for run in proxies + runs]
    assert 4 < 60 * total(costs).chip_hours < 8
    assert max(3600 * c.chip_hours for c in costs if c.run.labels["budget"] == "130 steps") < 5


def test_bad_studies_are_explained(tmp_path):
    with pytest.raises(ValueError, match="unknown study 'mimi': did you mean 'mini'"):
        load_study("mimi")
    (tmp_path / "s.py").write_text("x = 1\n")
    with pytest.raises(ValueError, match="has no get_study"):
        load_study(str(tmp_path / "s.py"))
    with pytest.raises(FileNotFoundError, match="no study file"):
        load_study(str(tmp_path / "t.py"))
    with pytest.raises(ValueError, match="exactly one of steps and epochs"):
        Budget()
    with pytest.raises(ValueError, match="unknown family 'vit': Known: ResNet, ViT"):
        Model("a", "vit", {})
    assert Choice("a", {}).name == "a"


def scaling(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "experiments.scaling", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


FILE = """
import dataclasses
from test_scaling import GRID, RECIPE, SETS, VIT
from experiments.scaling.study import Budget, Study, merge

def get_study(arg):
    digits = {"dataset": "digits", "split": "train[:100]"}
    recipe = merge(RECIPE, {
        "classification.validation": {"data": {"dataset": "strokes/10",
            "split": "validation[:16]"}, "batch_size": 8},
        "fewshot.digits": {"data": digits, "test_split": "test[:16]", "shots": [2]},
    })
    grid = dataclasses.replace(GRID, recipe=recipe, models=(VIT,), sets=SETS[:1])
    if arg:
        budgets = tuple(Budget(int(steps)) for steps in arg.split(","))
        grid = dataclasses.replace(grid, budgets=budgets, cooldown=0.5, tasks=())
    return Study("one", (grid,))
"""


def real_study(folder, arg=""):
    """Options and environment of a study of one model."""
    folder.mkdir()
    (folder / "one.py").write_text(FILE)
    study = f"{folder / 'one.py'}:{arg}" if arg else folder / "one.py"
    paths = [f"--study={study}", f"--folder={folder}", f"--results={folder / 'results.jsonl'}"]
    return paths, {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}


@pytest.mark.long
def test_a_real_study_from_the_command_line(tmp_path):
    """Runs pretraining, few-shot and fine-tuning with the real loops, and draws figures."""
    paths, where = real_study(tmp_path / "one")
    done = scaling("run", *paths, **where)
    assert done.returncode == 0, done.stderr
    assert "2 runs: 2 done" in done.stdout
    records = {r["key"]: r for r in runner.read_results(tmp_path / "one" / "results.jsonl")}
    up = records["ViT | 8 | 4 steps | seed 0"]
    assert up["steps"] == 4 and 0 <= up["evaluations"][-1]["digits/2shot"] <= 1
    tuned = records["ViT | 8 | 4 steps | seed 0 | digits"]
    assert tuned["evaluations"][-1]["test/examples"] == 16
    drawn = scaling("figures", *paths, f"--output={tmp_path / 'figures'}", **where)
    assert drawn.returncode == 0, drawn.stderr
    assert (tmp_path / "figures" / "one_figure_5.png").stat().st_size > 10_000
    table = (tmp_path / "figures" / "table6.csv").read_text().splitlines()
    assert table[0].startswith("name,set,budget,exaFLOPs") and len(table) == 2


def test_one_run_of_a_cluster_that_is_not_made_is_no_success(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "tests"))
    paths, _ = real_study(tmp_path / "one")
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        monkeypatch.setenv(name, "0")  # which the command would set for this process
    first, tuning = expand(load_study(paths[0].removeprefix("--study=")))
    assert main(["run", *paths, f"--only={tuning.name}"]) == 1
    assert f"waits       {tuning.key}: for {first.key}" in capsys.readouterr().out
    for run in (first, tuning):
        store(tmp_path / "one").record(run, {"status": "done", "steps": 4})
    assert main(["run", *paths, f"--only={tuning.name}"]) == 0


@pytest.mark.slow
def test_a_branch_is_what_a_run_from_the_beginning_would_be(tmp_path):
    """A branch is bit-identical to a separate run, including evaluations."""
    evaluations = []
    for name, budgets in (("branches", "4,8"), ("alone", "8")):
        paths, where = real_study(tmp_path / name, budgets)
        done = scaling("run", *paths, **where)
        assert done.returncode == 0, done.stderr
        assert ("4 of 8" in done.stderr) == (name == "branches")
        records = {r["key"]: r for r in runner.read_results(tmp_path / name / "results.jsonl")}
        record = records["ViT | 8 | 8 steps | seed 0"]
        evaluations.append((record["name"], record["evaluations"], record["loss"]))
    assert evaluations[0] == evaluations[1]


def test_command_errors_are_explained(tmp_path):
    done = scaling("status", "--study=mimi")
    assert done.returncode == 1 and "did you mean 'mini'" in done.stderr
    assert "Traceback" not in done.stderr
    (tmp_path / "results.jsonl").write_text('{"name": "a", "ke\n')
    with pytest.raises(ValueError, match="line 1: expected a run's record in JSON, found"):
        store(tmp_path).records()


def test_a_long_note_is_shown_once(capsys):
    runs = expand(STUDY)
    show([runner.Status(run, "no data", "one\nand more") for run in runs[:2]], everything=False)
    assert capsys.readouterr().out.splitlines()[1:] == [
        "    and more",
        f"no data     {runs[1].key}: as above",
        "2 runs: 2 no data",
    ]


def test_workers_and_the_commands_for_a_cluster(tmp_path):
    paths = ("--study=mini", f"--folder={tmp_path}", f"--results={tmp_path / 'results.jsonl'}")
    done = scaling("run", *paths, "--workers", 2, "--minutes=0")
    assert done.stderr.count("minutes are over") == 2, done.stderr
    lines = scaling("run", *paths, "--print").stdout.splitlines()
    runs = expand(load_study("mini"))
    assert len(lines) == len(runs)
    assert lines[0].startswith("python -m vit_jax scaling run --study=mini --folder=")
    assert lines[0].endswith(f"--only={runs[0].name}")
