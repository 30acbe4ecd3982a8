"""Measures a checkpoint on a dataset; prints the result as JSON.

python -m vit_jax.evaluate --checkpoint=runs/strokes --protocol=fewshot --dataset=digits
python -m vit_jax.evaluate --checkpoint=runs/digits --protocol=classification --dataset=digits
"""

import json

import jax
from absl import app, flags

from vit_jax import config as configuration
from vit_jax.data.pipeline import DataConfig
from vit_jax.evaluation.classification import ClassificationConfig, make_classification
from vit_jax.evaluation.fewshot import FewshotConfig, make_fewshot
from vit_jax.models.variants import described_model
from vit_jax.parallel import multihost
from vit_jax.parallel.mesh import MeshConfig, make_mesh, put_tree, state_shardings, use_mesh
from vit_jax.training.checkpoint import load_checkpoint
from vit_jax.training.step import LossConfig

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "A run's workdir, or a checkpoint's folder.")
DATASET = flags.DEFINE_string("dataset", None, "Name, as in a recipe's data.dataset.")
PROTOCOL = flags.DEFINE_enum(
    "protocol",
    "classification",
    ["classification", "fewshot"],
    "classification: accuracy of the model's own head. fewshot: least squares on its features.",
)
SPLIT = flags.DEFINE_string("split", "test", "Split on which accuracy is measured.")
TRAIN_SPLIT = flags.DEFINE_string("train_split", "train", "Split from which shots are drawn.")
PREPROCESS = flags.DEFINE_string("preprocess", "resize", "As in a recipe's data.preprocess.")
DATA_DIR = flags.DEFINE_string("data_dir", None, "Where prepared datasets lie.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 256, "Images at a time, of all processes.")
SHOTS = flags.DEFINE_list("shots", ["1", "5", "10", "25"], "Examples of each class (fewshot).")
SEEDS = flags.DEFINE_integer("seeds", 3, "Draws of the shots to average over (fewshot).")
L2 = flags.DEFINE_float("l2", 1024.0, "Ridge penalty (fewshot).")
RANDOM = flags.DEFINE_bool(
    "random_weights", False, "Measure fresh weights of the checkpoint's architecture: a baseline."
)
SEED = flags.DEFINE_integer("seed", 0, "Of --random_weights.")
LOSS = flags.DEFINE_enum("loss", "softmax", ["softmax", "sigmoid"], "The loss to report.")
OUTPUT = flags.DEFINE_string("output", None, "File for the result, as well as the terminal.")
DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Join the other processes of a cluster.")
flags.mark_flags_as_required(["checkpoint", "dataset"])


def evaluate() -> dict[str, float]:
    """The result that the flags ask for."""
    mesh = make_mesh(MeshConfig())
    params, description = load_checkpoint(CHECKPOINT.value)
    model = described_model(description)
    if RANDOM.value:
        params = jax.device_get(jax.jit(model.init)(jax.random.key(SEED.value)))

    split = TRAIN_SPLIT.value if PROTOCOL.value == "fewshot" else SPLIT.value
    data = DataConfig(DATASET.value, split, PREPROCESS.value, DATA_DIR.value)
    if PROTOCOL.value == "fewshot":
        config = FewshotConfig(
            data=data,
            test_split=SPLIT.value,
            shots=tuple(map(int, SHOTS.value)),
            seeds=SEEDS.value,
            l2=L2.value,
            batch_size=BATCH_SIZE.value,
        )
        evaluator = make_fewshot(config, model, mesh)
    else:
        config = ClassificationConfig(data, BATCH_SIZE.value)
        evaluator = make_classification(config, model, mesh, LossConfig(LOSS.value))
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
