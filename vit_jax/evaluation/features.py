"""Frozen representations of a whole dataset."""

from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh

from vit_jax.data.pipeline import DataConfig, eval_batches
from vit_jax.data.sources import Source
from vit_jax.models.variants import Model
from vit_jax.parallel.mesh import check_batch_size, local_rows, put_batch, replicated


def make_extractor(
    model: Model, mesh: Mesh, batch_size: int
) -> Callable[[dict, Source, DataConfig], tuple[np.ndarray, np.ndarray]]:
    """(params, source, data) -> (features float32 [N, D], labels [N] or [N, K]), in dataset order.

    Every process gets all of them.
    """
    check_batch_size(batch_size, mesh)

    def forward(params, batch):
        return model.apply(params, batch["image"]).features, batch["label"], batch["mask"]

    forward = jax.jit(forward, out_shardings=replicated(mesh))

    def extract(params: dict, source: Source, data: DataConfig) -> tuple[np.ndarray, np.ndarray]:
        batches = eval_batches(
            source,
            data,
            batch_size=batch_size,
            image_size=model.image_size,
            rows=local_rows(mesh, batch_size),
        )
        found = [jax.device_get(forward(params, put_batch(mesh, batch))) for batch in batches]
        features = np.concatenate([f[mask] for f, _, mask in found])
        labels = np.concatenate([label[mask] for _, label, mask in found])
        return features, labels

    return extract
