"""Fingerprints of a run's data, kept in `data.json` and compared at every start and host."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vit_jax.config import InputError
from vit_jax.data.fingerprint import differences, fingerprint
from vit_jax.data.pipeline import DataConfig, open_data
from vit_jax.data.sources import Source
from vit_jax.evaluation.protocols.classification import check_class_names
from vit_jax.parallel.multihost import is_main
from vit_jax.parallel.run_files import read_json, write_whole
from vit_jax.training.recipe import TrainConfig

FILE = "data.json"
TRAIN = "train"
Facts = dict[str, dict[str, Any]]  # "train" or "evaluator: split" -> a fingerprint


def describe_data(config: TrainConfig, source: Source) -> Facts:
    """Returns fingerprints of the training data `source` and of every evaluator's data.

    Raises ValueError if an evaluator numbers the classes differently from the training data.
    """
    facts = {TRAIN: fingerprint(source)}
    for name, protocol, data in _evaluated(config):
        found = open_data(data)
        if protocol == "classification" and not config.loss.masks_patches:
            check_class_names(source.class_names or (), found.class_names or ())
        facts[name] = {"dataset": data.dataset, **fingerprint(found)}
    return facts


def _evaluated(config: TrainConfig) -> Iterator[tuple[str, str, DataConfig]]:
    for name, evaluator in config.evaluators.items():
        fields = ("test_split", "dev_split")
        splits = {evaluator.data.split, *(getattr(evaluator, field, None) for field in fields)}
        for split in sorted(splits - {None}):
            data = dataclasses.replace(evaluator.data, split=split)
            yield f"{name}: {split}", evaluator.protocol, data


def digest(facts: Facts) -> str:
    """Returns a short text that is equal on hosts with equal data."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def check_same_data(workdir: Path, facts: Facts) -> list[str]:
    """Raises ValueError with the differences if the data differ from `data.json`, if it exists.

    Evaluators may be added, removed, and given other datasets.
    """
    if not (workdir / FILE).exists():  # the run is from an earlier version
        return []
    kept = read_json(workdir / FILE, "remove it if the data is as it was")
    changed = [
        f"  {name}: {text}"
        for name, now in facts.items()
        if (before := kept.get(name, {})).get("dataset") == now.get("dataset")
        for text in differences(before, now)
    ]
    if changed:
        raise InputError(
            f"the data isn't what the run in {workdir} was trained on:\n"
            + "\n".join(changed)
            + "\nRestore it, or start again in another --workdir. To continue with the current "
            f"data, remove {workdir / FILE}."
        )
    return []


def keep_data(workdir: Path, facts: Facts) -> None:
    """Writes `data.json`."""
    if is_main():
        write_whole(workdir / FILE, json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
