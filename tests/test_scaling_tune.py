"""`tune`: a narrow proxy of a recipe, its runs, and the recipe with the best learning rate."""

import pytest

from experiments.scaling import tune
from experiments.scaling.__main__ import main
from experiments.scaling.runner import train
from experiments.scaling.study import expand
from vit_jax.config import build
from vit_jax.parallel.mesh import MeshConfig, make_mesh
from vit_jax.recipes import recipe
from vit_jax.training.recipe import TrainConfig, build_training

RECIPE = """
from vit_jax.config import recipe

def get_config(arg=None):
    return recipe(
        model={"variant": "ViT-nano/8", "width": 32, "depth": 1, "num_heads": 4, "mlp_dim": 64,
               "representation_size": -1, "dtype": "float32"},
        image_size=16, data={"dataset": "digits", "preprocess": "resize"}, batch_size=32, steps=8,
        schedule={"peak": 1e-3, "warmup": 4}, optimizer={"name": "adamw"}, checkpoint={"every": 8},
    )
"""


@pytest.fixture
def target(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
    path = tmp_path / "tiny.py"
    path.write_text(RECIPE)
    return f"--recipe={path}", f"--folder={tmp_path / 'tune'}"


def test_the_best_rate_of_the_proxy_is_the_targets(target, tmp_path, monkeypatch, capsys):
    made = []

    def measure(run, config, workdir):
        made.append(config["model"]["width"])
        rate = config["schedule"]["peak"]
        if rate > 0.005:
            raise FloatingPointError("not finite after step 3")
        (workdir / "checkpoints" / "8").mkdir(parents=True)
        return {"steps": 8, "evaluations": [{"step": 8, "test/loss": abs(rate - 2e-3)}]}

    monkeypatch.setattr(tune, "train", measure)
    assert main(["tune", *target]) == 0
    said = capsys.readouterr().out
    assert made == [8] * 7 and "proxy: width 8, 8 steps, 7 runs" in said and "target: " in said
    assert "learning rate 0.008     failed" in said and "at the end of those" not in said
    config = recipe(f"{tmp_path / 'tune' / 'target.py'}")
    assert config.schedule.peak == 2e-3 and config.model.width == 32
    training = build_training(
        build(TrainConfig, config.to_dict()), make_mesh(MeshConfig()), 10, 100
    )
    block = training.width.update["Transformer"]["encoderblock_0"]
    assert block["MlpBlock_0"]["Dense_0"]["kernel"] == 1 / 4
    query = block["MultiHeadDotProductAttention_0"]["query"]["kernel"]
    assert query == 1 / 4  # heads are as wide as the proxy's
    # A second call runs nothing again.
    assert main(["tune", *target]) == 0 and made == [8] * 7
    main(["tune", *target, "--rates", "0.001", "0.002"])
    assert "the best rate, 0.002, is at the end of those tried" in capsys.readouterr().out


def test_the_proxy_is_the_target_at_another_width(target):
    tuning = tune.propose(target[0].partition("=")[2], 16, 4, (0.01,), 2)
    runs = expand(tuning.study)
    assert [run.labels["seed"] for run in runs] == [0, 1]
    config = build(TrainConfig, runs[0].config)
    model = config.model
    assert (model.width, model.num_heads, model.mlp_dim, model.representation_size) == (
        16,
        2,
        32,
        -1,
    )
    assert (config.steps, config.schedule.warmup, config.schedule.peak) == (4, 2, 0.01)
    assert config.optimizer.base_width == 16 and config.optimizer.base_heads == 2


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("pretrain/bit", {}, "R50x1 has no width rule, only ViTs and hybrids do"),
        ("transfer/digits", {}, "transfer/digits fine-tunes a model"),
        ("pretrain/paper:ViT-B/16", {"width": 100}, "12 heads are 64 wide: use a multiple of 64"),
        ("pretrain/paper:ViT-B/16", {"width": 768}, "below 768, such as 704"),
        ("pretrain/paper:ViT-B/16", {"rates": (0.0,)}, r"rates=\(0.0,\): expected more than 0"),
        ("pretrain/paper:ViT-B/16", {"seeds": 0}, "seeds=0"),
    ],
)
def test_recipes_without_a_proxy(name, options, message):
    with pytest.raises(ValueError, match=message):
        tune.propose(name, **{"width": None, "steps": 100, "rates": (), "seeds": 1} | options)


@pytest.mark.slow
def test_a_tiny_recipe_is_tuned(target, tmp_path, capsys):
    assert tune.train is train
    assert main(["tune", *target, "--rates", "0.001", "0.01"]) == 0
    said = capsys.readouterr().out
    assert said.count(" loss ") == 2 and "failed" not in said
    assert recipe(str(tmp_path / "tune" / "target.py")).schedule.peak in (0.001, 0.01)
