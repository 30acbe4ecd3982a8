"""Distillation against the textbook's formulas, and with a teacher's checkpoint in the loop."""

import dataclasses
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.config import build
from vit_jax.costs.flops import forward_macs, training_flops
from vit_jax.losses.classification import LossConfig
from vit_jax.losses.distillation import DistillConfig, mix_losses
from vit_jax.parallel.lanes import make_lanes
from vit_jax.parallel.mesh import MeshConfig, make_mesh, put_batch, use_mesh
from vit_jax.parallel.multihost import Preemption
from vit_jax.training import loop
from vit_jax.training import teacher as module
from vit_jax.training.initial import fresh_state
from vit_jax.training.programs import Programs
from vit_jax.training.recipe import TrainConfig, build_training
from vit_jax.weights.trained import create_model, load

RNG = np.random.default_rng(0)
STUDENT, TEACHER = (RNG.normal(size=(6, 5)) * 3 for _ in range(2))
LABELS = RNG.uniform(size=6)  # losses by labels


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_soft(temperature):
    config = DistillConfig("x", weight=0.25, temperature=temperature)
    found = mix_losses(config, LossConfig(), *map(jnp.asarray, (LABELS, STUDENT, TEACHER)))
    p, q = softmax(TEACHER / temperature), softmax(STUDENT / temperature)
    divergence = (p * np.log(p / q)).sum(-1)
    np.testing.assert_allclose(
        found, 0.75 * LABELS + 0.25 * temperature**2 * divergence, rtol=1e-5, atol=1e-6
    )
    same = mix_losses(config, LossConfig(), *map(jnp.asarray, (0 * LABELS, TEACHER, TEACHER)))
    np.testing.assert_allclose(same, 0, atol=1e-6)


def test_hard():
    config = DistillConfig("x", weight=0.5, hard=True)
    loss = LossConfig(label_smoothing=0.1)
    found = mix_losses(config, loss, *map(jnp.asarray, (LABELS, STUDENT, TEACHER)))
    taught = -np.log(softmax(STUDENT))[np.arange(6), TEACHER.argmax(-1)]
    np.testing.assert_allclose(found, (LABELS + taught) / 2, rtol=1e-5)


@pytest.mark.parametrize("hard", [False, True])
def test_sigmoid(hard):
    config = DistillConfig("x", weight=1.0, hard=hard)
    loss = LossConfig("sigmoid")
    found = mix_losses(config, loss, *map(jnp.asarray, (LABELS, STUDENT, TEACHER)))
    q = 1 / (1 + np.exp(-STUDENT))
    p = TEACHER > 0 if hard else 1 / (1 + np.exp(-TEACHER))
    cross = -(p * np.log(q) + (1 - p) * np.log(1 - q))
    own = 0 if hard else p * np.log(p) + (1 - p) * np.log(1 - p)
    np.testing.assert_allclose(found, (cross + own).sum(-1), rtol=1e-4)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A head that says something: class 3."""
    path = tmp_path_factory.mktemp("teacher") / "model"
    model = create_model("ViT-mu/8", 10, 16)
    model.params["head"]["kernel"] = (RNG.normal(size=(32, 10)) / 10).astype(np.float32)
    model.params["head"]["bias"] = 5 * np.eye(10, dtype=np.float32)[3]
    model.save(path)
    return path


def values(teacher, **changes):
    distill = {"teacher": str(teacher), "weight": 1.0, "hard": True}
    return {
        "model": {"variant": "ViT-mu/8", "dtype": "float32"},
        "data": {"dataset": "digits", "preprocess": "resize|flip"},
        "image_size": 16,
        "batch_size": 16,
        "steps": 6,
        "schedule": {"peak": 3e-2, "warmup": 0},
        "checkpoint": {"every": 100},
        "log_every": 1,
        **changes,
        "distill": {**distill, **changes.get("distill", {})},
    }


def prepare(workdir, teacher, **changes):
    config = build(TrainConfig, values(teacher, **changes))
    return loop.prepare(config, str(workdir), lane=make_lanes(1)[0])


@pytest.mark.long
def test_the_student_learns_what_the_teacher_says(teacher, tmp_path, monkeypatch):
    """Whatever the labels are; in stages of other sizes; and after a kill, to the bit."""
    teacher = shutil.copytree(teacher, tmp_path / "teacher")
    stages = ({"share": 0.5, "image_size": 8}, {"share": 0.5})
    cache = {"stages": stages, "compilation_cache": str(tmp_path / "cache")}
    loop.train(prepare(tmp_path / "whole", teacher, **cache))
    student = load(tmp_path / "whole")
    images = RNG.integers(0, 256, (8, 16, 16, 3)).astype(np.uint8)
    assert (student.logits(images).argmax(-1) == 3).all()
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(Preemption, "reached", lambda self, done: done == 3)
        loop.train(prepare(tmp_path / "killed", teacher, **cache))
    loop.train(prepare(tmp_path / "killed", teacher, **cache))
    chex.assert_trees_all_equal(load(tmp_path / "killed").params, student.params)
    shutil.rmtree(teacher)
    create_model("ViT-mu/8", 10, 16, seed=1).save(teacher)
    module._load.cache_clear()
    with pytest.raises(ValueError, match="teacher: its weights changed"):
        prepare(tmp_path / "killed", teacher, **cache)


def test_every_mesh_hears_the_same(teacher):
    losses = []
    for mesh, devices in ((MeshConfig(), 1), (MeshConfig(fsdp=2, tensor=2, min_size=2**8), 4)):
        config = build(TrainConfig, values(teacher, distill={"hard": False}))
        config = dataclasses.replace(config, mesh=mesh)
        training = build_training(config, make_mesh(mesh, jax.devices()[:devices]), 10, 100)
        assert {x.dtype for x in jax.tree.leaves(training.teacher.params)} == {
            jnp.dtype(jnp.bfloat16)
        }
        images = np.random.default_rng(1).integers(0, 256, (16, 16, 16, 3)).astype(np.uint8)
        batch = {"image": images, "label": np.arange(16, dtype=np.int32) % 10}
        with use_mesh(training.mesh):
            batch = put_batch(training.mesh, batch)
            state = fresh_state(training)(jax.random.key(0))
            with Programs(training, batch, 0, loop.Clock()) as programs:
                losses.append(float(programs.at(0)(state, batch)[1]["loss"]))
    split = [x for x in jax.tree.leaves(training.teacher.shardings) if any(x.spec)]
    assert split  # large kernels are split over devices
    assert losses[0] == pytest.approx(losses[1], rel=2e-2) and losses[0] > 0.1


def test_the_teachers_forward_pass_counts(teacher, tmp_path):
    run = prepare(tmp_path, teacher)
    each = training_flops(run.model) + 2 * forward_macs(run.teacher.model)
    assert run.flops(1, 3) == 2 * 16 * each


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distill": {"weight": 0.0}}, "distill.weight = 0.0: expected over 0"),
        ({"distill": {"temperature": 0.0, "hard": False}}, "distill.temperature = 0.0: expected"),
        ({"distill": {"temperature": 2.0}}, "hard decisions have none"),
        ({"image_size": 32}, "takes images of 16x16 pixels, the recipe has 32x32"),
        ({"data": {"dataset": "strokes/7"}}, "has 10 classes, the data has 7"),
        ({"loss": {"name": "masked_patches"}}, "distill: masked_patches has no logits"),
        ({"distill": {"teacher": "/nowhere"}}, "nowhere"),
    ],
)
def test_teachers_that_cannot_be(teacher, tmp_path, changes, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        prepare(tmp_path, teacher, **changes)


def test_a_teacher_of_other_classes(tmp_path):
    names = [str(i) for i in range(10)]
    for number, order in enumerate((names, names[::-1])):
        model = dataclasses.replace(create_model("ViT-mu/8", 10, 16), names=tuple(order))
        model.save(tmp_path / str(number))
    run = prepare(tmp_path / "run", tmp_path / "0")
    if run.source.class_names:
        with pytest.raises(ValueError, match="its class 0 is '9', the data's is '0'"):
            prepare(tmp_path / "other", tmp_path / "1")
    else:
        with pytest.raises(ValueError, match="its class 0 is '9', the data's is '0'"):
            dataclasses.replace(run.teacher, names=tuple(names[::-1])).check_classes(names)
