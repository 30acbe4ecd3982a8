"""Fine-tuning: from a checkpoint and a dataset to a trained, tested, exported classifier."""

import dataclasses
import json
import resource
import threading
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from scipy.special import softmax

from vit_jax import config as configuration
from vit_jax.classifier.audit import Audit
from vit_jax.classifier.examine import (
    keep_logits,
    read_logits,
    score,
    where_it_looks,
    worst_mistakes,
)
from vit_jax.classifier.page import MISTAKES, Report, model_card, render
from vit_jax.classifier.splits import SplitConfig, Splits, settle_splits
from vit_jax.classifier.sweep import (
    SweepConfig,
    Trial,
    best_trial,
    check_dev,
    devices_of_a_trial,
    run_trials,
    show_trials,
    trial_name,
    with_values,
)
from vit_jax.data.pipeline import DataConfig
from vit_jax.data.sources import open_source
from vit_jax.evaluation.calibration import fit_temperature
from vit_jax.evaluation.features import make_batches, make_extractor, open_single_label
from vit_jax.evaluation.protocols.classification import Config as ClassificationConfig
from vit_jax.evaluation.protocols.linear import L2, probe_head
from vit_jax.models.variants import Model, ModelConfig
from vit_jax.parallel import multihost
from vit_jax.parallel.lanes import ALONE, Lane, make_lanes
from vit_jax.parallel.mesh import make_mesh, put_tree, state_shardings, use_mesh
from vit_jax.training import loop
from vit_jax.training.clock import Clock
from vit_jax.training.memory import GIB, device_memory, fit_memory
from vit_jax.training.metrics import read_metrics
from vit_jax.training.recipe import TrainConfig, build_training
from vit_jax.training.workdir import compiled_kept, keep_same, lock_workdir
from vit_jax.weights import formats
from vit_jax.weights.adapt import DROP, REINITIALIZE, adapt, flatten
from vit_jax.weights.trained import TrainedModel, load

_LOADING = threading.Lock()  # trials that go side by side download and read it once


@dataclasses.dataclass(frozen=True)
class TransferConfig(TrainConfig):
    """A recipe that starts from a checkpoint."""

    init: str = ""  # whatever `weights.trained.load` reads; empty: random weights
    reinitialize: tuple[str, ...] = REINITIALIZE  # regexes of tensors to start afresh
    drop: tuple[str, ...] = DROP  # regexes of the checkpoint's tensors to leave out
    head: str = "zero"  # what to begin with: zero, or probe: logistic regression on the features
    eval_preprocess: str = "resize"  # of dev and test images, and of those to be labelled later
    sweep: SweepConfig | None = None
    split: SplitConfig = SplitConfig()  # where there is a sweep
    fit_memory: bool = False  # choose microbatches and remat, where there is a sweep
    memory_gib: float | None = None  # that a step may take on a device; None: what it says it has
    export: tuple[str, ...] = ()  # of weights.formats.FORMATS, where there is a sweep

    def __post_init__(self):
        super().__post_init__()
        if self.head not in ("zero", "probe"):
            raise configuration.unknown("head", self.head, ("zero", "probe"))
        if self.head == "probe" and not self.init:
            raise ValueError("head = 'probe' fits the features of a checkpoint: give one, init")
        for name in self.export:
            if name not in formats.FORMATS:
                raise configuration.unknown("export format", name, formats.FORMATS)


@cache
def load_init(path: str) -> TrainedModel:
    """Reads the checkpoint to start from, once for all trials."""
    return load(path)


def complete(values: dict[str, Any]) -> dict[str, Any]:
    """The recipe's fields, with what it leaves open taken from the checkpoint it starts from."""
    if not (values["data"].get("dataset") or values["data"].get("mixture")):
        raise ValueError("no images: say which, --config.data=FOLDER or the name of a dataset")
    model = dict(values.get("model", {}))
    if "variant" in model and "image_size" in values:
        return values
    if not values.get("init"):
        raise ValueError(
            "no init, and the recipe names no model: give --config.init=CHECKPOINT, or both "
            "--config.model.variant and --config.image_size to start from random weights"
        )
    source = load_init(values["init"])
    if "variant" not in model:
        of_training = set(configuration.fields_where(ModelConfig, inherited=False))
        fields = dataclasses.asdict(source.config).items()
        model = {**{k: v for k, v in fields if k not in of_training}, **model}
    height, width = source.image_size
    if "image_size" not in values and height != width:
        raise ValueError(
            f"{values['init']} is for images of {height} x {width}: say the side of the square "
            "ones to train on, --config.image_size"
        )
    return {"image_size": height, **values, "model": model}


def prepare(
    config: TransferConfig, workdir: str, clock: Clock | None = None, lane: Lane = ALONE
) -> loop.Run:
    """As `loop.prepare`, with the parameters of `config.init`."""
    extra = {"preprocess": config.eval_preprocess}
    if not config.init:
        return loop.prepare(config, workdir, None, clock, extra, lane)

    def load(model: Model, shapes: dict) -> dict:
        with _LOADING:
            source = load_init(config.init)
        # What no tensor's name or shape would betray.
        for name in ("mlp", "norm_epsilon", "zero_padded_pool"):
            there, here = getattr(source.config, name), getattr(model.config, name)
            if there != here:
                raise ValueError(
                    f"{config.init} was trained with {name} = {there!r}, the recipe's model has "
                    f"{here!r}: set --config.model.{name}={there}"
                )
        adapted, report = adapt(
            source.params,
            shapes,
            grid=model.grid,
            source_grid=source.architecture.grid,
            reinitialize=config.reinitialize,
            drop=config.drop,
        )
        print(f"{config.init}:\n{report}")
        if config.head == "probe":
            adapted = with_probed_head(config, model, adapted, make_mesh(config.mesh, lane.devices))
        return adapted

    return loop.prepare(config, workdir, load, clock, extra, lane)


def with_probed_head(config: TransferConfig, model: Model, params: dict, mesh: Mesh) -> dict:
    """The parameters with a head that was fitted to their features of the training images."""
    fresh = {name for name, leaf in flatten(params).items() if not isinstance(leaf, np.ndarray)}
    if other := sorted(fresh - {"head/kernel", "head/bias"}):
        raise ValueError(f"head = 'probe': {', '.join(other)} are fresh, there is nothing to probe")
    data = dataclasses.replace(config.data, preprocess=config.eval_preprocess)
    batches = make_batches(open_single_label(data), data, model, mesh, config.batch_size)
    shapes = params["head"]
    params = {**params, "head": {k: np.zeros(v.shape, v.dtype) for k, v in shapes.items()}}
    with use_mesh(mesh):
        placed = put_tree(params, state_shardings(mesh, config.mesh, params))
        features, labels = make_extractor(model, mesh)(placed, batches)
    kernel, bias, l2 = probe_head(features, labels, model.num_classes, L2, config.seed)
    print(f"head: logistic regression on {len(labels)} images, l2 {l2:g}")
    return {**params, "head": {"kernel": kernel, "bias": bias}}


def choose_and_train(config: TransferConfig, workdir: Path, command: str) -> None:
    """From the data to the report: whatever was finished by an earlier start isn't repeated.

    Raises OSError if another process uses the workdir.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    lock = lock_workdir(workdir)
    if config.compilation_cache == "workdir":  # one for the programs of all trials
        config = dataclasses.replace(config, compilation_cache=str(workdir / "compiled"))
    with compiled_kept(workdir, config.compilation_cache):
        _choose_and_train(config, workdir, command)
    del lock  # held until here


def _choose_and_train(config: TransferConfig, workdir: Path, command: str) -> None:
    start = time.perf_counter()
    of = (config.data.dataset, config.split, config.data.data_dir, workdir / "data")
    if multihost.is_main():
        if not (workdir / "trials").exists():  # nothing depends on an earlier start's splits
            (workdir / "data" / "audit.json").unlink(missing_ok=True)
        settle_splits(*of)
    multihost.barrier("splits")
    splits, audit = settle_splits(*of)
    if multihost.is_main():
        print(f"{config.data.dataset}\n{audit}\n", flush=True)
    trials = config.sweep.trials()
    check_dev(sum(audit.counts["dev"]), trials)
    whole = fitted(config, splits)
    for_trials, lanes = spread(config, whole, splits, len(trials))
    config = whole
    on_train, on_both = trial_recipe(for_trials, splits), final_recipe(config, splits)
    keep_same(workdir / "sweep.json", on_both)
    for values in trials:
        with_values(on_both, values)  # what can't be is known before the first trial

    results = run_trials(on_train, trials, workdir, train_trial, lanes)
    best = best_trial(results)
    if multihost.is_main():
        print(show_trials(results) + f"\nchosen: {trial_name(best.values)}", flush=True)
    final = with_values(on_both, best.values)
    if config.early_stopping:
        final = dataclasses.replace(final, stop=best.step)
    run = prepare(final, str(workdir))
    loop.train(run)
    report(config, run, splits, audit, results, workdir, command, start)


def spread(
    config: TransferConfig, whole: TransferConfig, splits: Splits, trials: int
) -> tuple[TransferConfig, Sequence[Lane]]:
    """The recipe as it fits the devices of a trial, and the lanes that trials go in.

    `whole` is the recipe as it fits all devices. Without `fit_memory` nobody knows what fits fewer,
    and side by side is for `sweep.devices` to say.
    """
    size = devices_of_a_trial(config, config.sweep, trials)
    asked = config.sweep.devices is not None
    if size < jax.device_count() and (asked or config.fit_memory):
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
    if not config.fit_memory:
        return config
    capacity = config.memory_gib * GIB if config.memory_gib else device_memory()
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
    return dataclasses.replace(
        config,
        data=data,
        sweep=None,
        evaluators={"dev": ClassificationConfig(dev, config.batch_size)},
        watch="dev",
    )


def final_recipe(config: TransferConfig, splits: Splits) -> TransferConfig:
    """Trained on train and dev, for as many steps or epochs; nothing is evaluated meanwhile."""
    split = f"{splits.train}+{splits.dev}"
    data = dataclasses.replace(config.data, dataset=splits.dataset, split=split)
    return dataclasses.replace(
        config, data=data, sweep=None, evaluators={}, early_stopping=None, watch=""
    )


def train_trial(config: TransferConfig, folder: Path, lane: Lane = ALONE) -> None:
    """Trains a trial, and keeps its logits on dev: the temperature is fitted to them."""
    run = prepare(config, str(folder), lane=lane)
    loop.train(run)
    logits_of(run, folder, config.evaluators["dev"].data, folder / "dev.npz")


def logits_of(run: loop.Run, folder: Path, data: DataConfig, file: Path) -> tuple:
    """(logits, labels) of a split by the run's last checkpoint: what others will load."""
    params = load(folder).params
    source = open_source(data.dataset, data.split, data.data_dir)
    with use_mesh(run.mesh), compiled_kept(folder, run.config.compilation_cache):
        shardings = state_shardings(run.mesh, run.config.mesh, params)
        placed = put_tree(params, shardings)
        return keep_logits(file, run.model, placed, run.mesh, source, data, run.config.batch_size)


def report(
    config: TransferConfig,
    run: loop.Run,
    splits: Splits,
    audit: Audit,
    results: list[Trial],
    workdir: Path,
    command: str,
    start: float,
) -> None:
    """Tests once, and writes results.json, report.html, MODEL_CARD.md and the exports."""
    chosen = best_trial(results)
    folder = workdir / "trials" / trial_name(chosen.values)
    remedy = f"remove {folder}: the trial is made again"
    temperature = fit_temperature(*read_logits(folder / "dev.npz", remedy))
    data = dataclasses.replace(
        run.config.data, split=splits.test, preprocess=config.eval_preprocess
    )
    logits, labels = logits_of(run, workdir, data, workdir / "test.npz")
    model = load(workdir)  # orbax reads on all processes at once
    if not multihost.is_main():
        return
    names, scores = audit.class_names, score(logits, labels, temperature)
    files = export(config, workdir, model)
    results_file = {
        **scores,
        "dev_accuracy": chosen.accuracy,
        "chosen": chosen.values,
        "seconds_of_last_start": round(time.perf_counter() - start, 1),
        "peak_host_memory_gib": round(
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2
        ),
        "trials": [dataclasses.asdict(trial) for trial in results],
    }
    (workdir / "results.json").write_text(json.dumps(results_file, indent=2) + "\n")
    probabilities = softmax(logits.astype(np.float64), axis=1)
    source = open_source(data.dataset, data.split, data.data_dir)
    trial_folders = {
        trial_name(t.values): workdir / "trials" / trial_name(t.values) for t in results
    }
    page = Report(
        title=f"{run.config.model.variant} on {Path(config.data.dataset).name}",
        command=command,
        facts={
            "model": f"{run.config.model.variant}, {run.model.image_size[0]} px",
            "init": config.init or "random weights",
            "chosen on dev": f"{trial_name(chosen.values)} ({chosen.accuracy:.1%} there)",
            "trained": f"{run.steps:,} steps of {run.config.batch_size} images",
            "software": f"jax {jax.__version__}, {jax.device_count()} x "
            f"{jax.devices()[0].device_kind}",
        },
        class_names=names,
        probabilities=probabilities,
        labels=labels,
        scores=scores,
        data=str(dataclasses.replace(audit, findings=[])),
        findings=audit.findings,
        trials=show_trials(results),
        curves={
            **{name: read_metrics(path) for name, path in trial_folders.items()},
            "final": read_metrics(workdir),
        },
        mistakes=worst_mistakes(source, probabilities, labels, names, MISTAKES),
        attention=where_it_looks(run.model, model.params, source, config.eval_preprocess, 6),
        files=files,
    )
    (workdir / "report.html").write_text(render(page), "utf-8")
    (workdir / "MODEL_CARD.md").write_text(model_card(page), "utf-8")
    low, high = scores["accuracy_interval"]
    print(
        f"test accuracy {scores['accuracy']:.2%} [{low:.2%}, {high:.2%}] of {len(labels)} images\n"
        f"{workdir / 'report.html'}",
        flush=True,
    )


def export(config: TransferConfig, workdir: Path, model: TrainedModel) -> dict[str, str]:
    """Writes the formats asked for to `exported/`: {path: what it is, or why it isn't there}."""
    files = {
        "checkpoints/": "the model: predict --model, evaluate --checkpoint and convert read it",
        "results.json": "these numbers",
        "MODEL_CARD.md": "a model card",
        "data/": "the splits and the audit",
        "trials/": "records of the sweep",
        "test.npz": "logits and labels of the test images",
    }
    for name in config.export:
        suffix = {"onnx": ".onnx", "timm": "", "hugging_face": ""}.get(name, ".npz")
        path = workdir / "exported" / f"{name}{suffix}"
        shown = str(path.relative_to(workdir))
        path.parent.mkdir(exist_ok=True)
        try:
            if not path.exists():
                model.save(path, name)
            files[shown] = f"the model as {name}"
        except ValueError as error:  # that format has no place for this model
            files[shown] = f"not written: {error}"
            print(f"{shown} is not written: {error}", flush=True)
    return files
