"""Recipes by name: `pretrain/paper:ViT-B/16` is `configs/pretrain/paper.py` with its argument."""

import copy
import fnmatch
import os
import runpy
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_collections

from vit_jax.config import InputError, unknown

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
    config = call_in(find_recipe(path), "get_config", argument or None)
    return ml_collections.ConfigDict(merge(config.to_dict(), fields))


def call_in(file: Path, function: str, argument: str | None) -> Any:
    """Runs a Python file and calls its function; InputError, with the line, if that fails."""
    try:
        found = runpy.run_path(str(file))
        if function not in found:
            raise InputError(f"{file} has no {function}(arg)")
        return found[function](argument)
    except Exception as error:
        if told := fault_in(str(file), error):
            raise told from error
        raise


def fault_in(file: str, error: BaseException) -> InputError | None:
    """Returns what a recipe or study raised, with its file and line; None if it raised nothing."""
    causes = [error]
    while causes[-1].__context__:
        causes.append(causes[-1].__context__)
    if told := [cause for cause in causes if isinstance(cause, InputError)]:
        return told[-1]
    for cause in causes:
        if isinstance(cause, SyntaxError) and cause.filename:
            return InputError(f"{cause.filename}, line {cause.lineno}: SyntaxError: {cause.msg}")
        frames, path = traceback.extract_tb(cause.__traceback__), os.path.realpath(file)
        if lines := [f.lineno for f in frames if os.path.realpath(f.filename) == path]:
            return InputError(f"{file}, line {lines[-1]}: {type(cause).__name__}: {cause}")
        if isinstance(cause, AttributeError | TypeError) and "get_" in str(cause):
            problem = str(cause).strip().splitlines()[-1]
            return InputError(f"{file}: expected get_config(arg=None), or get_study: {problem}")
    return None


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
