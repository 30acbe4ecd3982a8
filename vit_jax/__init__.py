"""Vision Transformers in JAX: pretraining at scale, transfer, and the paper's scaling plots.

    model = vit_jax.load("runs/mine")      # a workdir, checkpoint, foreign file, published name
    model.logits(images)                   # uint8 [B, H, W, 3] -> float32 [B, C]
    model.predict(["a.jpg", "b.png"])      # classes with probabilities

Importing the package is instant: jax is imported when a function is first used.
"""

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from vit_jax.classifier.workflow import transfer as transfer
    from vit_jax.data.preparation import PreparedDataset as PreparedDataset
    from vit_jax.data.preparation import prepare as prepare
    from vit_jax.evaluation.measure import Evaluation as Evaluation
    from vit_jax.evaluation.measure import evaluate as evaluate
    from vit_jax.models.variants import list_models as list_models
    from vit_jax.recipes import list_recipes as list_recipes
    from vit_jax.recipes import recipe as recipe
    from vit_jax.training.loop import pretrain as pretrain
    from vit_jax.training.plan import Plan as Plan
    from vit_jax.training.plan import plan as plan
    from vit_jax.training.result import Trained as Trained
    from vit_jax.weights.published import list_checkpoints as list_checkpoints
    from vit_jax.weights.trained import Prediction as Prediction
    from vit_jax.weights.trained import TrainedModel as TrainedModel
    from vit_jax.weights.trained import create_model as create_model
    from vit_jax.weights.trained import load as load

_HOMES = {  # public name -> its module
    "Evaluation": "evaluation.measure",
    "Plan": "training.plan",
    "Prediction": "weights.trained",
    "PreparedDataset": "data.preparation",
    "Trained": "training.result",
    "TrainedModel": "weights.trained",
    "create_model": "weights.trained",
    "evaluate": "evaluation.measure",
    "list_checkpoints": "weights.published",
    "list_models": "models.variants",
    "list_recipes": "recipes",
    "load": "weights.trained",
    "plan": "training.plan",
    "prepare": "data.preparation",
    "pretrain": "training.loop",
    "recipe": "recipes",
    "transfer": "classifier.workflow",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'vit_jax' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"vit_jax.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(types.ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        # Importing the command `vit_jax.pretrain` must not hide the function of that name.
        if name not in _HOMES or not isinstance(value, types.ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
