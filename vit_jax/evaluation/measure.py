"""Evaluates a trained model on a dataset with any protocol of the registry."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from jax.sharding import Mesh

from vit_jax.config import InputError, unknown
from vit_jax.data.pipeline import DataConfig
from vit_jax.data.sources import open_source
from vit_jax.evaluation.calibration import fit_temperature
from vit_jax.evaluation.features import make_batches, make_extractor, open_single_label
from vit_jax.evaluation.intervals import accuracy_interval
from vit_jax.evaluation.protocols.classification import check_class_names
from vit_jax.evaluation.registry import EvaluatorConfig, make_evaluator
from vit_jax.losses.classification import LossConfig
from vit_jax.parallel.mesh import MeshConfig, make_mesh, put_tree, state_shardings, use_mesh
from vit_jax.weights.trained import TrainedModel, load


@dataclasses.dataclass(frozen=True)
class Evaluation(Mapping):
    """The results of an evaluation: a mapping from names, such as "accuracy", to values."""

    model: str
    dataset: str
    split: str
    protocol: str
    values: dict[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.values)

    def __len__(self) -> int:
        return len(self.values)


def evaluate(
    model: TrainedModel | str,
    dataset: str,
    protocol: str = "classification",
    *,
    split: str = "test",
    train_split: str = "train",
    dev_split: str | None = None,
    preprocess: str | None = None,
    data_dir: str | None = None,
    batch_size: int = 256,
    loss: str = "softmax",
    mesh: Mesh | None = None,
    **options: Any,
) -> Evaluation:
    """Evaluates a model on a dataset.

    Args:
      model: a model, or anything that `load` reads.
      dataset: a name or a path, as a recipe's `data.dataset`.
      protocol: "classification" evaluates the model's own head. "fewshot", "knn" and "linear"
        evaluate its frozen features.
      split: split to measure on.
      train_split: split to fit on (fewshot, knn, linear).
      dev_split: split to choose l2 on (fewshot, linear) or to fit a temperature on
        (classification).
      preprocess: as a recipe's `data.preprocess`; by default the model's own.
      data_dir: folder of prepared datasets.
      batch_size: images per batch, over all processes.
      loss: loss that classification reports, "softmax" or "sigmoid".
      mesh: by default all devices of all processes.
      **options: other fields of the protocol's `Config`.

    Raises:
      ValueError: a dataset, option or class names that don't fit the model.
    """
    model = model if isinstance(model, TrainedModel) else load(model)
    mesh = mesh or make_mesh(MeshConfig())
    head = protocol == "classification"
    preprocess = preprocess or model.preprocessing
    data = DataConfig(dataset, split if head else train_split, preprocess, data_dir)
    fields = {"protocol": protocol, "data": data, "batch_size": batch_size, **options}
    config_type = EvaluatorConfig.select(fields)
    known = {field.name for field in dataclasses.fields(config_type)}
    if not head:
        fields["test_split"] = split
        if "dev_split" in known:
            fields["dev_split"] = dev_split
        elif dev_split:
            raise InputError(f"dev_split = {dev_split!r}: {protocol} doesn't use a dev split")
    if strange := sorted(options.keys() - known):
        raise unknown(f"option of {protocol}", strange[0], known - {"protocol", "data"})
    config = config_type(**fields)
    if head:
        source = open_source(dataset, split, data_dir)
        check_class_names(model.names, source.class_names or ())
    evaluator = make_evaluator(config, model.architecture, mesh, LossConfig(loss))
    with use_mesh(mesh):
        params = put_tree(model.params, state_shardings(mesh, MeshConfig(), model.params))
        values = evaluator(params)
        if head:
            correct = round(values["accuracy"] * values["examples"])
            values["accuracy_interval"] = accuracy_interval(correct, values["examples"])
        if head and dev_split:
            dev = dataclasses.replace(data, split=dev_split)
            batches = make_batches(
                open_single_label(dev), dev, model.architecture, mesh, batch_size
            )
            temperature = fit_temperature(
                *make_extractor(model.architecture, mesh, "logits")(params, batches)
            )
            at_temperature = dataclasses.replace(config, temperature=temperature)
            scaled = make_evaluator(at_temperature, model.architecture, mesh, LossConfig(loss))
            found = scaled(params)
            values["temperature"] = temperature
            values |= {f"{name}_at_temperature": found[name] for name in ("loss", "ece")}
    return Evaluation(model.origin, dataset, split, protocol, values)
