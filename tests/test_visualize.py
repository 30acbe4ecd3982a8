"""The pictures of what a model learned, and the command that draws them."""

import json

import jax
import numpy as np
import pytest
from PIL import Image
from processes import command

from vit_jax.models.variants import ModelConfig, build_model
from vit_jax.pictures import figures
from vit_jax.training.checkpoint import save_checkpoint

PICTURES = ("filters", "positions", "attention_distance", "rollout")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    config = ModelConfig("ViT-Ti/8", width=32, depth=2, mlp_dim=32, num_heads=2, dtype="float32")
    model = build_model(config, 3, (32, 32))
    params = jax.device_get(jax.jit(model.init)(jax.random.key(0)))
    folder = tmp_path_factory.mktemp("model") / "vit"
    save_checkpoint(folder, params, model.description)
    return folder


def test_the_command_draws(checkpoint, tmp_path):
    photo = np.random.default_rng(0).integers(0, 256, (40, 50, 3)).astype(np.uint8)
    Image.fromarray(photo).save(tmp_path / "photo.png")
    output = f"--output={tmp_path / 'pictures'}"
    model = f"--model={checkpoint}"
    code, out, err = command(
        "visualize", model, output, "--dataset=digits", "--split=test[:9]", tmp_path / "photo.png"
    )
    assert code == 0, err
    for name in PICTURES:
        assert name in out
        assert (tmp_path / "pictures" / f"{name}.pdf").read_bytes().startswith(b"%PDF")
        with Image.open(tmp_path / "pictures" / f"{name}.png") as picture:
            assert np.asarray(picture.convert("L")).std() > 5
    numbers = json.loads((tmp_path / "pictures" / "visualize.json").read_text())
    distances = np.array(numbers["attention_distance_pixels"])
    assert distances.shape == (2, 2) and (distances > 0).all() and (distances < 32).all()
    assert numbers["images"] == 10

    (tmp_path / "notes.txt").write_text("no image")
    code, _, err = command("visualize", model, output, tmp_path / "notes.txt")
    assert code == 1 and "notes.txt: cannot decode" in err and "Traceback" not in err


def test_an_image_is_dark_where_nobody_looks():
    image = np.full((32, 32, 3), 200, np.uint8)
    seen = np.zeros((4, 4))
    seen[0, 0] = 1
    shown = figures.overlay(image, seen)
    assert shown.shape == image.shape and shown.dtype == np.uint8
    assert shown[0, 0, 0] == 200 and shown[-1, -1, 0] == 0
    everywhere = figures.overlay(image, np.ones((4, 4)))
    np.testing.assert_array_equal(everywhere, image)
