"""Files, modules and recipe fields that README, docstrings, comments and recipes name exist."""

import dataclasses
import importlib.util
import re
import typing
from pathlib import Path

import pytest

from vit_jax.classifier.recipe import TransferConfig

ROOT = Path(__file__).parent.parent
FOLDERS = ("vit_jax", "configs", "experiments")
DOCUMENTS = [
    path
    for pattern in ("*.md", *(f"{at}/**/*.{kind}" for kind in ("md", "py") for at in FOLDERS))
    for path in sorted(ROOT.glob(pattern))
    if path.name != "CHANGELOG.md" and ".egg-info" not in str(path)
]  # fmt: skip
IN_PLACE = (
    r"(?<![\w/.-])"  # not the end of a longer path, such as google-research/vision_transformer
)


def named(path, pattern):
    return sorted(set(re.findall(IN_PLACE + pattern, path.read_text("utf-8"))))


def identity(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", DOCUMENTS, ids=identity)
def test_files_and_modules_exist(path):
    for name in named(path, r"((?:configs|vit_jax|experiments|tests)/[\w./-]*\w/?)"):
        assert (ROOT / name).exists(), f"{path.name} names {name}"
    for name in named(path, r"python -m ((?:vit_jax|experiments)[\w.]*\w)"):
        assert importlib.util.find_spec(name), f"{path.name} names python -m {name}"


def every_field(cls, prefix=""):
    """Dotted names of all fields of a dataclass and of the dataclasses in it."""
    for field in dataclasses.fields(cls):
        yield prefix + field.name
        hint = typing.get_type_hints(cls)[field.name]
        for part in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(part):
                yield from every_field(part, f"{prefix}{field.name}.")


@pytest.mark.parametrize("path", DOCUMENTS, ids=identity)
def test_fields_of_recipes_exist(path):
    known = set(every_field(TransferConfig))  # a recipe of pretraining has a part of them
    for name in named(path, r"--config\.([a-z_0-9.]*[a-z_0-9])"):
        # Evaluators have names of their own; `field` and `group` stand for any.
        if name.split(".")[0] not in ("evaluators", "classification", "fewshot", "field", "group"):
            assert name in known, f"{path.name} names --config.{name}"
