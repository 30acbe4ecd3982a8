"""JSON files of other programs: of any content, an error in one line or the same model."""

import copy

import numpy as np
import pytest
from test_pytorch import assert_identical, case

from vit_jax.config import InputError
from vit_jax.weights.hugging_face import from_hugging_face, to_hugging_face
from vit_jax.weights.stated import Stated, agree
from vit_jax.weights.timm import from_timm, to_timm

JUNK = (
    *(None, "", "x", "12", 0, 1, -1, 3.5, 1e308, float("nan"), float("inf"), True, [], [[]]),
    *([0, 0, 0], [0.5], ["a"] * 3, [1, 2], {}, {"a": 1}, {"height": "x"}, [None], 10**30),
)


def mutated(files, rng):
    """Replaces one to three values, at any depth, by others of any type."""
    files = copy.deepcopy(files)
    for _ in range(rng.integers(1, 4)):
        node = files[str(rng.choice(list(files)))]
        while True:
            key = str(rng.choice(list(node)))
            if isinstance(node[key], dict) and node[key] and rng.random() < 0.8:
                node = node[key]
                continue
            node[key] = JUNK[rng.integers(len(JUNK))]
            break
    return files


@pytest.mark.parametrize(
    ("export", "read"), [(to_timm, from_timm), (to_hugging_face, from_hugging_face)]
)
def test_configs_of_any_content(export, read, count=40):
    params, description = case("token")
    arrays, files = export(params, {**description, "class_names": list("abcde")})
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(count):
        try:
            back, _ = read(dict(arrays), mutated(files, rng))
        except InputError as error:
            assert len(str(error).splitlines()) == 1 or "read" in str(error).splitlines()[0]
            refused += 1
        else:
            assert back.keys() == params.keys()
    assert count // 4 < refused < count
    assert_identical(read(arrays, files)[0], params)


def test_values_are_checked_by_type():
    stated = Stated({"a": "12", "b": 0, "c": [1, 2], "d": [0.1, 0.2, 0], "e": None}, "config.json")
    assert stated.whole("e", 7) == stated.whole("absent", 7) == 7
    assert stated.size("c") == (1, 2) and stated.size("absent") is None
    with pytest.raises(ValueError, match=r"config\.json: a = '12': expected a whole number|number"):
        stated.whole("a")
    with pytest.raises(ValueError, match="b = 0: expected a number above 0"):
        stated.number("b", above=0)
    with pytest.raises(ValueError, match=r"d = .*: expected three numbers above 0"):
        stated.triple("d", (1, 1, 1), positive=True)
    with pytest.raises(ValueError, match=r"c = .*: expected three numbers"):
        stated.triple("c", (1, 1, 1))
    with pytest.raises(ValueError, match="a = '12': expected true or false"):
        stated.flag("a")
    with pytest.raises(ValueError, match="depth = 12 where the tensors have 6; width = 3"):
        agree("config.json", [("depth", 12, 6), ("width", 3, 4), ("heads", None, 3), ("x", 1, 1)])
