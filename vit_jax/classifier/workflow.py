"""From a dataset to a tested, exported classifier: splits, trials, final run, report."""

import dataclasses
import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from vit_jax.classifier import budget
from vit_jax.classifier.audit import Audit
from vit_jax.classifier.examine import read_outputs
from vit_jax.classifier.probe import VALUES, Probe
from vit_jax.classifier.recipe import TransferConfig, choose_init, complete
from vit_jax.classifier.results import Finished, logits_of, report
from vit_jax.classifier.splits import Splits, settle_splits
from vit_jax.classifier.start import prepare
from vit_jax.classifier.sweep import (
    Values,
    best_trial,
    check_dev,
    devices_of_a_trial,
    run_trials,
    show_trials,
    shown,
    trial_name,
    with_values,
)
from vit_jax.config import InputError, build, printable
from vit_jax.costs.chips import GIB
from vit_jax.data.sources import is_path, open_source
from vit_jax.evaluation.calibration import fit_temperature
from vit_jax.evaluation.protocols.classification import Config as ClassificationConfig
from vit_jax.parallel import multihost
from vit_jax.parallel.lanes import ALONE, Lane, make_lanes
from vit_jax.parallel.mesh import make_mesh
from vit_jax.parallel.run_files import as_path, read_json
from vit_jax.recipes import merge, recipe
from vit_jax.training import loop
from vit_jax.training.clock import Clock, read_starts
from vit_jax.training.memory import device_memory, fit_memory
from vit_jax.training.recipe import build_training
from vit_jax.training.workdir import CONFIG, compiled_kept, keep_same, lock_workdir

SWEEP = "sweep.json"  # the recipe of the final run, before its values are chosen


def transfer(
    data: str = "",
    init: str | None = None,
    workdir: str | os.PathLike = "",
    config: str | Mapping[str, Any] | TransferConfig = "transfer/folder",
    *,
    command: str = "",
    clock: Clock | None = None,
) -> loop.Trained:
    """Fine-tunes a checkpoint on a dataset, or continues the run that is in the workdir.

    With the recipe's `workflow` the data are looked at, missing splits are cut, trials compete on
    dev, the best is trained on train and dev and tested once; `report.html` shows all of it.

    Args:
      data: a folder of images, a table, or a dataset's name; "": the recipe's.
      init: a checkpoint, as for `vit_jax.load`; "": random weights; None: the recipe's. Where that
        names neither a checkpoint nor a model, "embedded" on a CPU and else "augreg:S/16".
      workdir: the folder of the run.
      config: a recipe's name, such as "transfer/paper:cifar10", or a recipe as `vit_jax.recipe`
        returns it.
      command: what the report says that the run was started by.
      clock: one that runs already, if the time before this call counts too.

    Returns the run; its `metrics` are those of results.json with a workflow, and the last records
    without. Raises ValueError or FileNotFoundError for a recipe or data that don't fit.
    """
    values = recipe(config) if isinstance(config, str) else config
    if isinstance(values, TransferConfig):
        values = dataclasses.asdict(values)
    elif isinstance(values, ml_collections.ConfigDict):
        values = values.to_dict()
    values = merge(values, {"data.dataset": data} if data else {})
    dataset = values["data"].get("dataset", "")
    _check_exists(dataset)  # before a download of `init`
    if init is None:
        init = _first_init(workdir, values)
    values = merge(values, {"init": init})
    config = build(TransferConfig, complete(values, _first_device(workdir), _folded(workdir)))
    if config.workflow is None:
        run = prepare(config, os.fspath(workdir), clock)
        return loop.Trained(run.workdir, loop.train(run))
    if not workdir:
        raise InputError("no workdir: say where to keep this run with --workdir=FOLDER")
    command = command or f"vit_jax.transfer({data!r}, {init!r})"
    return run_workflow(config, as_path(workdir), command)


def _check_exists(dataset: str) -> None:
    if is_path(dataset) and not as_path(dataset).expanduser().exists():
        raise FileNotFoundError(f"there is no {dataset}")


def default_workdir(dataset: str) -> Path:
    """Returns the folder of a run on a dataset where none is named: runs/NAME, in this folder.

    Raises FileNotFoundError for a path where nothing is.
    """
    _check_exists(dataset)
    name = Path(dataset).expanduser().resolve().stem if is_path(dataset) else dataset
    return Path("runs") / (re.sub(r"[^\w.+-]+", "_", name) or "transfer")


def run_workflow(config: TransferConfig, workdir: Path, command: str) -> loop.Trained:
    """From the data to the report; what an earlier start finished isn't repeated.

    Raises OSError if another process uses the workdir.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    lock = lock_workdir(workdir)
    if config.compilation_cache == "workdir":  # one for the programs of all trials
        config = dataclasses.replace(config, compilation_cache=str(workdir / "compiled"))
    with compiled_kept(workdir, config.compilation_cache):
        trained = _run_workflow(config, workdir, command)
    del lock  # held until here
    return trained


def _first_device(workdir: str | os.PathLike) -> str | None:
    """The device whose defaults a workflow began with; None for one that begins."""
    if not workdir:
        return None
    workdir = as_path(workdir)
    if (workdir / budget.FILE).exists():
        return budget.read(workdir).device
    return "earlier" if _is_earlier(workdir) else None


def _first_init(workdir: str | os.PathLike, values: Mapping[str, Any]) -> str:
    """`choose_init`, or random weights if a run goes on that an earlier version began with them."""
    init, begun = choose_init(values), as_path(workdir or ".") / SWEEP
    if init == values.get("init", ""):
        return init
    if workdir and begun.exists() and not read_json(begun, f"remove {begun}").get("init"):
        return ""
    if multihost.is_main():
        print(f"it starts from {init}; another start: --config.init=CHECKPOINT", flush=True)
    return init


def _folded(workdir: str | os.PathLike) -> bool:
    """Whether a version began the run whose models had no mean and deviation of pixels."""
    if not workdir:
        return False
    folder = as_path(workdir)
    files = [folder / CONFIG, *sorted(folder.glob(f"trials/*/{CONFIG}"))[:1]]
    first = next((file for file in files if file.exists()), None)
    return first is not None and "mean" not in read_json(first, "copy it back").get("model", {})


def _is_earlier(workdir: Path) -> bool:
    """Whether an earlier version began the workflow: all devices had the same defaults."""
    return (workdir / SWEEP).exists() and not (workdir / budget.FILE).exists()


def _run_workflow(config: TransferConfig, workdir: Path, command: str) -> loop.Trained:
    started, metric = time.perf_counter(), config.workflow.metric
    earlier = multihost.all_agree(_is_earlier(workdir))
    splits, audit = _settle_splits(config, workdir)
    loss = config.loss.weigh(audit.class_names, np.array(audit.counts["train"]))
    config = dataclasses.replace(config, loss=loss)
    trials = config.workflow.sweep.trials()
    check_dev(sum(audit.counts["dev"]), trials)
    budget.check_sweep(config)
    for values in trials:
        with_values(config, values)  # what can't be is known before the first trial
    whole = fitted(config, splits)
    for_trials, lanes = spread(config, whole, splits, len(trials))
    on_train, on_both = trial_recipe(for_trials, splits), final_recipe(whole, splits)
    probe = None if earlier else _probe(whole, splits, workdir)
    results, settled = [probe.trial()] if probe else [], None
    if not earlier:
        steps = _Steps(on_train, audit, workdir, lanes)
        settled = budget.settle(
            config,
            workdir,
            trials,
            steps.scheduled,
            partial(steps.cost, trials[0]),
            lanes=len(lanes),
            started=started,
            probed=probe is not None,
        )
        if config.workflow.minutes is not None:
            trials, scaled = settled.trials, (settled.steps or steps.scheduled, steps.scheduled)
            on_train, on_both = (budget.with_steps(c, *scaled) for c in (on_train, on_both))
    keep_same(workdir / SWEEP, on_both)
    results += run_trials(on_train, trials, workdir, train_trial, lanes)
    best = best_trial(results, metric)
    if multihost.is_main():
        print(f"{show_trials(results, metric)}\nchosen: {shown(best.values)}", flush=True)
    final = with_values(on_both, best.values)
    if config.early_stopping and final.stop is None:
        final = dataclasses.replace(final, stop=best.step)
    elif settled and config.workflow.minutes and final.stop is None:
        folders = (workdir / "trials" / trial_name(values) for values in trials)
        spent = sum(sum(s["seconds"].values()) for f in folders for s in read_starts(f))
        steps = budget.settle_final(workdir, spent / len(lanes), len(lanes))
        final = budget.with_steps(final, steps, final.steps or settled.steps)
    folder = workdir / "trials" / trial_name(best.values)
    of_dev = read_outputs(folder / "dev.npz", f"remove {folder}: the trial is made again")
    temperature = fit_temperature(*of_dev)
    head = probe.head if best.values == VALUES else None
    run = prepare(final, str(workdir), temperature=temperature, head=head)
    loop.train(run)
    done = Finished(whole, run, splits, audit, results, temperature, probe)
    return loop.Trained(workdir, report(done, command, started))


def _probe(config: TransferConfig, splits: Splits, workdir: Path) -> Probe | None:
    """The linear probe, if the recipe wants one and the checkpoint has features."""
    if not (config.workflow.probe and config.init):
        return None
    probe = Probe(config, splits, workdir, config.workflow.metric)
    if fresh := probe.fresh:
        if multihost.is_main():
            print(f"no linear probe: {', '.join(fresh)} aren't the checkpoint's", flush=True)
        return None
    return probe


@dataclasses.dataclass(frozen=True)
class _Steps:
    """The steps of a trial by the recipe, and what they cost."""

    config: TransferConfig  # of trials
    audit: Audit
    workdir: Path
    lanes: Sequence[Lane]

    @property
    def scheduled(self) -> int:
        images = sum(self.audit.counts["train"])
        return self.config.steps or math.ceil(self.config.epochs * images / self.config.batch_size)

    def cost(self, values: Values) -> budget.Cost:
        """Measures steps of the trial with these values, of which nothing is kept."""
        config = with_values(self.config, values)
        run = prepare(config, str(self.workdir), lane=self.lanes[0])
        step, compilation = loop.measure_step(run)
        counts = self.audit.counts
        dev, test = (sum(counts[part]) / config.batch_size for part in ("dev", "test"))
        evaluations = 2 + self.scheduled // (config.eval_every or self.scheduled)
        return budget.Cost.of(step, compilation, evaluations * dev, 2 * test)


def _settle_splits(config: TransferConfig, workdir: Path) -> tuple:
    """As `settle_splits`, on all processes; the first one writes."""
    of = (config.data.dataset, config.workflow.split, config.data.data_dir, workdir / "data")
    if multihost.is_main():
        if not (workdir / "trials").exists():  # nothing depends on an earlier start's splits
            (workdir / "data" / "audit.json").unlink(missing_ok=True)
        settle_splits(*of)
    multihost.barrier("splits")
    splits, audit = settle_splits(*of)
    if multihost.is_main():
        print(printable(f"{config.data.dataset}\n{audit}\n"), flush=True)
    return splits, audit


def spread(
    config: TransferConfig, whole: TransferConfig, splits: Splits, trials: int
) -> tuple[TransferConfig, Sequence[Lane]]:
    """The recipe as it fits the devices of a trial, and the lanes that trials go in.

    `whole` is the recipe as it fits all devices. Without `fit_memory` nobody knows what fits fewer,
    and side by side is for `sweep.devices` to say.
    """
    size = devices_of_a_trial(config, config.workflow.sweep, trials)
    asked = config.workflow.sweep.devices is not None
    if size < jax.device_count() and (asked or config.workflow.fit_memory):
        lanes = make_lanes(size)
        try:
            alone = fitted(config, splits, lanes[0])
        except ValueError as error:
            if asked:
                raise
            print(f"{error}\nTrials go one after another, over all devices", flush=True)
        else:
            print(f"trials go side by side, {len(lanes)} at a time", flush=True)
            return alone, lanes
    return whole, (ALONE,)


def fitted(config: TransferConfig, splits: Splits, lane: Lane = ALONE) -> TransferConfig:
    """Returns the config with accumulation and remat chosen to fit these devices."""
    mesh = make_mesh(config.mesh, lane.devices)
    if not config.workflow.fit_memory:
        return config
    capacity = config.workflow.memory_gib * GIB if config.workflow.memory_gib else device_memory()
    source = open_source(splits.dataset, splits.train, config.data.data_dir)
    training = build_training(config, mesh, source.num_classes, len(source))
    accumulation, remat, found = fit_memory(training, capacity)
    if multihost.is_main():
        print(f"{mesh.size} device(s): {found}", flush=True)
    model = dataclasses.replace(config.model, remat=remat)
    return dataclasses.replace(config, accumulation=accumulation, model=model)


def trial_recipe(config: TransferConfig, splits: Splits) -> TransferConfig:
    """Trained on train, evaluated on dev."""
    data = dataclasses.replace(config.data, dataset=splits.dataset, split=splits.train)
    dev = dataclasses.replace(data, split=splits.dev, preprocess=config.eval_preprocess)
    metric = config.workflow.metric
    return dataclasses.replace(
        config,
        data=data,
        workflow=None,
        evaluators={"dev": ClassificationConfig(dev, config.batch_size, by_class=True)},
        watch="dev" if metric == "accuracy" else f"dev/{metric}",
    )


def final_recipe(config: TransferConfig, splits: Splits) -> TransferConfig:
    """Trained on train and dev, for as many steps or epochs; nothing is evaluated meanwhile."""
    split = f"{splits.train}+{splits.dev}"
    data = dataclasses.replace(config.data, dataset=splits.dataset, split=split)
    return dataclasses.replace(
        config, data=data, workflow=None, evaluators={}, early_stopping=None, watch=""
    )


def train_trial(config: TransferConfig, folder: Path, lane: Lane = ALONE) -> None:
    """Trains a trial, and keeps its logits on dev: the temperature is fitted to them."""
    run = prepare(config, str(folder), lane=lane)
    loop.train(run)
    logits_of(run, folder, config.evaluators["dev"].data, folder / "dev.npz")
