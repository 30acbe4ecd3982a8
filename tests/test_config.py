"""Recipes become dataclasses, or a clear error."""

import dataclasses
import re

import pytest

from vit_jax.config import build, parse_arg, unknown


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: float = 1.0
    rules: tuple[tuple[str, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Outer:
    name: str
    inner: Inner = Inner()
    several: dict[str, Inner] = dataclasses.field(default_factory=dict)
    steps: int | None = None
    flag: bool = False
    pair: tuple[int, int] = (0, 0)


def test_nested_mappings():
    values = {
        "name": "x",
        "inner": {"rate": 2, "rules": [["a", 1], ("b", 0.5)]},
        "several": {"one": {"rate": 3.0}},
        "steps": None,
        "pair": [1, 2],
    }
    expected = Outer("x", Inner(2.0, (("a", 1.0), ("b", 0.5))), {"one": Inner(3.0)}, None)
    assert build(Outer, values) == dataclasses.replace(expected, pair=(1, 2))
    assert isinstance(build(Outer, values).inner.rate, float)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "config lacks name"),
        ({"name": "x", "inner": {"rat": 1.0}}, "field of config.inner 'rat': did you mean 'rate'"),
        ({"name": "x", "several": {"a": {"rte": 1}}}, "config.several.a 'rte'"),
        ({"name": 3}, "config.name = 3: expected str, found int"),
        ({"name": "x", "inner": 3}, "config.inner = 3: expected the fields of Inner"),
        (
            {"name": "x", "inner": {"rate": "high"}},
            "config.inner.rate = 'high': expected float, found str",
        ),
        ({"name": "x", "inner": {"rate": float("inf")}}, "rate = inf: expected a finite number"),
        ({"name": "x", "inner": {"rate": 1e-50}}, "rate = 1e-50: expected 0, or a size of"),
        ({"name": "x", "inner": {"rate": -1e39}}, "rate = -1e+39: expected 0, or a size of"),
        ({"name": "x", "inner": {"rate": 1 - 1e-9}}, "0.999999999 is 1 in float32"),
        ({"name": "x", "steps": 1.5}, "config.steps = 1.5: expected int, found float"),
        ({"name": "x", "flag": 1}, "config.flag = 1: expected bool, found int"),
        ({"name": "x", "pair": [1, 2, 3]}, "expected 2 items"),
        ({"name": "x", "inner": {"rules": "ab"}}, "config.inner.rules = 'ab': expected a list"),
    ],
)
def test_errors_name_the_path(values, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build(Outer, values)


def test_numbers_that_float32_holds():
    for rate in (0.0, -0.0, 1.2e-38, 3.4e38, 1 - 2**-24, -1.0, 1 + 1e-12):
        assert build(Inner, {"rate": rate}).rate == rate


def test_arguments():
    arg = parse_arg("ViT-S/16,epochs=90,lr=1e-3", variant="ViT-B/16", epochs=300, lr=0.1, data="x")
    assert vars(arg) == {"variant": "ViT-S/16", "epochs": 90, "lr": 1e-3, "data": "x"}
    assert parse_arg(None, variant="ViT-B/16").variant == "ViT-B/16"
    assert parse_arg("lr=1", lr=0.5).lr == 1.0


@pytest.mark.parametrize(
    ("arg", "message"),
    [
        ("epoch=3", "did you mean 'epochs'"),
        ("ViT-S/16,90", "'90' of 'ViT-S/16,90': expected name=value"),
        ("epochs=many", "epochs=many: expected int"),
    ],
)
def test_bad_arguments(arg, message):
    with pytest.raises(ValueError, match=message):
        parse_arg(arg, variant="ViT-B/16", epochs=300)


def test_unknown_names_the_nearest():
    assert "did you mean 'cifar10'" in str(unknown("dataset", "cifar1", ["cifar10", "mnist"]))
    assert "did you mean" not in str(unknown("dataset", "zzz", ["cifar10", "mnist"]))
