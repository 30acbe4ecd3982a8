"""Recipes by name: `pretrain/paper:ViT-B/16` is `configs/pretrain/paper.py` with its argument."""

import copy
import fnmatch
import runpy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_collections

from vit_jax.config import unknown

# In a clone both folders are beside the package, in a wheel inside it (setup.py).
SHIPPED = Path(__file__).parent / "shipped"
ROOT = SHIPPED if SHIPPED.is_dir() else Path(__file__).parent.parent  # of configs/, experiments/
FOLDER = ROOT / "configs"


def list_recipes(pattern: str = "*") -> list[str]:
    """Returns the names of the recipes that match a pattern, such as "transfer/*"."""
    names = (str(path.relative_to(FOLDER).with_suffix("")) for path in FOLDER.glob("*/*.py"))
    return sorted(fnmatch.filter(names, pattern))


def find_recipe(name: str) -> Path:
    """Returns the file of a recipe's path or name, without its argument; paths take precedence.

    Raises ValueError for an unknown name, FileNotFoundError for a missing path.
    """
    if (path := Path(name)).is_file():
        return path
    if name in (known := list_recipes()):
        return FOLDER / f"{name}.py"
    error = unknown("recipe", name, known)
    raise FileNotFoundError(f"{error}; or a file") if name.endswith(".py") else error


def recipe(name: str, **fields: Any) -> ml_collections.ConfigDict:
    """Returns a recipe as a config that can be changed.

    Args:
      name: "pretrain/paper:ViT-B/16", or a path "my_recipe.py:ARGUMENT".
      **fields: values that replace the recipe's: `batch_size=1024`, or for a field of a group
        `**{"model.variant": "ViT-S/16"}`.

    Raises ValueError or FileNotFoundError for a recipe that doesn't exist. A misspelt field raises
    when the config is used.
    """
    path, _, argument = name.partition(":")
    config = runpy.run_path(str(find_recipe(path)))["get_config"](argument or None)
    return ml_collections.ConfigDict(merge(config.to_dict(), fields))


def merge(recipe: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a copy of a nested recipe with dotted fields set; a mapping replaces its group."""
    merged = copy.deepcopy(dict(recipe))
    for name, value in fields.items():
        *groups, field = name.split(".")
        group = merged
        for part in groups:
            group = group.setdefault(part, {})
        group[field] = copy.deepcopy(value)
    return merged
