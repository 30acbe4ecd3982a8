"""Reads fields of other programs' JSON files, and compares what they state with tensors."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from vit_jax.config import InputError, unknown


class Stated:
    """The fields of a JSON object. A field that is absent or null has its default.

    Every method raises ValueError, in one line, for a value of another type or range.
    """

    def __init__(self, fields: Any, file: str):
        self.file = file
        if not isinstance(fields, Mapping):
            raise InputError(f"{file}: expected an object, found {_shown(fields)}")
        self.fields = fields

    def __contains__(self, name: str) -> bool:
        return self.fields.get(name) is not None

    def wrong(self, name: str, expected: str) -> InputError:
        """Returns the error for a field's value."""
        found = _shown(self.fields.get(name))
        return InputError(f"{self.file}: {name} = {found}: expected {expected}")

    def part(self, name: str) -> "Stated":
        """Returns the object in a field; an empty one by default."""
        return Stated(self.fields[name] if name in self else {}, f"{self.file}: {name}")

    def number(self, name: str, default: float | None = None, above: float = -math.inf) -> Any:
        """Returns a finite number above a bound."""
        value = self.fields.get(name)
        if value is None:
            return default
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not abs(value) < 1e300 or not value > above:
            raise self.wrong(name, "a number" + (f" above {above:g}" if above > -math.inf else ""))
        return value

    def whole(self, name: str, default: int | None = None, least: int = 0) -> Any:
        """Returns a whole number from `least` on."""
        value = self.number(name, default)
        if value is not default and (value != int(value) or value < least):
            raise self.wrong(name, f"a whole number from {least} on")
        return value if value is None else int(value)

    def flag(self, name: str, default: bool | None = None) -> Any:
        """Returns true or false."""
        value = self.fields.get(name)
        if value is not None and not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return default if value is None else value

    def text(self, name: str, default: str | None = None) -> Any:
        """Returns a string."""
        value = self.fields.get(name)
        if value is not None and not isinstance(value, str):
            raise self.wrong(name, "text")
        return default if value is None else value

    def choice(self, name: str, known: Mapping[str, str], default: str) -> str:
        """Returns our name of one of theirs: `known` maps theirs to ours."""
        value = self.text(name, default)
        if value not in known:
            raise unknown(f"{name} in {self.file}", value, known)
        return known[value]

    def triple(self, name: str, default: tuple[float, ...], positive: bool = False) -> tuple:
        """Returns three numbers, one for each channel; one number stands for three."""
        value = self.fields.get(name)
        if value is None:
            return default
        values = value if isinstance(value, list | tuple) else [value] * 3
        numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
        if len(values) == 1:
            values = [*values] * 3
        if len(values) != 3 or not numbers or not all(abs(v) < 1e30 for v in values):
            raise self.wrong(name, "three numbers, of red, green and blue")
        if positive and min(values) <= 0:
            raise self.wrong(name, "three numbers above 0")
        return tuple(map(float, values))

    def size(self, name: str, default: Any = None) -> tuple[int, int] | None:
        """Returns (height, width) from a number, a pair, or (channels, height, width)."""
        value = self.fields.get(name)
        if value is None:
            return default
        values = list(value) if isinstance(value, list | tuple) else [value] * 2
        values = values[1:] if len(values) == 3 else values
        sides = all(isinstance(v, int) and not isinstance(v, bool) for v in values)
        if len(values) != 2 or not sides or not all(0 < v < 1 << 16 for v in values):
            raise self.wrong(name, "a side in pixels, or height and width")
        return values[0], values[1]

    def names(self, name: str) -> list[str] | None:
        """Returns class names in order, from a list or from an object of index to name."""
        value = self.fields.get(name)
        if not value:
            return None
        if isinstance(value, Mapping):
            indices = [str(key) for key in value]
            if not all(key.isdecimal() and len(key) < 9 for key in indices):
                raise self.wrong(name, "class numbers as its keys")
            value = [value[key] for key in sorted(value, key=int)]
        if not isinstance(value, list | tuple) or not all(isinstance(v, str) for v in value):
            raise self.wrong(name, "names of classes")
        return list(value)


def agree(file: str, rows: Iterable[tuple[str, Any, Any]]) -> None:
    """Raises ValueError that lists each (field, stated, found) whose values differ.

    A stated value of None says nothing.
    """
    wrong = [
        f"{name} = {stated} where the tensors have {found}"
        for name, stated, found in rows
        if stated is not None and stated != found
    ]
    if wrong:
        raise InputError(
            f"{file} states another model than the file of weights: {'; '.join(wrong)}. Give the "
            "weights the config.json that they were saved with"
        )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
