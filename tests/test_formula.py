"""Laws and golden values of the formula-driven datasets."""

import hashlib
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from vit_jax.data.formula import Fractals, Strokes, Synthetic
from vit_jax.data.textures import Textures

both = pytest.mark.parametrize("formula", [Strokes, Fractals])
every = pytest.mark.parametrize("formula", [Strokes, Fractals, Synthetic, Textures])


def digest(source, indices) -> str:
    return hashlib.sha256(b"".join(source[i]["image"].tobytes() for i in indices)).hexdigest()


@pytest.mark.parametrize(
    ("formula", "pixels", "sha256"),
    [
        (
            Strokes,
            [0, 0, 3, 77, 255, 255, 255, 84, 0, 0],
            (
                "c215c3e667b3fd0d506c825419625197fe76a80f3b3c4ea55c98a2cff89b6f23",
                "5779845ed44444d95f814cb98c3f566944a0b89e0e8c4d0bd6a9f570033e7687",
            ),
        ),
        (
            Fractals,
            [0, 0, 0, 254, 255, 252, 234, 239, 241, 12],
            (
                "218db2f6e25f2445d44f5350fdbd40917ee53c5aa013e71390784c94f4fdb982",
                "3dec07da2b89027140c288b2ff7f7bf7930daf8f0ca80b5ad4bb4946aad43797",
            ),
        ),
        (
            Synthetic,
            [181, 181, 181, 181, 181, 181, 181, 181, 181, 181],
            (
                "344e6f4d538e8ff47ec059c0bc79e82a78f0fd0c8bd6e062d2a4b4f3e3a0a3e1",
                "d7136bf049eb940ad3152031409bca5469f564d4f1a78502076007dbc964c303",
            ),
        ),
    ],
)
def test_golden_pixels(formula, pixels, sha256):
    # The same on every machine. A change here changes what published models were trained on.
    source = formula(10_000, num_classes=100, seed=3)
    assert source[1234]["image"][16, 2:30:3].max(axis=1).tolist() == pixels
    assert digest(source, range(9_900, 10_000)) == sha256[0]
    assert digest(formula(10, num_classes=4, image_size=57), range(10)) == sha256[1]


def test_golden_textures():
    source = Textures(10_000, num_classes=100, seed=3)
    pixels = [154, 151, 143, 159, 153, 152, 152, 145, 147, 155]
    assert source[1234]["image"][32, 4:60:6].max(axis=1).tolist() == pixels
    whole = "215ed342a44e3decc1a74a255e1d27e9e3829910ebae7e51859cd624d7522151"
    assert digest(source, range(9_950, 10_000)) == whole
    small = "f8b7873c26f953c3b7c5f84d7d1bcb6bd0b2a7d13e3151998214bb96ed784f03"
    assert digest(Textures(10, num_classes=4, image_size=57), range(10)) == small


@every
def test_images_are_a_function_of_seed_and_index(formula):
    source = formula(1000, num_classes=50, seed=7)
    indices = [3, 0, 999, 51, 500]
    expected = digest(source, indices)

    assert digest(formula(1000, num_classes=50, seed=7), indices) == expected
    for i in reversed(range(40)):  # another order of access
        source[i]
    assert digest(source, indices) == expected
    with ThreadPoolExecutor(4) as pool:
        images = list(pool.map(lambda i: source[i]["image"], indices * 5))
    joined = b"".join(image.tobytes() for image in images[:5])
    assert hashlib.sha256(joined).hexdigest() == expected
    assert all(np.array_equal(a, b) for a, b in zip(images[:5], images[-5:], strict=True))


@every
def test_another_process_draws_the_same(formula):
    source = formula(100, num_classes=10)
    code = (
        "import pickle, sys, hashlib\n"
        "source = pickle.load(sys.stdin.buffer)\n"
        "images = b''.join(source[i]['image'].tobytes() for i in (9, 1))\n"
        "print(hashlib.sha256(images).hexdigest())"
    )
    output = subprocess.run(
        [sys.executable, "-c", code],
        input=pickle.dumps(source),
        env={"PYTHONHASHSEED": "12345", "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        check=True,
    ).stdout
    assert output.decode().strip() == digest(source, [9, 1])


@every
def test_first_selects_a_range_of_one_set(formula):
    whole, part = formula(200, num_classes=20), formula(50, num_classes=20, first=100)
    for i in (0, 17, 49):
        assert part[i]["label"] == whole[100 + i]["label"]
        np.testing.assert_array_equal(part[i]["image"], whole[100 + i]["image"])
    far = formula(20, num_classes=20, first=2**60)
    assert len({image["image"].tobytes() for image in [*far, *part]}) == 70


@every
def test_seed_changes_classes_and_instances(formula):
    def class_mean(seed, first):
        source = formula(40 * 5, num_classes=5, seed=seed, first=first)
        return np.mean([source[i]["image"] for i in range(0, 200, 5)], axis=0)

    def distance(a, b):
        return np.abs(a - b).mean()

    mine, again, other = class_mean(0, 0), class_mean(0, 200), class_mean(1, 0)
    assert distance(mine, other) > 2 * distance(mine, again)
    assert digest(formula(9), range(9)) != digest(formula(9, seed=2**40), range(9))


@both
@pytest.mark.parametrize("size", [8, 32, 65])
def test_examples(formula, size):
    source = formula(30, num_classes=7, image_size=size)
    assert len(source) == 30
    for i in (0, np.int64(29)):
        example = source[i]
        assert type(example["label"]) is int
        assert example["image"].shape == (size, size, 3)
        assert example["image"].dtype == np.uint8
        assert example["image"].max() > 100  # something to see
        assert example["image"].mean() < 160  # on a dark background


@every
@pytest.mark.parametrize("num_examples", [33, 1000])
def test_every_prefix_is_class_balanced(formula, num_examples):
    source = formula(num_examples, num_classes=11, first=4, image_size=8)
    counts = np.bincount([source[i]["label"] for i in range(33)], minlength=11)
    assert counts.tolist() == [3] * 11


@both
def test_images_of_a_class_are_alike(formula):
    num_classes = 50
    source = formula(40 * num_classes, num_classes=num_classes)
    images = np.stack([example["image"].mean(axis=2) for example in source])
    images = images.reshape(40, num_classes, -1) / 255
    means = images[:30].mean(axis=0)
    distances = ((images[30:, :, None] - means) ** 2).sum(axis=-1)  # [10, true class, class]
    accuracy = (distances.argmin(axis=-1) == np.arange(num_classes)).mean()
    assert accuracy > 0.4  # chance is 0.02
    assert len(np.unique(images.reshape(len(source), -1), axis=0)) == len(source)


@every
def test_errors(formula):
    source = formula(10)
    for i in (10, -1):
        with pytest.raises(IndexError, match=f"example {i}: expected 0 to 9"):
            source[i]
    with pytest.raises(TypeError):
        source[1.0]
    for fields in (
        {"num_examples": 0},
        {"num_classes": 0},
        {"image_size": 7},
        {"seed": -1},
        {"first": -1},
        {"first": 2**62},
        {"num_classes": 10.0},
    ):
        ((name, value),) = fields.items()
        with pytest.raises(ValueError, match=f"{name}={value}: expected an int from"):
            formula(**{"num_examples": 10, **fields})
