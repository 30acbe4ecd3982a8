"""Transfer's recipe: TrainConfig, the checkpoint to start from, and the workflow around it."""

import dataclasses
from collections.abc import Mapping
from functools import cache
from typing import Any

import jax

from vit_jax import config as configuration
from vit_jax.classifier.splits import SplitConfig
from vit_jax.classifier.sweep import SweepConfig
from vit_jax.config import InputError
from vit_jax.evaluation.by_class import METRICS
from vit_jax.models.variants import ModelConfig
from vit_jax.training.recipe import TrainConfig
from vit_jax.weights import formats
from vit_jax.weights.adapt import DROP, REINITIALIZE
from vit_jax.weights.published import EMBEDDED
from vit_jax.weights.trained import TrainedModel, load

DOWNLOADED = "augreg:S/16"  # where to start on accelerators, if nothing is named


@dataclasses.dataclass(frozen=True)
class WorkflowConfig:
    """What is done around the training: splits, trials, one test, exports.

    Attributes:
      split: names of the parts, and what to cut where they are missing.
      sweep: the trials among which dev chooses; without values one trial of the recipe as it is.
      fit_memory: chooses microbatches and remat that fit the devices.
      memory_gib: what a step may take on a device, GiB; None: what the device says it has.
      export: names of `weights.formats.FORMATS` to write the model in.
      probe: whether a linear probe is among the trials, if there is a checkpoint to start from.
      metric: what dev chooses by: "accuracy", "balanced_accuracy" or "macro_f1".
      minutes: at most so long, by a step that is measured first; None: as long as it takes.
    """

    split: SplitConfig = SplitConfig()
    sweep: SweepConfig = SweepConfig()
    fit_memory: bool = False
    memory_gib: float | None = None
    export: tuple[str, ...] = ()
    probe: bool = False
    metric: str = "accuracy"
    minutes: float | None = None

    def __post_init__(self):
        if self.metric not in METRICS:
            raise configuration.unknown("metric", self.metric, METRICS)
        if self.minutes is not None and not 0 < self.minutes < float("inf"):
            raise InputError(f"workflow.minutes = {self.minutes}: expected more than 0")
        for name in self.export:
            if name not in formats.FORMATS:
                raise configuration.unknown("export format", name, formats.FORMATS)
        if self.memory_gib is not None and not self.fit_memory:
            raise InputError(
                f"workflow.memory_gib = {self.memory_gib} changes nothing without "
                "workflow.fit_memory: set fit_memory=True, too, or leave memory_gib out"
            )


@dataclasses.dataclass(frozen=True)
class TransferConfig(TrainConfig):
    """A recipe that starts from a checkpoint.

    Attributes:
      init: the checkpoint: whatever `weights.trained.load` reads. Empty: random weights.
      reinitialize: regexes of tensors that start from fresh values.
      drop: regexes of the checkpoint's tensors to leave out.
      head: what the head starts from: "zero", or "probe", a logistic regression on the frozen
        features of the training images.
      eval_preprocess: preprocessing of dev and test images, and of those to be labelled later.
      workflow: from the data to a report. None: train alone, on the splits that the recipe names.
    """

    init: str = ""
    reinitialize: tuple[str, ...] = REINITIALIZE
    drop: tuple[str, ...] = DROP
    head: str = "zero"
    eval_preprocess: str = "resize"
    workflow: WorkflowConfig | None = None

    @classmethod
    def upgrade(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Accepts the workflow's fields outside their group; without a `sweep` they did nothing."""
        values = configuration.with_workflow(super().upgrade(with_defaults(values)))
        if old := [name for name in configuration.WORKFLOW if name in values]:
            if "sweep" not in old:
                raise InputError(
                    f"{', '.join(old)}: part of a workflow, which this recipe has not. Set "
                    "workflow={...} with it, or leave it out"
                )
            values = {k: v for k, v in values.items() if k not in old}  # config.json of a trial
        return values

    def __post_init__(self):
        super().__post_init__()
        if self.head not in ("zero", "probe"):
            raise configuration.unknown("head", self.head, ("zero", "probe"))
        if self.head == "probe" and not self.init:
            raise InputError("head = 'probe' fits the features of a checkpoint: give one, init")


@cache
def load_init(path: str) -> TrainedModel:
    """Reads the checkpoint to start from, once for all trials."""
    return load(path)


def with_defaults(values: Mapping[str, Any], device: str | None = None) -> dict[str, Any]:
    """The recipe's fields, with what it leaves open taken from its own `defaults` for the device.

    `defaults` are {device: [(dotted field, value)]}: "accelerator", "cpu", and where no model is
    named "cpu_embedded" for a CPU with the embedded checkpoint, "cpu_scratch" without any. Warm-up
    and evaluations follow the steps. `device` is a name of `jax.default_backend()`; None: what
    there is; "earlier": those of all devices in earlier versions, where nothing followed.
    """
    values = {**values}
    if not (defaults := values.pop("defaults", None)):
        return values
    kind = "cpu" if (device or jax.default_backend()) == "cpu" else "accelerator"
    if kind == "cpu" and "variant" not in values.get("model", {}):
        kind = {"": "cpu_scratch", EMBEDDED: "cpu_embedded"}.get(values.get("init", ""), kind)
    default = dict(defaults[kind])
    steps = values.get("steps")
    if device != "earlier" and isinstance(steps, int):
        for name in ("schedule.warmup", "eval_every"):
            default[name] = max(1, default[name] * steps // default["steps"])
    for name, value in default.items():
        *groups, field = name.split(".")
        inner = values
        for group in groups:
            inner[group] = inner = dict(inner.get(group) or {})
        inner.setdefault(field, value)
    return values


def choose_init(values: Mapping[str, Any]) -> str:
    """The checkpoint to start from where the recipe names none: "" if it names a model.

    A recipe without `defaults` for the device is as it is.
    """
    if values.get("init") or "variant" in values.get("model", {}) or not values.get("defaults"):
        return values.get("init", "")
    return EMBEDDED if jax.default_backend() == "cpu" else DOWNLOADED


def complete(
    values: dict[str, Any], device: str | None = None, folded: bool = False
) -> dict[str, Any]:
    """The recipe's fields, with what it leaves open: see `with_defaults`, then the checkpoint's.

    `folded`: the model standardises pixels to [-1, 1], as in runs of earlier versions; the
    checkpoint's mean and deviation are folded into its weights.
    """
    values = with_defaults(values, device)
    if not (values["data"].get("dataset") or values["data"].get("mixture")):
        raise InputError("no images: say which, --config.data=FOLDER or the name of a dataset")
    model = dict(values.get("model", {}))
    if "variant" in model and "image_size" in values:
        return values
    if not values.get("init"):
        raise InputError(
            "no init, and the recipe names no model: give --config.init=CHECKPOINT, or both "
            "--config.model.variant and --config.image_size to start from random weights"
        )
    source = load_init(values["init"])
    if "variant" not in model:
        of_training = set(configuration.fields_where(ModelConfig, inherited=False))
        of_training |= {"mean", "std"} if folded else set()
        fields = dataclasses.asdict(source.config).items()
        model = {**{k: v for k, v in fields if k not in of_training}, **model}
    height, width = source.image_size
    if "image_size" not in values and height != width:
        raise InputError(
            f"{values['init']} is for images of {height} x {width}: say the side of the square "
            "ones to train on, --config.image_size"
        )
    return {"image_size": height, **values, "model": model}
