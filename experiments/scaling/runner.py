"""Executes the missing runs of a study.

A study's folder contains `runs/NAME` (workdirs), `claims/` and `records/NAME.json`, one for each
run that ended, successfully or not. Any number of processes, on machines that share the folder, can
`work` on a study at the same time and be killed at any moment. Figures and fits need only the
records, which are also collected in `results.jsonl`.
"""

import contextlib
import dataclasses
import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from experiments.scaling.study import (
    Run,
    Study,
    differences,
    expand,
    flatten,
    machine_fields,
    merge,
)
from vit_jax.config import InputError, covered
from vit_jax.parallel.claims import LEASE, Claims, write_atomically
from vit_jax.parallel.run_files import read_json, saved_steps

DEATHS = 3  # a run over which this many processes died is tried after all others
Train = Callable[[Run, dict, Path], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Status:
    """The state of a run.

    done | failed | changed | running | blocked | waits | interrupted | missing; in `work` also "no
    data".
    """

    run: Run
    state: str
    note: str = ""


class Store:
    """The files of a study."""

    def __init__(self, folder: Path, results: Path | None = None, lease: float = LEASE):
        self.folder = folder
        self.results = results or folder / "results.jsonl"
        self.claims = Claims(folder / "claims", lease)

    def keep_compiled(self) -> None:
        """Keeps compiled programs in the folder, for all runs; call it before importing jax.

        The cache is per host: code for one CPU may not run on another.
        """
        compiled = (self.folder / "compiled" / platform.node()).absolute()
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(compiled))
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

    def workdir(self, name: str) -> Path:
        return self.folder / "runs" / name

    def checkpoint(self, name: str) -> int:
        """Returns the step of a run's newest checkpoint; 0 without one."""
        return max(saved_steps(self.workdir(name)), default=0)

    def is_kept(self, record: Mapping[str, Any]) -> bool:
        """Whether a finished run's last checkpoint exists, for other runs to start from."""
        return self.checkpoint(record["name"]) >= record.get("steps", 1)

    def records(self) -> dict[str, dict[str, Any]]:
        """Returns the records of ended runs, by name; the folder's take precedence."""
        found = {record["name"]: record for record in read_results(self.results)}
        for path in sorted((self.folder / "records").glob("*.json")):
            with contextlib.suppress(FileNotFoundError):  # another process retries what failed
                remedy = "remove it: the run is made again, or goes on"
                record = read_json(path, remedy, keys=("name", "key", "status"))
                found[record["name"]] = record
        return found

    def record(self, run: Run, values: Mapping[str, Any]) -> None:
        record = {
            "name": run.name,
            "key": run.key,
            "kind": run.kind,
            "labels": dict(run.labels),
            "config": flatten(run.config),
            **values,
        }
        path = self.folder / "records" / f"{run.name}.json"
        write_atomically(path, json.dumps(record) + "\n")
        self.collect()

    def collect(self) -> dict[str, dict[str, Any]]:
        """Writes the records of finished runs to one file; returns all records.

        Safe with concurrent processes: each one reads again after writing, and writes again if it
        finds more records.
        """
        while True:
            records = self.records()
            done = [record for record in records.values() if record["status"] == "done"]
            write_atomically(self.results, "".join(json.dumps(r) + "\n" for r in done))
            if self.records().keys() == records.keys():
                return records

    def forget_failed(self) -> list[str]:
        """Removes the records of failed runs, so that they are retried."""
        forgotten = []
        for record in self.records().values():
            held = record["status"] == "failed" and self.claims.take(record["name"])
            if held:  # otherwise another process runs it
                with held:  # releasing the claim resets the count of deaths
                    path = self.folder / "records" / f"{record['name']}.json"
                    path.unlink(missing_ok=True)
                forgotten.append(record["name"])
        return forgotten


def read_results(path: Path) -> list[dict[str, Any]]:
    """Reads the records of a `results.jsonl`; returns none if there is no file."""
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise InputError(
                f"{path}, line {number}: expected a run's record in JSON, found {line[:40]!r}. "
                "Delete the line: the study's folder also has the record, or the run is repeated"
            ) from error
    return records


def statuses(study: Study, store: Store) -> list[Status]:
    """Returns the status of every run, in the study's order."""
    runs = expand(study)
    records = store.records()
    by_key = {record["key"]: record for record in records.values()}
    # A finished run is repeated if another run needs its checkpoint and it no longer exists.
    needed = {run.init for run in runs if run.init and run.name not in records}
    needed = {name for name in needed if name in records and not store.is_kept(records[name])}
    found: dict[str, Status] = {}
    for run in runs:
        found[run.name] = _status(run, store, records, by_key, found, run.name in needed)
    return list(found.values())


def _status(
    run: Run,
    store: Store,
    records: dict[str, dict],
    by_key: dict[str, dict],
    earlier: dict[str, Status],
    is_needed: bool,
) -> Status:
    record = records.get(run.name)
    if record and record["status"] == "failed":
        return Status(run, "failed", record["error"])
    if record and not is_needed:
        return Status(run, "done")
    other = by_key.get(run.key)
    if record is None and other and other["status"] != "failed":
        before = Run(other["kind"], other["labels"], other["config"]).identity
        return Status(run, "changed", "\n".join(differences(before, run.identity)))
    for name in filter(None, (run.init, run.trunk)):
        state = earlier[name].state
        if state in ("failed", "blocked", "changed"):
            return Status(run, "blocked", f"{earlier[name].run.key} is {state}")
        if state != "done":
            return Status(run, "waits", f"for {earlier[name].run.key}")
    if store.claims.is_held(run.name):
        claim = store.claims.newest(run.name)
        return Status(run, "running", f"{claim.owner}, {_progress(store, run)}")
    if store.claims.newest(run.name):
        deaths = store.claims.deaths(run.name)
        died = f", {deaths} process(es) died over it" if deaths else ""
        return Status(run, "interrupted", _progress(store, run) + died)
    return Status(run, "missing", "done before, but a task needs its checkpoint" if record else "")


def _progress(store: Store, run: Run) -> str:
    path = store.workdir(run.name) / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    whole = text[: text.rfind("\n") + 1].splitlines()  # the last line may be incomplete
    try:
        return f"at step {json.loads(whole[-1])['step'] if whole else 0}"
    except (ValueError, TypeError, KeyError):
        return f"{path} is damaged: delete the last line"


def work(
    study: Study,
    store: Store,
    train: Train,
    *,
    free: Mapping[str, Any] | None = None,
    only: str | None = None,
    seconds: float = float("inf"),
    poll: float = 10.0,
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
) -> list[Status]:
    """Executes missing runs in the study's order; waits for other processes' runs if needed.

    Args:
      study: the study.
      store: its files.
      train: trains one run and returns its record.
      free: fields of this machine (mesh, data_dir, ...), which don't change results.
      only: name of a single run.
      seconds: starts no run after this time.
      poll: seconds between looks at other processes' runs.
      say: prints a message.

    Returns:
      The statuses at the end.
    """
    check_free(free or {})
    began = time.monotonic()
    for status in statuses(study, store):
        if status.state == "changed":
            say(f"REFUSED, since it was run otherwise: {status.run.key}\n{status.note}")
    opened: dict[tuple, str] = {}
    while True:
        found = [_with_data(s, free or {}, opened, say) for s in statuses(study, store)]
        if only is not None and only not in {s.run.name for s in found}:
            raise InputError(f"no run {only!r} in study {study.name}: `expand` lists them")
        ready = [s.run for s in found if s.state in ("missing", "interrupted")]
        ready = [run for run in ready if only in (None, run.name)]
        ready.sort(key=lambda run: store.claims.deaths(run.name) >= DEATHS)
        if time.monotonic() - began > seconds:
            say(f"{seconds / 60:g} minutes are over")
            return found
        for run in ready:
            held = store.claims.take(run.name, f"{store.checkpoint(run.name)}")
            if held:
                with held:
                    # Another process may have finished it between reading the status and the claim.
                    now = {s.run.name: s.state for s in statuses(study, store)}[run.name]
                    if now not in ("done", "failed"):
                        _make(run, store, train, free or {}, say)
                break
        else:
            others = any(s.state == "running" for s in found)
            waits = any(s.state == "waits" for s in found)
            if only is not None or (not ready and not (others and waits)):
                return found
            time.sleep(poll)


def _with_data(status: Status, free: Mapping[str, Any], opened: dict[tuple, str], say) -> Status:
    """Checks a run's data first; returns the status, or "no data"."""
    from vit_jax.data.sources import open_source

    if status.state not in ("missing", "interrupted", "waits"):
        return status
    for key in _datasets(merge(status.run.config, free)):
        if key not in opened:
            try:
                open_source(*key)
                opened[key] = ""
            except (ValueError, OSError) as error:
                if str(error) not in opened.values():
                    say(f"NO DATA: {error}")
                opened[key] = str(error)
        if opened[key]:
            return Status(status.run, "no data", opened[key])
    return status


def _datasets(config: Mapping[str, Any]) -> Iterator[tuple[str, str, str | None]]:
    """Yields (name, split, data_dir) of all datasets of a run."""
    kinds = ("classification", "fewshot", "evaluators")
    for group in (config, *(e for kind in kinds for e in config.get(kind, {}).values())):
        data = group["data"]
        for split in {data.get("split", "train"), group.get("test_split", "")} - {""}:
            yield data["dataset"], split, data.get("data_dir")


def _make(run: Run, store: Store, train: Train, free: Mapping[str, Any], say) -> None:
    workdir = store.workdir(run.name)
    if (died := store.claims.deaths(run.name)) >= DEATHS:
        say(f"{died} processes died in {run.key} (out of memory? preempted?): it comes last")
    say(f"\n== {run.key}  ({run.name})")
    began = time.time()
    try:
        result = train(run, resolve(run, store, free), workdir)
    except Exception as error:  # recorded with the run, so that other runs continue
        last = f"{type(error).__name__}: {error}"
        trace = "".join(traceback.format_exception(error)[-3:])
        store.record(run, {"status": "failed", "error": last, "traceback": trace})
        say(f"failed: {run.key}: {last}")
        return
    seconds = round(time.time() - began, 1)
    store.record(run, {"status": "done", "seconds": seconds, **result})


def resolve(run: Run, store: Store, free: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the config with this folder's paths and this machine's fields."""
    config = merge(run.config, free)
    if run.init:
        config["init"] = str(store.workdir(run.init))
    if not store.checkpoint(run.name) and run.name in store.records():
        config["start_over"] = True  # it was done, and is made again for its checkpoint
    begun = store.workdir(run.name) / "config.json"
    if begun.exists() and store.checkpoint(run.name):  # continues as it began, also if moved
        remedy = f"copy it back, or remove {begun.parent}: the run is made again"
        kept = read_json(begun, remedy, keys=("resume",))
        config |= {name: kept[name] for name in ("resume", "init") if name in kept}
    elif run.trunk and store.checkpoint(run.trunk) == run.trunk_steps:
        config["resume"] = str(store.workdir(run.trunk) / "checkpoints" / str(run.trunk_steps))
    return config


def check_free(fields: Mapping[str, Any]) -> None:
    """Raises ValueError for fields that would change the run's identity."""
    for name in fields:
        if not covered(name, machine_fields()):
            raise InputError(
                f"{name} is part of a run's identity: set it in the study file. A machine may set "
                f"{', '.join(machine_fields())}"
            )


def train(run: Run, config: dict[str, Any], workdir: Path) -> dict[str, Any]:
    """Trains with the package's loop, resuming if interrupted; returns the values to record.

    `evaluations`: one dict per evaluation, with its step. `loss`, `img_per_sec`: the last ones.
    """
    import jax

    from vit_jax.classifier.recipe import TransferConfig
    from vit_jax.classifier.start import prepare
    from vit_jax.config import build
    from vit_jax.training import loop
    from vit_jax.training.metrics import read_metrics

    if run.kind == "transfer":
        prepared = prepare(build(TransferConfig, config), str(workdir))
    else:
        prepared = loop.prepare(build(loop.TrainConfig, config), str(workdir))
    last = loop.train(prepared)
    evaluations: dict[int, dict[str, float]] = {}
    for record in read_metrics(workdir):
        scores = {k: v for k, v in record.items() if "/" in k}
        if scores:
            evaluations.setdefault(record["step"], {"step": record["step"]}).update(scores)
    shapes = jax.tree.leaves(prepared.shapes.params)
    result = {
        "steps": last["step"],
        "batch_size": prepared.config.batch_size,
        "flops_per_image": prepared.flops(0, prepared.scheduled)
        / (prepared.scheduled * prepared.config.batch_size),
        "parameters": sum(leaf.size for leaf in shapes),
        "evaluations": list(evaluations.values()),
        "loss": last.get("loss"),
        "img_per_sec": last.get("img_per_sec"),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "jax": jax.__version__,
    }
    jax.clear_caches()  # compiled programs stay in the persistent cache
    return result


def commands(found: list[Status], arguments: str) -> Iterator[str]:
    """Yields command lines for a cluster's queue; runs come after those they depend on."""
    for status in found:
        if status.state in ("missing", "interrupted", "waits"):
            line = f"python -m vit_jax scaling run {arguments} --only={status.run.name}"
            yield line + (f"  # {status.state} {status.note}" if status.note else "")
