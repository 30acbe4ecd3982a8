"""A run: all its parts, checked before anything is compiled."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np

from vit_jax.config import InputError
from vit_jax.data.pipeline import open_data, train_batches
from vit_jax.data.sources import Source
from vit_jax.evaluation.registry import make_evaluator
from vit_jax.models.variants import Model
from vit_jax.parallel.lanes import ALONE, Lane
from vit_jax.parallel.mesh import local_rows, make_mesh
from vit_jax.parallel.multihost import check_agreement, check_shared
from vit_jax.parallel.run_files import Lock, saved_steps
from vit_jax.parallel.watchdog import Watchdog, waits_for
from vit_jax.training.checkpoint import check_newest, check_other
from vit_jax.training.clock import Clock
from vit_jax.training.recipe import TrainConfig, Training, build_training
from vit_jax.training.same_data import TRAIN, Facts, check_same_data, describe_data, digest
from vit_jax.training.workdir import open_workdir, or_start_over
from vit_jax.weights.trained import find_checkpoint


@dataclasses.dataclass(frozen=True)
class Run(Training):
    """All parts of a run, checked, with nothing computed yet."""

    workdir: Path
    source: Source
    evaluators: dict[str, Callable[[dict], dict[str, float]]]
    batches: Callable[[int], Iterator[dict[str, np.ndarray]]]  # first step -> local batches
    description: dict  # of the model, saved in its checkpoints
    loaded: dict | None  # initial parameters: numpy arrays, or shapes for those to initialise
    clock: Clock
    lane: Lane
    watched: str  # the metric of early stopping; "" without it
    resumes: Path | None  # what to resume from: this workdir, or a checkpoint of another
    notes: list[str]  # messages about the recipe and damaged checkpoints
    facts: Facts  # fingerprints of the data, compared at the next start
    lock: Lock | None  # on the workdir, for the lifetime of the run


def prepare(
    config: TrainConfig,
    workdir: str,
    load: Callable[[Model, dict], dict] | None = None,
    clock: Clock | None = None,
    description: dict | None = None,
    lane: Lane = ALONE,
) -> Run:
    """Builds and checks all parts of a run without compiling anything.

    Args:
      config: the recipe.
      workdir: the folder of the run.
      load: (model, shapes) -> initial parameters; shapes in its result are initialised randomly.
        It isn't called on resuming. None: all are random.
      clock: a running clock, if the time before this call counts too.
      description: what checkpoints say besides `Model.description` and the classes' names.
      lane: the devices of the run, if others run side by side.

    Raises ValueError or FileNotFoundError, with the remedy, for anything that doesn't fit.
    """
    with Watchdog(config.hang_minutes, lane.label):
        waits_for("data, workdir and agreement")
        return _prepare(config, workdir, load, clock or Clock(), description, lane)


def _prepare(
    config: TrainConfig,
    workdir: str,
    load: Callable[[Model, dict], dict] | None,
    clock: Clock,
    description: dict | None,
    lane: Lane,
) -> Run:
    config.metrics.check_packages()
    mesh = make_mesh(config.mesh, lane.devices)
    data = config.data
    source = open_data(data)
    if source.num_classes < 2 and not (source.labels_per_example or config.loss.masks_patches):
        name = "".join(source.class_names or ())
        raise InputError(
            f"{data.dataset or 'the mixture'} has one class, {name!r}: expected two or more"
        )
    config = config.weighed(source)
    training = build_training(config, mesh, source.num_classes, len(source))
    model = training.model
    evaluators = {
        name: make_evaluator(evaluator, model, mesh, config.objective)
        for name, evaluator in config.evaluators.items()
    }

    def batches(start_step: int) -> Iterator[dict[str, np.ndarray]]:
        return train_batches(
            source,
            data,
            batch_size=config.batch_size,
            image_size={stage.start: stage.model.image_size for stage in training.stages},
            seed=config.seed,
            start_step=start_step,
            rows=local_rows(mesh, config.batch_size),
        )

    batches(0).close()  # finds errors in the preprocessing now
    values, facts = dataclasses.asdict(config), describe_data(config, source)
    if training.teacher:
        training.teacher.check_classes(source.class_names)
        facts["teacher"] = training.teacher.fingerprint
    path, lock = open_workdir(workdir, config)
    check_agreement(
        {
            "config": hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16],
            "dataset": [len(source), source.num_classes],
            "examples to train on": digest({TRAIN: facts[TRAIN]}),
            "examples to evaluate on": digest(facts),
            "devices here": [jax.local_device_count(), jax.local_devices()[0].device_kind],
            "devices in all": jax.device_count(),
            "jax": jax.__version__,
            "newest checkpoint": max(saved_steps(path), default=0),
        }
    )
    check_shared(path)
    resumes, notes = _where_to_begin(path, training, facts)
    return Run(
        **vars(training),
        workdir=path,
        source=source,
        evaluators=evaluators,
        batches=batches,
        clock=clock,
        lane=lane,
        watched=config.watched,
        description={
            **model.description,
            **({"class_names": list(source.class_names)} if source.class_names else {}),
            **(description or {}),
        },
        loaded=load(model, training.shapes.params) if load and resumes is None else None,
        resumes=resumes,
        notes=[*training.advice, *notes],
        facts=facts,
        lock=lock,
    )


def _where_to_begin(
    workdir: Path, training: Training, facts: Facts
) -> tuple[Path | None, list[str]]:
    """Returns what to resume, checked, as `Run.resumes`, and notes about it."""

    def check() -> list[str]:
        check_same_data(workdir, facts)
        return check_newest(workdir, training.shapes)

    config, notes = training.config, []
    if saved_steps(workdir):
        notes = or_start_over(workdir, config, check)
    if saved_steps(workdir):
        return workdir, notes
    if not config.resume:
        return None, notes
    folder = find_checkpoint(config.resume)
    check_other(folder, training.shapes)
    return folder, notes
