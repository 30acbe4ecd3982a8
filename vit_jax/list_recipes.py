"""Lists the recipes, or explains one: its argument and all fields with types, values and meanings.

vit_jax recipes
vit_jax recipes 'transfer/*'
vit_jax recipes transfer/folder
"""

import ast
import dataclasses
import fnmatch
import inspect
import re
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vit_jax.command_line import run
from vit_jax.recipes import find_recipe, list_recipes, recipe


def documented(file: Path) -> tuple[str, str]:
    """Returns a recipe's docstring, and the description of its argument in `get_config`'s."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    functions = (node for node in tree.body if isinstance(node, ast.FunctionDef))
    made = next((node for node in functions if node.name == "get_config"), None)
    argument = (ast.get_docstring(made) or "").splitlines()[:1] if made else []
    return ast.get_docstring(tree) or "", "".join(argument).removeprefix("`arg`: ")


def meanings(cls: type) -> dict[str, str]:
    """Returns descriptions of a dataclass's fields, from "Attributes:" and nearby comments."""
    found: dict[str, str] = {}
    for part in reversed(cls.__mro__[:-1]):
        text = inspect.cleandoc(part.__doc__ or "").partition("Attributes:\n")[2]
        text = re.split(r"\n(?=\S)", text)[0]  # up to the next section
        depth = len(text) - len(text.lstrip())
        for entry in re.split(rf"\n {{{depth}}}(?=\S)", text.strip()):
            names, _, meaning = entry.partition(": ")
            found |= {name: " ".join(meaning.split()) for name in names.split(", ")}
        above: list[str] = []
        for line in inspect.getsource(part).splitlines():
            code, _, comment = line.strip().partition("# ")
            if not code:
                above = [*above, comment] if comment else []
                continue
            if (name := code.partition(":")[0]) in getattr(part, "__dataclass_fields__", {}):
                found.setdefault(name, " ".join([*above, comment]).strip())
            above = []
    return found


def fields(
    cls: type, values: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, str, Any, str]]:
    """Yields (dotted name, type, value, meaning) of all fields; fields of groups come last.

    The value is `dataclasses.MISSING` if neither the recipe nor a default gives it.
    """
    hints, said, groups = typing.get_type_hints(cls), meanings(cls), []
    for field in dataclasses.fields(cls):
        made = field.default_factory is not dataclasses.MISSING
        default = field.default_factory() if made else field.default
        value, hint = values.get(field.name, default), hints[field.name]
        listed = typing.get_origin(hint) is tuple  # set as a whole
        parts = () if listed else (hint, *typing.get_args(hint))
        inner = [t for t in parts if dataclasses.is_dataclass(t)]
        if inner and not isinstance(value, Mapping):
            value = dataclasses.asdict(value) if dataclasses.is_dataclass(value) else {}
        name = f"{prefix}{field.name}"
        if inner and typing.get_origin(hint) is dict:
            for key, part in value.items():
                of = inner[0].select(part) if hasattr(inner[0], "select") else inner[0]
                groups.append((of, part, f"{name}.{key}."))
        elif inner:
            groups.append((inner[0], value, f"{name}."))
        else:
            yield name, inspect.formatannotation(hint), value, said.get(field.name, "")
    for group in groups:
        yield from fields(*group)


def explain(name: str) -> Iterator[str]:
    """Yields the lines that explain a recipe, given by its name or path, with its argument."""
    from vit_jax.classifier.recipe import TransferConfig  # takes seconds; listing doesn't need it
    from vit_jax.training.recipe import TrainConfig

    values = recipe(name).to_dict()
    about, argument = documented(find_recipe(name.partition(":")[0]))
    cls, missing = TrainConfig, "?  # must be set"
    if "init" in values:
        cls, missing = TransferConfig, "the checkpoint's"
    yield from (about, "", f"argument, after a colon: {argument or 'none'}")
    group = None
    for field, kind, value, meaning in fields(cls, cls.upgrade(values)):
        at, _, last = field.rpartition(".")
        if at != group:
            group = at
            yield f"\n--config.{at}." if at else "\n--config."
        shown = missing if value is dataclasses.MISSING else repr(value)
        shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
        yield f"  {last:24} {kind} = {shown}" + (f"  # {meaning}" if meaning else "")


def main(arguments: list[str]) -> None:
    """Prints the recipes whose names match, or explains the named one."""
    names = arguments[1:] or ["*"]
    for name in names:
        matching = fnmatch.filter(list_recipes(), name) if "*" in name else []
        for known in matching:
            about, argument = documented(find_recipe(known))
            print(f"{known:26} {about.splitlines()[0]}\n{'':26} {argument}")
        if not matching:
            print("\n".join(explain(name)))


if __name__ == "__main__":
    run(main, rest="RECIPE")
