"""Runs a model over whole datasets: batches on the mesh, and frozen features."""

from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np
from jax.sharding import Mesh

from vit_jax.config import InputError
from vit_jax.data.pipeline import DataConfig, eval_batches, open_data
from vit_jax.data.sources import Source
from vit_jax.models.variants import Model
from vit_jax.parallel.mesh import check_batch_size, local_rows, put_batch, replicated
from vit_jax.parallel.watchdog import waits_for

Batches = Callable[[], Iterator[dict[str, jax.Array]]]


def make_batches(
    source: Source, data: DataConfig, model: Model, mesh: Mesh, batch_size: int
) -> Batches:
    """Returns a function that iterates over the dataset in global batches of `eval_batches`.

    Raises ValueError at once for a batch size that doesn't divide or invalid preprocessing, not at
    the first evaluation hours later.
    """
    check_batch_size(batch_size, mesh)

    def read() -> Iterator[dict[str, np.ndarray]]:
        return eval_batches(
            source,
            data,
            batch_size=batch_size,
            image_size=model.image_size,
            rows=local_rows(mesh, batch_size),
        )

    def batches() -> Iterator[dict[str, jax.Array]]:
        for number, batch in enumerate(read()):
            waits_for(f"batch {number} of an evaluation or the next")
            yield put_batch(mesh, batch)

    read().close()
    return batches


def make_extractor(
    model: Model, mesh: Mesh, output: str = "features"
) -> Callable[[dict, Batches], tuple[np.ndarray, np.ndarray]]:
    """Returns a function (params, batches) -> (outputs, labels), in dataset order.

    `output`: "features", the head's input, or "logits". Outputs are float32 [N, D], labels [N] or
    [N, K]. Every process gets all of them.
    """

    def forward(params, batch):
        outputs = getattr(model.apply(params, batch["image"]), output)
        return outputs, batch["label"], batch["mask"]

    forward = jax.jit(forward, out_shardings=replicated(mesh))

    def extract(params: dict, batches: Batches) -> tuple[np.ndarray, np.ndarray]:
        found = [jax.device_get(forward(params, batch)) for batch in batches()]
        outputs = np.concatenate([values[mask] for values, _, mask in found])
        labels = np.concatenate([label[mask] for _, label, mask in found])
        return outputs, labels

    return extract


def extract_split(
    sources: Mapping[str, Source], data: DataConfig, model: Model, mesh: Mesh, batch_size: int
) -> Callable[[dict, str], tuple[np.ndarray, np.ndarray]]:
    """Returns a function (params, name in `sources`) -> (features [N, D], labels [N])."""
    batches = {
        name: make_batches(source, data, model, mesh, batch_size)
        for name, source in sources.items()
    }
    extract = make_extractor(model, mesh)
    return lambda params, name: extract(params, batches[name])


def open_single_label(data: DataConfig) -> Source:
    """Opens a dataset; raises ValueError if its examples have several labels."""
    source = open_data(data)
    if source.labels_per_example is not None:
        raise InputError(
            f"{data.dataset} has several labels per image, this protocol needs one: use "
            "--protocol=classification"
        )
    return source
