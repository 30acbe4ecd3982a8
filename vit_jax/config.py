"""Converts recipes to frozen dataclasses; errors name the nearest known field for a misspelt one.

Recipes (`configs/`) import this module, so it imports nothing heavy.
"""

import ast
import contextlib
import dataclasses
import difflib
import math
import os
import sys
import types
import typing
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import ml_collections


class InputError(ValueError):
    """A mistake in the user's input; the message says what was found, expected and what to do.

    Commands print it without a traceback. Any other ValueError is a bug.
    """


def unknown(kind: str, name: str, known: Iterable[str]) -> InputError:
    """Returns the error for an unknown name, with the nearest known names."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    shown = ", ".join(known[:40]) + (", ..." if len(known) > 40 else "")
    return InputError(f"unknown {kind} {name!r}: {hint}Known: {shown}")


def parse_arg(arg: str | None, **defaults: Any) -> types.SimpleNamespace:
    """Parses the text after a recipe's colon: `configs/pretrain/augreg.py:ViT-Ti/16,epochs=90`.

    The first item may omit its name; it then sets the first default. Values take the type of their
    default (`None` and numbers as literals). Raises ValueError for an unknown name or a value of
    another type.
    """
    values = dict(defaults)
    for position, item in enumerate(filter(None, (arg or "").split(","))):
        name, equals, text = item.partition("=")
        if not equals:
            if position:
                raise InputError(f"config argument {item!r} of {arg!r}: expected name=value")
            name, text = next(iter(defaults)), item
        if name not in defaults:
            raise unknown("config argument", name, defaults)
        values[name] = _parse_value(name, text, defaults[name])
    return types.SimpleNamespace(**values)


def _parse_value(name: str, text: str, default: Any) -> Any:
    if isinstance(default, str):
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    if default is not None and type(value) is not type(default):
        raise InputError(
            f"config argument {name}={text}: expected {type(default).__name__}, "
            f"such as {name}={default}"
        )
    return value


def setting(default: Any = dataclasses.MISSING, **known: Any) -> Any:
    """Returns a dataclass field with metadata on what it changes.

    Args:
      default: the default value; for a mutable one set `factory` instead.
      **known: `factory` creates the default. `changes` is "speed" for a field that only changes
        where and how fast a run is computed, "records" for one that only changes what is measured.
        Both may differ when a run resumes; other fields may not. `inherited` is False for a field
        of a model that transfer does not take from a checkpoint.
    """
    factory = known.pop("factory", dataclasses.MISSING)
    return dataclasses.field(default=default, default_factory=factory, metadata=known)


def fields_where(cls: type, prefix: str = "", **known: Any) -> Iterator[str]:
    """Yields the dotted names of all fields, also nested ones, whose metadata has these values."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        name, hint = prefix + field.name, hints[field.name]
        if all(field.metadata.get(key) == value for key, value in known.items()):
            yield name
        else:
            for part in (hint, *typing.get_args(hint)):
                if dataclasses.is_dataclass(part) and typing.get_origin(hint) is not dict:
                    yield from fields_where(part, f"{name}.", **known)


def covered(name: str, fields: Iterable[str]) -> bool:
    """Whether a dotted name is one of the fields, or inside one of them."""
    return any(name == field or name.startswith(field + ".") for field in fields)


def build(cls: type, values: Mapping[str, Any], path: str = "config") -> Any:
    """Builds the frozen dataclass `cls` from a ConfigDict or nested mappings, such as parsed JSON.

    Returns `values` itself if it is already a `cls`.

    A class method `upgrade` of `cls` translates names of earlier versions; `select` chooses the
    class from the values.

    Raises ValueError, with the full path, for a field that is unknown (with the nearest known
    one), missing or of another type.
    """
    if isinstance(values, cls):
        return values
    if isinstance(values, ml_collections.ConfigDict):
        values = values.to_dict()
    if hasattr(cls, "select"):
        cls = cls.select(values)
    if hasattr(cls, "upgrade"):
        values = cls.upgrade(values)
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for name in values:
        if name not in fields:
            raise unknown(f"field of {path}", name, fields)
    missing = [
        name
        for name, f in fields.items()
        if name not in values
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise InputError(f"{path} lacks {', '.join(missing)}: set it in the recipe")
    return cls(**{k: _convert(hints[k], v, f"{path}.{k}") for k, v in values.items()})


def _convert(hint: Any, value: Any, path: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if type(None) in args and (value is None or str(value).lower() == "none"):
            return None
        options = [a for a in args if a is not type(None)]
        for option in options[:-1]:
            try:
                return _convert(option, value, path)
            except (TypeError, ValueError):
                continue
        return _convert(options[-1], value, path)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise InputError(f"{path} = {value!r}: expected the fields of {hint.__name__}")
        return build(hint, value, path)
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise InputError(f"{path} = {value!r}: expected names with values")
        return {k: _convert(args[1], v, f"{path}.{k}") for k, v in value.items()}
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, Iterable):
            raise InputError(f"{path} = {value!r}: expected a list")
        value = tuple(value)
        if args[-1] is Ellipsis:
            args = (args[0],) * len(value)
        if len(args) != len(value):
            raise InputError(f"{path} = {value!r}: expected {len(args)} items")
        return tuple(
            _convert(a, v, f"{path}[{i}]") for i, (a, v) in enumerate(zip(args, value, strict=True))
        )
    if hint is float and type(value) is int:
        value = float(value)
    if hint is float and type(value) is float:
        _check_float(value, path)
    if isinstance(hint, type) and type(value) is not hint:
        raise InputError(
            f"{path} = {value!r}: expected {hint.__name__}, found {type(value).__name__}"
        )
    return value


def _check_float(value: float, path: str) -> None:
    """Raises ValueError for a number that float32 can't hold, or rounds to 0 or 1."""
    if not math.isfinite(value):
        raise InputError(f"{path} = {value}: expected a finite number")
    least, most = 2.0**-126, (2 - 2.0**-23) * 2.0**127
    if value and not least <= abs(value) <= most:
        raise InputError(f"{path} = {value}: expected 0, or a size of {least:.1e} to {most:.1e}")
    if 1 - 2.0**-25 <= abs(value) < 1:
        raise InputError(f"{path} = {value!r} is 1 in float32: expected 1, or less by 1e-7")


WORKFLOW = ("sweep", "split", "fit_memory", "memory_gib", "export")


def with_workflow(values: Mapping[str, Any]) -> dict[str, Any]:
    """Moves a recipe's `sweep` and its related fields, if any, into the group `workflow`.

    In recipes of earlier versions they are outside.
    """
    if values.get("sweep") is None:
        return dict(values)
    old = {name: values[name] for name in WORKFLOW if name in values}
    rest = {name: value for name, value in values.items() if name not in old}
    return {**rest, "workflow": {**old, **(values.get("workflow") or {})}}


def recipe(**fields: Any) -> ml_collections.ConfigDict:
    """Returns a recipe for `get_config`: the fields, and empty groups that flags can fill."""
    fields = with_workflow(fields)
    if fields.get("workflow") is not None:
        fields["workflow"] = {"split": {}, "sweep": {}, **fields["workflow"]}
    groups = (
        "augmentation",
        "checkpoint",
        "data",
        "distill",
        "evaluators",
        "loss",
        "masked_patches",
        "mesh",
        "metrics",
        "model",
        "optimizer",
        "schedule",
    )
    return ml_collections.ConfigDict({**{group: {} for group in groups}, **fields})


# Without a published split, the first images of `train` are held out.
HELD_OUT = {"train": "train[51200:]", "validation": "train[:51200]"}
PRETRAINING_SPLITS = {  # big_vision's
    "imagenet2012": {"train": "train[:99%]", "validation": "train[99%:]", "test": "validation"},
    "imagenet21k": {
        "train": "full[51200:]",
        "validation": "full[25600:51200]",
        "test": "full[:25600]",
    },
}


def pretraining_data(dataset: str, preprocess: str = "inception_crop|flip") -> dict[str, Any]:
    """Returns the fields `data` and `evaluators` of a recipe that trains on a large dataset."""
    splits = dict(PRETRAINING_SPLITS.get(dataset, HELD_OUT))
    train = {"dataset": dataset, "split": splits.pop("train"), "preprocess": preprocess}
    evaluation = {"dataset": dataset, "preprocess": "central_crop(0.875)"}
    return {
        "data": train,
        "evaluators": {
            name: {"data": {**evaluation, "split": split}, "batch_size": 4096}
            for name, split in splits.items()
        },
    }


HALF_STAGES = (
    {"share": 0.6, "image_size": 160},
    {"share": 0.2, "image_size": 192},
    {"share": 0.2},
)


def half_cost(values: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Returns a pretraining recipe at 224 px for at most 0.4 of the FLOPs.

    Muon for 0.6 of the epochs: arXiv 2502.16982 reports about half of AdamW's compute, for language
    models, with AdamW's rates and weight decay. Of these the first 60 % at 160 px, the next 20 % at
    192: growing sizes follow EfficientTrain (arXiv 2211.09703), which reports less than 2/3 of the
    time at the same accuracy. The shares are ours.
    """
    values.epochs *= 0.6
    values.schedule.warmup = round(0.6 * values.schedule.warmup)
    values.optimizer.name = "muon"
    values.stages = HALF_STAGES
    return values


@contextlib.contextmanager
def explained_errors() -> Iterator[None]:
    """Ends the command with an input error's message, without a traceback."""
    try:
        yield
    except BrokenPipeError:  # `| head` has stopped reading
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (InputError, OSError) as error:
        sys.exit(f"error: {printable(str(error))}")


def printable(text: str) -> str:
    """Escapes characters that control a terminal or can't be shown, as `\\u001b`.

    Names of files and classes are untrusted. Line breaks and tabs stay.
    """

    def shown(c: str) -> bool:
        if c in _BIDI:
            return False
        return c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs", "Zl", "Zp")

    return "".join(c if shown(c) else f"\\u{ord(c):04x}" for c in text)


_BIDI = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # change the text's direction
