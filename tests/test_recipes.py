"""Every shipped recipe builds at full size, and takes two steps reduced."""

import importlib.util
from pathlib import Path

import jax
import pytest

from vit_jax.config import build
from vit_jax.models.variants import build_model
from vit_jax.training import loop
from vit_jax.training.metrics import read_metrics
from vit_jax.transfer import TransferConfig

CONFIGS = Path(__file__).parent.parent / "configs"
# What may stand behind the colon, beside nothing.
ARGUMENTS = {
    "pretrain/formula.py": ["dataset=fractals"],
    "pretrain/masked.py": ["target=colors_4x4"],
    "pretrain/paper.py": ["ViT-L/16,dataset=imagenet21k"],
    "transfer/digits.py": [],
    "transfer/folder.py": ["adamw,size=384"],
    "transfer/paper.py": ["cifar100", "imagenet2012", "oxford_iiit_pet", "oxford_flowers102"],
}


def recipes():
    for path in sorted(CONFIGS.rglob("*.py")):
        name = path.relative_to(CONFIGS).as_posix()
        for argument in (None, *ARGUMENTS[name]):
            yield pytest.param(path, argument, id=f"{name}:{argument or ''}")


def load(path, argument):
    spec = importlib.util.spec_from_file_location("recipe", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    values = module.get_config(argument).to_dict()
    values["data"]["dataset"] = values["data"]["dataset"] or "digits"
    if "variant" not in values["model"]:  # which the checkpoint says
        values = {"image_size": 224, **values, "model": {**values["model"], "variant": "ViT-B/16"}}
    return values


def reduce(values):
    """The same recipe, small: few, narrow layers, few small images of an embedded set."""
    patch = int(values["model"]["variant"].split("/")[1])
    size = {"width": 32, "depth": 2, "mlp_dim": 64, "num_heads": 2}
    values["model"].update(size)
    if "representation_size" in values["model"]:
        values["model"]["representation_size"] = 32
    values["image_size"] = 2 * patch
    values["batch_size"] = 8
    values["steps"] = 2
    values.pop("epochs", None)
    values["schedule"]["warmup"] = 1
    values["data"].update(dataset="strokes/4", split="train[:100]")
    for evaluation in values.get("classification", {}).values():
        evaluation["data"].update(dataset="strokes/4", split="validation[:12]")
        evaluation["batch_size"] = 8
    return values


@pytest.mark.parametrize(("path", "argument"), list(recipes()))
def test_recipe(path, argument, tmp_path):
    kind = {"pretrain": loop.TrainConfig, "transfer": TransferConfig}[path.parent.name]
    config = build(kind, load(path, argument))
    model = build_model(config.model, 1000, (config.image_size, config.image_size))
    jax.eval_shape(model.init, jax.random.key(0))

    config = build(kind, reduce(load(path, argument)))
    final = loop.train(loop.prepare(config, str(tmp_path)))
    assert final["step"] == 2
    assert all(f"{name}/accuracy" in final for name in config.classification)
    assert read_metrics(tmp_path)


def test_every_recipe_says_how_to_run_it():
    for path in CONFIGS.rglob("*.py"):
        name = path.relative_to(CONFIGS).as_posix()
        command = "python -m vit_jax." + name.split("/")[0]
        assert f"{command} --config=configs/{name}" in path.read_text()
