"""Every shipped recipe builds at full size and trains for two steps at a reduced size."""

import dataclasses
import importlib.util
from pathlib import Path

import jax
import pytest

from vit_jax.classifier.recipe import TransferConfig
from vit_jax.config import build
from vit_jax.data.augment import parse_preprocess
from vit_jax.data.pipeline import dataset_size, open_data
from vit_jax.models.variants import build_model
from vit_jax.parallel.lanes import Lane
from vit_jax.parallel.mesh import make_mesh
from vit_jax.training import loop
from vit_jax.training.metrics import read_metrics
from vit_jax.training.optimizer import make_optimizer, make_schedule
from vit_jax.training.recipe import build_training
from vit_jax.training.stages import build_stages

CONFIGS = Path(__file__).parent.parent / "configs"
# What may stand behind the colon: beside nothing, which also trains for two steps, arguments that
# train too, and those that are built alone.
TRAINED = {
    "pretrain/better_plain_vit.py": ["half=True"],
    "pretrain/jft.py": ["R50+ViT-L/32,epochs=14"],
    "pretrain/masked.py": ["target=colors_4x4"],
    "pretrain/rehearsal.py": ["L/16,steps=2"],
    "transfer/bit_hyperrule.py": ["50000,small=True,flip=False"],
    "transfer/folder.py": ["adamw,size=384,train=attention,augment=light,patience=2"],
}
BUILT = {
    "pretrain/augreg.py": [
        "ViT-Ti/16,dataset=imagenet21k",
        "R+Ti/16,augmentation=strong2,regularization=0.1,weight_decay=0.03",
        "R50+L/32,dataset=imagenet21k,epochs=30",
        "ViT-B/16,half=True",
    ],
    "pretrain/better_plain_vit.py": ["epochs=300"],
    "pretrain/bit.py": ["R101x1,dataset=imagenet21k", "R152x2,dataset=my_set"],
    "pretrain/formula.py": ["dataset=fractals"],
    "pretrain/jft.py": ["ViT-H/14"],
    "pretrain/paper.py": [
        "ViT-L/16,dataset=imagenet21k",
        "R50+ViT-B/16,dataset=imagenet21k",
        "ViT-H/14",
        "ViT-L/16,dataset=imagenet21k,half=True",
    ],
    "pretrain/scaling_vit.py": ["ViT-G/14"],
    "transfer/folder.py": ["train=lora,rank=4"],
    "transfer/paper.py": [
        *("cifar100", "imagenet2012", "oxford_iiit_pet", "oxford_flowers102"),
        "imagenet2012,variant=ViT-H/14,size=518,ema=0.9999,sweep=True",
    ],
    "transfer/vtab.py": ["clevr_count"],
}


def recipes(arguments):
    for path in sorted(CONFIGS.rglob("*.py")):
        name = path.relative_to(CONFIGS).as_posix()
        for argument in arguments(name):
            yield pytest.param(path, argument, id=f"{name}:{argument or ''}")


def load(path, argument):
    spec = importlib.util.spec_from_file_location("recipe", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    values = module.get_config(argument).to_dict()
    values["data"]["dataset"] = values["data"]["dataset"] or "digits"
    if "variant" not in values["model"]:  # which the checkpoint says
        variant = "R50x1" if path.stem == "bit_hyperrule" else "ViT-B/16"
        values = {"image_size": 224, **values, "model": {**values["model"], "variant": variant}}
    return values


def reduce(values):
    """Reduces a recipe: few narrow layers, few small images of an embedded dataset."""
    model = values["model"]
    if "/" in model["variant"]:
        model.update({"width": 32, "depth": 1, "mlp_dim": 64, "num_heads": 2})
        values["image_size"] = 2 * int(model["variant"].split("/")[1])
    if model["variant"].startswith("R"):  # a ResNet or a hybrid
        model.update({"stages": (1,), "stem_width": 32})
        values["image_size"] = 16
    if model.get("representation_size", -1) != -1:
        model["representation_size"] = 32
    if values.get("stages"):
        values["stages"] = ({"share": 0.5, "image_size": values["image_size"] // 2}, {"share": 0.5})
    values["batch_size"] = 8
    values["steps"] = 2
    values.pop("epochs", None)
    values["schedule"].update(warmup=1)
    if values["schedule"].get("cooldown"):
        values["schedule"]["cooldown"] = 1
    dataset = "synthetic/4" if values["data"]["dataset"].startswith("synthetic") else "strokes/4"
    values["data"].update(dataset=dataset, split="train[:100]")
    if values.get("early_stopping"):  # it watches what the sweep's trials are evaluated on
        values["evaluators"] = {"dev": {"data": {}}}
    # Evaluations differ only in their splits, so one is enough.
    values["evaluators"] = dict(list(values.get("evaluators", {}).items())[:1])
    for evaluation in values["evaluators"].values():
        evaluation["data"].update(dataset=dataset, split="validation[:12]")
        evaluation["batch_size"] = 8
    return values


def config_class(path):
    return {"pretrain": loop.TrainConfig, "transfer": TransferConfig}[path.parent.name]


@pytest.mark.long
@pytest.mark.parametrize(
    ("path", "argument"),
    list(recipes(lambda name: (None, *TRAINED.get(name, []), *BUILT.get(name, [])))),
)
def test_recipe_builds_at_full_size(path, argument):
    config = build(config_class(path), load(path, argument))
    size = (config.image_size, config.image_size)
    model = build_model(config.model, 1000, size)
    params = jax.eval_shape(model.init, jax.random.key(0))
    schedule = make_schedule(config.schedule, config.steps or 90_000)
    build_stages(config.stages, model, 90_000)
    make_optimizer(config.optimizer, schedule, config.schedule.peak, params)
    for data in (config.data, *(c.data for c in config.evaluators.values())):
        parse_preprocess(data.preprocess, size)


@pytest.mark.long
@pytest.mark.parametrize(
    ("path", "argument"), list(recipes(lambda name: (None, *TRAINED.get(name, []))))
)
def test_recipe_trains(path, argument, tmp_path):
    config = build(config_class(path), reduce(load(path, argument)))
    one = Lane((jax.devices()[0],))  # meshes are tested elsewhere
    final = loop.train(loop.prepare(config, str(tmp_path), lane=one))
    assert final["step"] == 2
    assert all(f"{name}/accuracy" in final for name in config.evaluators)
    assert read_metrics(tmp_path)


@pytest.mark.parametrize(
    ("recipe", "dataset"),
    [
        ("rehearsal:L/16", ""),
        ("rehearsal:R50x1,steps=20", ""),
        ("paper:ViT-L/16,dataset=imagenet21k", "synthetic/21843"),
        ("paper:ViT-H/14", "synthetic"),
        ("jft:R50+ViT-B/16", "synthetic"),
        ("masked:", "synthetic"),
        ("better_plain_vit:", "synthetic"),
        ("scaling_vit:ViT-G/14", "synthetic"),
    ],
)
def test_large_recipes_are_rehearsed_and_planned_without_data(recipe, dataset):
    """With --config.data.dataset and --config.stop alone: their evaluators need no data either."""
    name, _, argument = recipe.partition(":")
    values = load(CONFIGS / f"pretrain/{name}.py", argument)
    if dataset:
        values["data"]["dataset"], values["stop"] = dataset, 100
    config = build(loop.TrainConfig, values)
    assert build(loop.TrainConfig, dataclasses.asdict(config)) == config  # as config.json keeps it
    for evaluator in config.evaluators.values():
        assert len(open_data(evaluator.data)) >= 8192
    training = build_training(config, make_mesh(config.mesh), *dataset_size(config.data))
    assert training.steps == (20 if "steps=20" in recipe else 100) < training.scheduled
    if config.eval_every == 50:  # the rehearsal's own recipe shows an evaluation before its end
        assert config.checkpoint.every == 50 and training.model.num_classes == 21_843


@pytest.mark.parametrize(
    ("level", "layers", "magnitude", "mixup"),
    [  # arXiv 2106.10270, section 3
        ("none", 0, 0, 0.0),
        ("light1", 2, 0, 0.0),
        ("light2", 2, 10, 0.2),
        ("medium1", 2, 15, 0.2),
        ("medium2", 2, 15, 0.5),
        ("strong1", 2, 20, 0.5),
        ("strong2", 2, 20, 0.8),
    ],
)
def test_augreg_presets(level, layers, magnitude, mixup):
    path = CONFIGS / "pretrain/augreg.py"
    values = load(path, f"ViT-B/16,augmentation={level}")
    spec = f"inception_crop|flip|randaugment({layers}, {magnitude})" if layers else None
    assert values["data"]["preprocess"] == (spec or "inception_crop|flip")
    assert values["augmentation"] == {"mixup": mixup}


def test_every_recipe_says_how_to_run_it():
    for path in CONFIGS.rglob("*.py"):
        name = path.relative_to(CONFIGS).with_suffix("").as_posix()
        assert f"vit_jax {name.split('/')[0]} --config={name}" in path.read_text()
