"""Tests a finished workflow once; writes results.json, report.html, MODEL_CARD.md, exports."""

import dataclasses
import json
import resource
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from scipy.special import softmax

from vit_jax.classifier.audit import Audit
from vit_jax.classifier.baselines import PROBE, compare, measure_baselines
from vit_jax.classifier.examine import keep_outputs, score, where_it_looks, worst_mistakes
from vit_jax.classifier.page import MISTAKES, Report, model_card, render
from vit_jax.classifier.probe import VALUES, Probe
from vit_jax.classifier.recipe import TransferConfig
from vit_jax.classifier.splits import Splits
from vit_jax.classifier.sweep import Trial, best_trial, show_trials, shown, trial_name
from vit_jax.data.pipeline import DataConfig
from vit_jax.data.sources import Source, open_source
from vit_jax.models.lora import merged_model
from vit_jax.parallel import multihost
from vit_jax.parallel.mesh import put_tree, state_shardings, use_mesh
from vit_jax.parallel.run_files import remove_tree, write_whole
from vit_jax.training import loop
from vit_jax.training.metrics import read_metrics
from vit_jax.training.workdir import compiled_kept
from vit_jax.weights.formats import WEIGHTS
from vit_jax.weights.trained import TrainedModel, load

PARTS = ("train", "dev", "test")


@dataclasses.dataclass(frozen=True)
class Finished:
    """A workflow whose final run has ended."""

    config: TransferConfig
    run: loop.Run  # the final one
    splits: Splits
    audit: Audit
    trials: list[Trial]
    temperature: float  # fitted on dev to the logits of the best trial
    probe: Probe | None  # the linear probe, if any

    @property
    def chosen(self) -> Trial:
        """The trial that the final run repeats on train and dev."""
        return best_trial(self.trials, self.config.workflow.metric)

    def open(self, part: str) -> Source:
        """The images of "train", "dev" or "test"."""
        split = getattr(self.splits, part)
        return open_source(self.splits.dataset, split, self.config.data.data_dir)

    @property
    def workdir(self) -> Path:
        return self.run.workdir

    @property
    def test_data(self) -> DataConfig:
        """The test split, preprocessed as `predict` does."""
        return dataclasses.replace(
            self.run.config.data, split=self.splits.test, preprocess=self.config.eval_preprocess
        )


def logits_of(run: loop.Run, folder: Path, data: DataConfig, file: Path) -> tuple:
    """Returns (logits, labels) of a split by the run's last checkpoint, the one users load."""

    def params() -> dict:
        loaded = load(folder).params
        return put_tree(loaded, state_shardings(run.mesh, run.config.mesh, loaded))

    source = open_source(data.dataset, data.split, data.data_dir)
    model = merged_model(run.model)
    with use_mesh(run.mesh), compiled_kept(folder, run.config.compilation_cache):
        return keep_outputs(file, model, params, run.mesh, source, data, run.config.batch_size)


def report(done: Finished, command: str, started: float) -> dict[str, Any]:
    """Tests the model and writes all results to the workdir; returns those of results.json.

    `started` is the time.perf_counter of this start.
    """
    logits, labels = logits_of(done.run, done.workdir, done.test_data, done.workdir / "test.npz")
    model = load(done.workdir)  # orbax reads on all processes at once
    probed = done.probe.test_logits()[0].argmax(axis=1) if done.probe else None
    chosen, scores = done.chosen, score(logits, labels, done.temperature)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    results = {
        **scores,
        "dev_accuracy": chosen.accuracy,
        "chosen": chosen.values,
        "seconds_of_last_start": round(time.perf_counter() - started, 1),
        "peak_host_memory_gib": round(peak, 2),
        "trials": [dataclasses.asdict(trial) for trial in done.trials],
    }
    if not multihost.is_main():
        return results
    metric, sources = done.config.workflow.metric, {p: done.open(p) for p in PARTS}
    baselines = measure_baselines(sources, done.audit.counts, labels, probed, metric)
    others = [b for b in baselines if b["name"] != PROBE or chosen.values != VALUES]
    remarks = compare(scores, others, metric)
    results |= {"baselines": baselines, "remarks": remarks}
    files = export(done.config.workflow.export, done.workdir, model)
    write_whole(done.workdir / "results.json", json.dumps(results, indent=2) + "\n")
    probabilities = softmax(logits.astype(np.float64), axis=1)
    page = _page(done, model, command, results, probabilities, labels, files)
    for name, text in (("report.html", render(page)), ("MODEL_CARD.md", model_card(page))):
        write_whole(done.workdir / name, text.encode("utf-8", "backslashreplace"))
    low, high = scores["accuracy_interval"]
    print(
        f"test accuracy {scores['accuracy']:.2%} [{low:.2%}, {high:.2%}] of {len(labels)} images",
        *remarks,
        done.workdir / "report.html",
        sep="\n",
        flush=True,
    )
    return results


def _page(
    done: Finished,
    model: TrainedModel,
    command: str,
    results: Mapping[str, Any],
    probabilities: np.ndarray,
    labels: np.ndarray,
    files: dict[str, str],
) -> Report:
    config, run, names = done.config, done.run, done.audit.class_names
    chosen, source, metric = done.chosen, done.open("test"), config.workflow.metric
    curves = {
        shown(trial.values): read_metrics(done.workdir / "trials" / trial_name(trial.values))
        for trial in done.trials
    }
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    return Report(
        title=f"{run.config.model.variant} on {Path(config.data.dataset).name}",
        command=command,
        facts={
            "model": f"{run.config.model.variant}, {run.model.image_size[0]} px",
            "init": config.init or "random weights",
            "chosen on dev": f"{shown(chosen.values)} ({metric.replace('_', ' ')} "
            f"{chosen.merit(metric)[0]:.1%} there)",
            "trained": f"{run.steps:,} steps of {run.config.batch_size} images"
            if run.steps
            else "the head alone, on frozen features",
            "software": f"jax {jax.__version__}, {devices}",
        },
        class_names=names,
        probabilities=probabilities,
        labels=labels,
        scores=results,
        baselines=results["baselines"],
        remarks=results["remarks"],
        data=str(dataclasses.replace(done.audit, findings=[])),
        findings=done.audit.findings,
        trials=show_trials(done.trials, metric),
        curves={**curves, "final": read_metrics(done.workdir)},
        mistakes=worst_mistakes(source, probabilities, labels, names, MISTAKES),
        attention=where_it_looks(
            model.architecture, model.params, source, config.eval_preprocess, 6
        ),
        files=files,
    )


def export(formats: tuple[str, ...], workdir: Path, model: TrainedModel) -> dict[str, str]:
    """Writes the model to `exported/` in each format, unless it exists.

    Returns {path: description, or why it is missing} for all files in the workdir.
    """
    files = {
        "checkpoints/": "the model: predict --model, evaluate --checkpoint and convert read it",
        "results.json": "these numbers",
        "MODEL_CARD.md": "a model card",
        "data/": "the splits and the audit",
        "trials/": "records of the sweep",
        "test.npz": "logits and labels of the test images",
    }
    for name in formats:
        suffix = {"onnx": ".onnx", "timm": "", "hugging_face": ""}.get(name, ".npz")
        path = workdir / "exported" / f"{name}{suffix}"
        shown = str(path.relative_to(workdir))
        path.parent.mkdir(exist_ok=True)
        try:
            if path.is_dir() and not (path / WEIGHTS).exists():
                remove_tree(path)  # an earlier version could be killed between its files
            if not path.exists():
                model.save(path, name)
            files[shown] = f"the model as {name}"
        except ValueError as error:  # the format doesn't support this model
            files[shown] = f"not written: {error}"
            print(f"{shown} is not written: {error}", flush=True)
    return files
