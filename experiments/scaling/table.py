"""Converts records of runs to points: accuracies with their pretraining compute."""

import csv
import dataclasses
import io
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from experiments.scaling.study import Study, expand
from vit_jax.config import InputError


@dataclasses.dataclass(frozen=True)
class Point:
    """The accuracy of one pretrained model on one task."""

    model: str
    family: str
    set: str
    examples: int  # images in the pretraining set
    budget: str
    sweep: str
    seed: int
    task: str  # "digits 5-shot", "digits fine-tuned", "upstream"
    accuracy: float  # percent
    noise: float  # standard deviation from drawing shots or a finite test set, percent
    exaflops: float  # of pretraining
    images_seen: int
    parameters: int
    img_per_sec: float


def points(study: Study, records: dict[str, dict[str, Any]]) -> list[Point]:
    """Returns the points of all finished runs.

    Selects the evaluation and sweep point with the best `study.select`, an upstream metric
    independent of the tasks' test images; without one, the last.
    """
    runs = {run.name: run for run in expand(study)}
    done = [r for name, r in records.items() if name in runs and r["status"] == "done"]
    chosen: dict[tuple, tuple[tuple, dict, dict]] = {}
    for record in done:
        if record["kind"] != "pretrain" or not record["evaluations"]:
            continue
        cell = tuple(record["labels"][k] for k in ("model", "set", "budget", "seed"))
        for evaluation in record["evaluations"]:
            score = evaluation.get(study.select, -np.inf), evaluation["step"]
            if cell not in chosen or score > chosen[cell][0]:
                chosen[cell] = score, record, evaluation
    upstream = {record["name"]: record for _, record, _ in chosen.values()}
    found = []
    for _, record, evaluation in chosen.values():
        for metric, value in evaluation.items():
            if task := _task(metric, record["config"]):
                noise = _noise(metric, value, evaluation)
                found.append(_point(record, record["labels"], task, value, noise))
    found += _transfers(study, done, upstream)
    return found


def _task(metric: str, config: dict[str, Any]) -> str | None:
    if match := re.fullmatch(r"(\w+)/(\d+)shot", metric):
        return f"{match[1]} {match[2]}-shot"
    # Without labels, upstream accuracy is that of patches, which isn't comparable.
    supervised = config.get("loss.name") != "masked_patches"
    return "upstream" if metric == "validation/accuracy" and supervised else None


def last_loss(record: dict[str, Any]) -> float:
    """Returns a run's last loss: the first evaluator's that reports one, else that of training.

    inf if the run didn't finish, or diverged.
    """
    if record["status"] != "done":
        return math.inf
    last = (record["evaluations"] or [{}])[-1]
    trained = record.get("loss") or math.inf
    loss = next((v for k, v in last.items() if k.endswith("/loss")), trained)
    return loss if math.isfinite(loss) else math.inf


def losses_by_rate(records: Iterable[dict[str, Any]]) -> dict[str, dict[str, dict[float, list]]]:
    """Returns {sweep: {model: {peak learning rate: last losses of its seeds}}} of pretraining.

    Points of a sweep over `schedule.peak` are named "RULE RATE"; the sweep is the RULE. Sweeps and
    models with one learning rate are left out.
    """
    found: dict[str, dict[str, dict[float, list]]] = {}
    for record in records:
        name, _, rate = record["labels"]["sweep"].rpartition(" ")
        if record["kind"] == "pretrain" and record["status"] == "done" and rate:
            models = found.setdefault(name, {}).setdefault(record["labels"]["model"], {})
            models.setdefault(record["config"]["schedule.peak"], []).append(last_loss(record))
    several = {
        name: {
            model: dict(sorted(rates.items())) for model, rates in models.items() if len(rates) > 1
        }
        for name, models in found.items()
    }
    return {name: models for name, models in several.items() if models}


def tuned_rate(path: Path, study: str, sweep: str, model: str) -> float:
    """Returns a model's learning rate from `rates.csv`, which the figures of STUDY:rates write.

    Raises ValueError if the file or the model's row is missing.
    """
    if not path.exists():
        raise InputError(f"no {path}: run and draw --study={study}:rates first")
    rates = {(row["sweep"], row["model"]): row["best rate"] for row in read_csv(path)}
    if (sweep, model) not in rates:
        raise InputError(
            f"{path} has no rate of {model} on {sweep}: finish --study={study}:rates and draw it "
            "again"
        )
    return float(rates[sweep, model])


def _transfers(study: Study, done: list[dict], upstream: dict[str, dict]) -> Iterable[Point]:
    best: dict[tuple, tuple[float, dict, dict]] = {}
    for record in done:
        init = record["config"].get("init", "@")[1:]
        if record["kind"] != "transfer" or (init and init not in upstream):
            continue
        last = record["evaluations"][-1]
        start = init or (record["labels"]["model"], record["labels"]["seed"])
        cell = start, record["labels"]["task"]
        score = last.get(study.task_select, 0.0)
        if cell not in best or score > best[cell][0]:
            best[cell] = score, record, last
    for (start, task), (_, record, last) in best.items():
        value = last["test/accuracy"]
        noise = _noise("test/accuracy", value, last)
        # Without pretraining the compute is 0.
        pretraining = upstream.get(start) or {**record, "steps": 0}
        yield _point(pretraining, record["labels"], f"{task} fine-tuned", value, noise)


def _noise(metric: str, value: float, evaluation: dict[str, float]) -> float:
    """Returns an accuracy's standard deviation over draws of shots, else from the test set size."""
    draws = evaluation.get(f"{metric}_std", 0.0)
    examples = evaluation.get(f"{metric.rpartition('/')[0]}/examples")
    return draws if examples is None else (value * (1 - value) / examples) ** 0.5


def _point(record: dict, labels: dict, task: str, value: float, noise: float) -> Point:
    images = record["steps"] * record["batch_size"]
    names = ("model", "family", "set", "examples", "budget", "sweep", "seed")
    return Point(
        **{name: labels[name] for name in names},
        task=task,
        accuracy=round(100 * value, 3),
        noise=round(100 * noise, 3),
        exaflops=record["flops_per_image"] * images / 1e18,
        images_seen=images,
        parameters=record["parameters"],
        img_per_sec=record["img_per_sec"] or 0.0,
    )


def write_csv(path: Path, rows: Iterable[Any]) -> None:
    """Writes dataclasses or dicts as CSV."""
    rows = [dataclasses.asdict(r) if dataclasses.is_dataclass(r) else r for r in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path.write_text(text.getvalue(), newline="")


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def grouped(items: Iterable[Point], key: Callable[[Point], Any]) -> dict[Any, list[Point]]:
    """Groups points by key, in order of first occurrence."""
    groups = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return dict(groups)


def kind_of(task: str) -> str:
    """Returns the kind of a task: "5-shot", "fine-tuned" or "upstream"."""
    return task.rpartition(" ")[2]


def average_tasks(found: list[Point], kind: str) -> list[Point]:
    """Averages over all tasks of a kind ("5-shot", ...), for runs that have all of them."""
    some = [p for p in found if kind_of(p.task) == kind]
    tasks = {p.task for p in some}
    result = []
    runs = grouped(some, lambda p: (p.model, p.set, p.budget, p.sweep, p.seed))
    for of_run in runs.values():
        if {p.task for p in of_run} == tasks:
            mean = float(np.mean([p.accuracy for p in of_run]))
            noise = float(np.sqrt(np.mean([p.noise**2 for p in of_run]) / len(of_run)))
            task = f"average {kind}"
            result.append(dataclasses.replace(of_run[0], task=task, accuracy=mean, noise=noise))
    return result
