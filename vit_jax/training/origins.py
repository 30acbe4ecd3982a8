"""Finds where a value that isn't finite comes from, operation by operation."""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

FORWARD, BACKWARD, UPDATE = "forward", "backward", "update"
_LAYER = re.compile(r"(.*?(?:block\d+/unit\d+|block_?\d+|block\[\d+\])|[^/]+)(?=/|$)")
_INNER = ("jaxpr", "call_jaxpr", "fun_jaxpr")  # parameters of operations that call a function


@dataclasses.dataclass(frozen=True)
class Origin:
    """The operation that first made a value which isn't finite; `order` counts operations."""

    order: int
    layer: str
    phase: str
    operation: str
    shape: str
    largest: float  # the largest magnitude of its inputs

    def __str__(self) -> str:
        return (
            f"{self.phase} pass, {self.layer or 'outside of layers'}: {self.operation} makes "
            f"{self.shape}, which isn't finite; its largest input is {self.largest:.4g}"
        )


@dataclasses.dataclass(frozen=True)
class Value:
    """An array, its largest magnitude, and its origin if it isn't finite.

    `constant` marks intended infinities, such as a mask's.
    """

    array: Any
    largest: float = 0.0
    origin: Origin | None = None
    constant: bool = False


class Examination:
    """Computes a function operation by operation and traces values that aren't finite.

    `activations` has (root mean square, largest magnitude) of each layer's last output.
    """

    def __init__(self):
        self.activations: dict[str, tuple[float, float]] = {}
        self._order = 0
        self._measure = jax.jit(_measure)

    def run(self, closed: core.ClosedJaxpr, inputs: Sequence[Value], scope: str = "") -> list:
        """Returns the outputs as `Value`s."""
        jaxpr = closed.jaxpr
        values = dict(zip(jaxpr.constvars, map(self._given, closed.consts), strict=True))
        values |= dict(zip(jaxpr.invars, inputs, strict=True))
        last = {v: i for i, eqn in enumerate(jaxpr.eqns) for v in eqn.invars if _is_variable(v)}
        kept = {v for v in jaxpr.outvars if _is_variable(v)}

        def read(atom: Any) -> Value:
            return values[atom] if _is_variable(atom) else self._given(atom.val)

        for i, eqn in enumerate(jaxpr.eqns):
            stack = str(eqn.source_info.name_stack)
            outputs = self._apply(eqn, list(map(read, eqn.invars)), f"{scope}/{stack}".strip("/"))
            values |= dict(zip(eqn.outvars, outputs, strict=True))
            for atom in eqn.invars:  # frees memory
                if _is_variable(atom) and last[atom] == i and atom not in kept:
                    values.pop(atom, None)
        return list(map(read, jaxpr.outvars))

    def _apply(self, eqn: Any, inputs: list[Value], scope: str) -> list[Value]:
        name, parameters = eqn.primitive.name, eqn.params
        if name == "scan":
            return self._scan(parameters, inputs, scope)
        for inner in (parameters[key] for key in _INNER if key in parameters):
            if isinstance(inner, core.ClosedJaxpr):
                return self.run(inner, inputs, scope)
            if isinstance(inner, core.Jaxpr) and not inner.constvars and name != "pallas_call":
                return self.run(core.ClosedJaxpr(inner, ()), inputs, scope)
        bound = eqn.primitive.get_bind_params(parameters)
        functions, bound = bound if isinstance(bound, tuple) else ((), bound)  # by jax's version
        with eqn.ctx.manager:
            outputs = eqn.primitive.bind(*functions, *(v.array for v in inputs), **bound)
        outputs = outputs if eqn.primitive.multiple_results else [outputs]
        self._order += 1
        return [self._judge(array, inputs, name, scope) for array in outputs]

    def _scan(self, parameters: dict, inputs: list[Value], scope: str) -> list[Value]:
        if "ft_in" in parameters:  # from jax 0.12 on
            first, carried, _ = map(len, parameters["ft_in"].unpack())
        else:
            first, carried = parameters["num_consts"], parameters["num_carry"]
        end = first + carried
        consts, carry, rows = inputs[:first], inputs[first:end], inputs[end:]
        numbers = range(parameters["length"])
        found = {}
        for i in reversed(numbers) if parameters["reverse"] else numbers:
            row = [self._like(value, value.array[i]) for value in rows]
            outputs = self.run(parameters["jaxpr"], [*consts, *carry, *row], f"{scope}[{i}]")
            carry, found[i] = outputs[: end - first], outputs[end - first :]
        stacked = []
        for column in zip(*(found[i] for i in numbers), strict=True):
            origins = [value.origin for value in column if value.origin]
            stacked.append(
                Value(
                    jnp.stack([value.array for value in column]),
                    max(value.largest for value in column),
                    min(origins, key=lambda origin: origin.order, default=None),
                    any(value.constant for value in column),
                )
            )
        return [*carry, *stacked]

    def _judge(self, array: Any, inputs: list[Value], name: str, scope: str) -> Value:
        if not jnp.issubdtype(array.dtype, jnp.floating):
            return Value(array)
        finite, is_nan, largest, square = map(float, self._measure(array))
        layer, phase = describe(scope)
        if phase == FORWARD and layer and array.ndim > 1:
            self.activations[layer_of(layer)] = (math.sqrt(square), largest)
        if finite:
            return Value(array, largest)
        origins = [value.origin for value in inputs if value.origin]
        if origins:
            return Value(array, largest, min(origins, key=lambda origin: origin.order))
        if any(value.constant for value in inputs) and not is_nan:
            return Value(array, largest, constant=True)
        went_in = max((value.largest for value in inputs), default=0.0)
        shape = f"{array.dtype}{list(array.shape)}"
        return Value(array, largest, Origin(self._order, layer, phase, name, shape, went_in))

    def _given(self, array: Any) -> Value:
        """Wraps a constant or argument; values in it that aren't finite are intended."""
        if not jnp.issubdtype(jnp.asarray(array).dtype, jnp.floating):
            return Value(array)
        finite, _, largest, _ = map(float, self._measure(array))
        return Value(array, largest, constant=not finite)

    def _like(self, value: Value, part: Any) -> Value:
        """Wraps a part of a value; it may be finite though the whole is not."""
        found = self._given(part)
        return dataclasses.replace(found, origin=value.origin) if found.constant else found

    def arguments(self, tree: Any) -> list[Value]:
        """Wraps the leaves of a tree as inputs of `run`."""
        return list(map(self._given, jax.tree.leaves(tree)))


def _measure(array: jax.Array) -> tuple[jax.Array, ...]:
    finite = jnp.isfinite(array)
    known = jnp.where(finite, array, 0).astype(jnp.float32)
    largest = jnp.abs(known).max(initial=0.0)
    scale = jnp.maximum(largest, 1e-30)
    square = jnp.square(known / scale).mean() * jnp.square(scale) if array.size else 0.0
    return finite.all(), jnp.isnan(array).any(), largest, square


def _is_variable(atom: Any) -> bool:
    return not isinstance(atom, core.Literal)


def describe(scope: str) -> tuple[str, str]:
    """Returns (layer, phase) of an operation from its scope.

    A scope is "transpose(jvp(ViT))/Transformer/encoderblock_0/MlpBlock_0/Dense_0.product".
    """
    phase = BACKWARD if "transpose(" in scope else FORWARD if "jvp(" in scope else UPDATE
    names = scope.rpartition("jvp(")[2].split("/")[1:] if phase != UPDATE else []
    kept = [name for name in names if re.fullmatch(r"\w+(\[\d+\])?", name)]
    return "/".join(name for name in kept if name != "rematted_computation"), phase


def layer_of(name: str) -> str:
    """Returns the block, or the part outside blocks, of a parameter or an operation."""
    return re.sub(r"block\[(\d+)\]$", r"block_\1", _LAYER.match(name)[1])  # of a scan
