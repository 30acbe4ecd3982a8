r"""Measures a checkpoint on a dataset; prints the result as JSON.

python -m vit_jax.evaluate --checkpoint=runs/digits --dataset=digits
python -m vit_jax.evaluate --checkpoint=runs/strokes --dataset=digits --protocol=fewshot \
    --l2=1,32,1024
python -m vit_jax.evaluate --checkpoint=runs/strokes --dataset=digits --protocol=linear

The protocols: `classification` counts what the model's own head predicts, with images of several
labels as in ImageNet-ReaL (--dataset=imagenet2012_real) and, with --only_present, ImageNet-A and
-R; ImageNet-V2 needs nothing special. The others look at frozen features: `fewshot` least squares,
`knn` nearest neighbours, `linear` logistic regression. What they choose they choose on
--dev_split, or on a part of --train_split that they hold out.
"""

import json
from collections.abc import Callable

import jax
from absl import app, flags
from jax.sharding import Mesh

from vit_jax import config as configuration
from vit_jax.data.pipeline import DataConfig
from vit_jax.data.sources import open_source
from vit_jax.evaluation.calibration import fit_temperature
from vit_jax.evaluation.features import make_batches, make_extractor, open_single_label
from vit_jax.evaluation.intervals import accuracy_interval
from vit_jax.evaluation.protocols.classification import (
    ClassificationConfig,
    check_class_names,
    make_classification,
)
from vit_jax.evaluation.protocols.fewshot import FewshotConfig, make_fewshot
from vit_jax.evaluation.protocols.knn import KnnConfig, make_knn
from vit_jax.evaluation.protocols.linear import ProbeConfig, make_probe
from vit_jax.losses.classification import LossConfig
from vit_jax.models.variants import Model, described_model
from vit_jax.parallel import multihost
from vit_jax.parallel.mesh import MeshConfig, make_mesh, put_tree, state_shardings, use_mesh
from vit_jax.training.checkpoint import load_checkpoint

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "A run's workdir, or any checkpoint.")
DATASET = flags.DEFINE_string("dataset", None, "Name, as in a recipe's data.dataset.")
PROTOCOL = flags.DEFINE_enum(
    "protocol",
    "classification",
    ["classification", "fewshot", "knn", "linear"],
    "classification: the model's own head. The others: its features, and the training split.",
)
SPLIT = flags.DEFINE_string("split", "test", "Split on which accuracy is measured.")
TRAIN_SPLIT = flags.DEFINE_string("train_split", "train", "Split to learn from, not for the head.")
DEV_SPLIT = flags.DEFINE_string(
    "dev_split", None, "Split to choose l2 on; for classification, to fit a temperature on."
)
PREPROCESS = flags.DEFINE_string("preprocess", "resize", "As in a recipe's data.preprocess.")
DATA_DIR = flags.DEFINE_string("data_dir", None, "Where prepared datasets lie.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 256, "Images at a time, of all processes.")
ONLY_PRESENT = flags.DEFINE_bool(
    "only_present", False, "Predict among the split's own classes alone (classification)."
)
SHOTS = flags.DEFINE_list("shots", ["1", "5", "10", "25"], "Examples of each class (fewshot).")
SEEDS = flags.DEFINE_integer("seeds", 3, "Draws of the shots to average over (fewshot).")
L2 = flags.DEFINE_list(
    "l2", None, "Penalties to choose from: 1024 by default (fewshot), 1e-6 to 1e2 (linear)."
)
NEIGHBOURS = flags.DEFINE_list("neighbours", ["1", "10", "20"], "How many (knn).")
RANDOM = flags.DEFINE_bool(
    "random_weights", False, "Measure fresh weights of the checkpoint's architecture: a baseline."
)
SEED = flags.DEFINE_integer("seed", 0, "Of --random_weights and of a held-out part.")
LOSS = flags.DEFINE_enum("loss", "softmax", ["softmax", "sigmoid"], "The loss to report.")
OUTPUT = flags.DEFINE_string("output", None, "File for the result, as well as the terminal.")
DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Join the other processes of a cluster.")
flags.mark_flags_as_required(["checkpoint", "dataset"])


def make_evaluator(
    model: Model, mesh: Mesh, class_names: list[str]
) -> Callable[[dict], dict[str, float]]:
    """What the flags ask for: params -> the result. `class_names`: the checkpoint's, if known."""
    split = SPLIT.value if PROTOCOL.value == "classification" else TRAIN_SPLIT.value
    data = DataConfig(DATASET.value, split, PREPROCESS.value, DATA_DIR.value)
    frozen = {"data": data, "test_split": SPLIT.value, "batch_size": BATCH_SIZE.value}
    penalties = {"l2": numbers("l2", L2.value, float)} if L2.value else {}
    match PROTOCOL.value:
        case "classification":
            source = open_source(data.dataset, data.split, data.data_dir)
            check_class_names(class_names, source.class_names or ())
            return make_calibrated(data, model, mesh)
        case "fewshot":
            shots = numbers("shots", SHOTS.value, int)
            config = FewshotConfig(
                **frozen, shots=shots, seeds=SEEDS.value, dev_split=DEV_SPLIT.value, **penalties
            )
            return make_fewshot(config, model, mesh)
        case "knn":
            neighbours = numbers("neighbours", NEIGHBOURS.value, int)
            return make_knn(KnnConfig(**frozen, neighbours=neighbours), model, mesh)
        case "linear":
            config = ProbeConfig(**frozen, dev_split=DEV_SPLIT.value, seed=SEED.value, **penalties)
            return make_probe(config, model, mesh)


def make_calibrated(data: DataConfig, model: Model, mesh: Mesh) -> Callable[[dict], dict]:
    """Classification; with a dev split also at the temperature that fits there."""
    kinds = {"batch_size": BATCH_SIZE.value, "only_present": ONLY_PRESENT.value}
    loss = LossConfig(LOSS.value)
    evaluator = make_classification(ClassificationConfig(data, **kinds), model, mesh, loss)
    if DEV_SPLIT.value:
        dev = DataConfig(DATASET.value, DEV_SPLIT.value, PREPROCESS.value, DATA_DIR.value)
        dev_batches = make_batches(open_single_label(dev), dev, model, mesh, BATCH_SIZE.value)

    def evaluate(params: dict) -> dict[str, float]:
        result = evaluator(params)
        correct = round(result["accuracy"] * result["examples"])
        result["accuracy_interval"] = accuracy_interval(correct, result["examples"])
        if DEV_SPLIT.value:
            temperature = fit_temperature(
                *make_extractor(model, mesh, "logits")(params, dev_batches)
            )
            config = ClassificationConfig(data, temperature=temperature, **kinds)
            scaled = make_classification(config, model, mesh, loss)(params)
            result["temperature"] = temperature
            result |= {f"{name}_at_temperature": scaled[name] for name in ("loss", "ece")}
        return result

    return evaluate


def numbers(name: str, texts: list[str], kind: type) -> tuple:
    """The values of a flag that lists numbers."""
    try:
        return tuple(map(kind, texts))
    except ValueError as error:
        raise ValueError(f"--{name}={','.join(texts)}: expected numbers, {error}") from error


def evaluate() -> dict[str, float]:
    """The result that the flags ask for."""
    mesh = make_mesh(MeshConfig())
    params, description = load_checkpoint(CHECKPOINT.value)
    model = described_model(description)
    if RANDOM.value:
        params = jax.device_get(jax.jit(model.init)(jax.random.key(SEED.value)))
    evaluator = make_evaluator(model, mesh, description.get("class_names", []))
    with use_mesh(mesh):
        return evaluator(put_tree(params, state_shardings(mesh, MeshConfig(), params)))


def main(_) -> None:
    """Prints the result, and writes it where --output says."""
    with configuration.explained_errors():
        multihost.initialize(DISTRIBUTED.value)
        result = json.dumps(evaluate(), indent=2)
        if multihost.is_main():
            print(result)
            if OUTPUT.value:
                with open(OUTPUT.value, "w") as file:
                    file.write(result + "\n")


if __name__ == "__main__":
    app.run(main, flags_parser=configuration.parse_flags)
