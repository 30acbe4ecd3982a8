"""Loss and accuracy of masked patch prediction over a whole dataset."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vit_jax.data.pipeline import open_data
from vit_jax.evaluation.features import make_batches
from vit_jax.evaluation.registry import EvaluatorConfig
from vit_jax.losses.masked_patches import MaskedPatchConfig, masked_patch_losses
from vit_jax.models.variants import Model
from vit_jax.parallel.mesh import replicated


@dataclasses.dataclass(frozen=True)
class Config(EvaluatorConfig):
    """The dataset to evaluate on; its labels aren't used."""

    protocol: str = "masked_patches"


def make(
    config: Config, model: Model, mesh: Mesh, masked: MaskedPatchConfig
) -> Callable[[dict], dict[str, float]]:
    """Returns params -> {"accuracy": of corrupted patches, "loss": mean, "examples": count}.

    The corruption depends only on an image's index, so that evaluations are comparable.
    """
    source = open_data(config.data)
    batches = make_batches(source, config.data, model, mesh, config.batch_size)

    def count(params, batch):
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), batch["index"])
        images = batch["image"]
        losses, right, _ = masked_patch_losses(masked, model, params, images, keys, train=False)
        mask = batch["mask"]
        return {
            "loss": jnp.where(mask, losses, 0.0).sum(),
            "accuracy": jnp.where(mask, right, 0.0).sum(),
            "examples": mask.sum(),
        }

    count = jax.jit(count, out_shardings=replicated(mesh))

    def evaluate(params: dict) -> dict[str, float]:
        counts = [jax.device_get(count(params, batch)) for batch in batches()]
        totals = {key: float(sum(c[key].astype(np.float64) for c in counts)) for key in counts[0]}
        examples = totals.pop("examples")
        means = {name: total / examples for name, total in totals.items()}
        return {**means, "examples": int(examples)}

    return evaluate
