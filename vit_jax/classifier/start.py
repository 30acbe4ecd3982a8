"""A transfer's run: the parameters of a checkpoint, adapted to the recipe's model and classes."""

import dataclasses
import re
import threading
from collections.abc import Callable
from functools import cache

import numpy as np
from jax.sharding import Mesh

from vit_jax.classifier.recipe import TransferConfig, load_init
from vit_jax.config import InputError
from vit_jax.evaluation.features import make_batches, make_extractor, open_single_label
from vit_jax.evaluation.protocols.linear import L2, probe_head
from vit_jax.models import names
from vit_jax.models.stacking import flatten, unflatten
from vit_jax.models.variants import Model
from vit_jax.parallel.lanes import ALONE, Lane
from vit_jax.parallel.mesh import make_mesh, put_tree, state_shardings, use_mesh
from vit_jax.training import loop
from vit_jax.training.clock import Clock
from vit_jax.weights.adapt import adapt, fold_standardisation
from vit_jax.weights.preprocessing import MEAN, STD
from vit_jax.weights.trained import TrainedModel

_CHANGE_NOTHING = f"{names.HEAD}|{names.ADAPTERS}"  # in the features, at first
_LOADING = threading.Lock()  # trials that go side by side download and read it once


def prepare(
    config: TransferConfig,
    workdir: str,
    clock: Clock | None = None,
    lane: Lane = ALONE,
    temperature: float | None = None,
    head: Callable[[], dict] | None = None,
) -> loop.Run:
    """As `loop.prepare`, with the parameters of `config.init`.

    The checkpoints say the preprocessing of images to be labelled and, if one is given, the
    temperature that divides the logits. `head` returns the parameters of a head that is fitted
    already, for a run that begins.
    """
    extra = {"preprocess": config.eval_preprocess}
    if temperature is not None:
        extra["temperature"] = temperature
    if not config.init:
        return loop.prepare(config, workdir, None, clock, extra, lane)

    def load(model: Model, shapes: dict) -> dict:
        adapted = load_adapted(config, model, shapes)
        if head is not None:
            return {**adapted, "head": head()}
        if config.head == "probe":
            adapted = with_probed_head(config, model, adapted, make_mesh(config.mesh, lane.devices))
        return adapted

    return loop.prepare(config, workdir, load, clock, extra, lane)


# Options that no tensor's name or shape would betray.
_HIDDEN = (
    *("mlp", "norm_epsilon", "zero_padded_pool", "mean", "std"),
    *("rotary", "rotary_base", "rotary_reference", "rotary_offset"),
)


def _as_standardised_here(source: TrainedModel, model: Model) -> TrainedModel:
    """Folds the checkpoint's mean and deviation of pixels into it, if the model has the default."""
    default = {"mean": MEAN, "std": STD}
    theirs = {name: tuple(getattr(source.config, name)) for name in default}
    ours = {name: tuple(getattr(model.config, name)) for name in default}
    if theirs == ours or ours != default or "embedding" not in source.params:
        return source
    if model.config.stages is not None:
        return source
    config = dataclasses.replace(source.config, **default)
    architecture = dataclasses.replace(source.architecture, config=config)
    params = fold_standardisation(source.params, **theirs)
    return dataclasses.replace(source, params=params, architecture=architecture)


def load_adapted(config: TransferConfig, model: Model, shapes: dict) -> dict:
    """The parameters of `config.init`, adapted to the model: arrays, shapes for fresh ones.

    Raises ValueError if the model computes otherwise than the checkpoint's.
    """
    with _LOADING:
        source = load_init(config.init)
    source = _as_standardised_here(source, model)
    for name in _HIDDEN:
        there, here = getattr(source.config, name), getattr(model.config, name)
        if there != here:
            raise InputError(
                f"{config.init} was trained with {name} = {there!r}, the recipe's model has "
                f"{here!r}: set --config.model.{name}={there}"
            )
    adapted, report = adapt(
        source.params,
        shapes,
        grid=model.grid,
        source_grid=source.architecture.grid,
        reinitialize=config.reinitialize + (names.ADAPTERS,) * bool(model.config.lora_rank),
        drop=config.drop,
        method=source.config.position_resize,
    )
    _say_once(f"{config.init}:\n{report}")
    return adapted


@cache
def _say_once(text: str) -> None:
    """Prints what each trial would say again."""
    print(text)


def fresh_besides_head(params: dict) -> list[str]:
    """The names of parameters that aren't loaded, without those that change no features.

    These are the head's, and LoRA's adapters.
    """
    fresh = {name for name, leaf in flatten(params).items() if not isinstance(leaf, np.ndarray)}
    return sorted(name for name in fresh if not re.fullmatch(_CHANGE_NOTHING, name))


def place_frozen(config: TransferConfig, params: dict, mesh: Mesh) -> dict:
    """The parameters on the mesh with a head, and adapters, of zeros, to compute features.

    ValueError if others are fresh: their features mean nothing.
    """
    if other := fresh_besides_head(params):
        raise InputError(f"head = 'probe': {', '.join(other)} are fresh, there is nothing to probe")
    params = unflatten(
        {
            name: np.zeros(leaf.shape, leaf.dtype) if re.fullmatch(_CHANGE_NOTHING, name) else leaf
            for name, leaf in flatten(params).items()
        }
    )
    return put_tree(params, state_shardings(mesh, config.mesh, params))


def with_probed_head(config: TransferConfig, model: Model, params: dict, mesh: Mesh) -> dict:
    """The parameters with a head that was fitted to their features of the training images."""
    data = dataclasses.replace(config.data, preprocess=config.eval_preprocess)
    batches = make_batches(open_single_label(data), data, model, mesh, config.batch_size)
    with use_mesh(mesh):
        placed = place_frozen(config, params, mesh)
        features, labels = make_extractor(model, mesh)(placed, batches)
    kernel, bias, l2 = probe_head(features, labels, model.num_classes, L2, config.seed)
    print(f"head: logistic regression on {len(labels)} images, l2 {l2:g}")
    return {**params, "head": {"kernel": kernel, "bias": bias}}
