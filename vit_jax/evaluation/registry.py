"""The registry of evaluators: each file of `evaluation/protocols/` is a protocol of that name.

A protocol has a dataclass `Config`, a subclass of `EvaluatorConfig`, and a function `make(config,
model, mesh, objective)` that returns an `Evaluator`. A new protocol needs no other change.
"""

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from jax.sharding import Mesh

from vit_jax.config import unknown
from vit_jax.data.pipeline import DataConfig
from vit_jax.evaluation import protocols
from vit_jax.losses.classification import LossConfig
from vit_jax.losses.masked_patches import MaskedPatchConfig
from vit_jax.models.variants import Model

Objective = LossConfig | MaskedPatchConfig  # what the model was trained with
Evaluator = Callable[[dict], dict[str, float]]  # params -> {name: value}


@dataclasses.dataclass(frozen=True)
class EvaluatorConfig:
    """Fields of all evaluators; `protocol` selects the subclass."""

    data: DataConfig
    batch_size: int = 256
    protocol: str = ""

    @classmethod
    def select(cls, values: Mapping[str, Any]) -> type:
        """Returns the dataclass to build from a recipe's `values`."""
        return _module(values.get("protocol", "classification")).Config


def list_protocols() -> list[str]:
    """Returns the names of the protocols."""
    return sorted(module.name for module in pkgutil.iter_modules(protocols.__path__))


def make_evaluator(
    config: EvaluatorConfig, model: Model, mesh: Mesh, objective: Objective
) -> Evaluator:
    """Opens the data and returns the evaluator. Raises ValueError for data that don't fit."""
    protocol = config.protocol
    # A model trained on masked patches has no classifier, so its own objective is measured.
    if protocol == "classification" and isinstance(objective, MaskedPatchConfig):
        protocol = "masked_patches"
    return _module(protocol).make(config, model, mesh, objective)


def _module(protocol: str) -> ModuleType:
    if protocol not in (known := list_protocols()):
        raise unknown("protocol", protocol, known)
    return importlib.import_module(f"{protocols.__name__}.{protocol}")
