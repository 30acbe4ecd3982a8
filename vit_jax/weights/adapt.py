"""Fits a checkpoint's parameters to another model, and reports on every tensor.

Parameters here are flat: "/"-joined name -> array.
"""

import dataclasses
import math
import re
from collections.abc import Iterable

import numpy as np

from vit_jax.config import unknown
from vit_jax.models import names
from vit_jax.models.stacking import flatten, stack, unflatten, unstack

# The paper's fine-tuning (section 3.2): a new head, and none of the pretraining head's other layer,
# nor of what masked patch prediction needs (appendix B.1.2).
REINITIALIZE = (names.HEAD,)
DROP = names.PRETRAINING_ONLY

_ADVICE = {  # on tensors whose shape doesn't fit
    names.POSITIONS: "The checkpoint's position embeddings are taken for those of a square "
    "grid of patches: if they are of another, say which in source_grid.",
    names.RELATIVE_POSITIONS: "Relative positions belong to one grid of patches and cannot be "
    "resized: add '.*relative_embedding' to reinitialize.",
    names.TOKEN_MIXING: "A Mixer's token mixing belongs to one number of patches and cannot be "
    "resized: choose an image size that gives as many.",
}


@dataclasses.dataclass(frozen=True)
class AdaptReport:
    """What became of every tensor: names, sorted."""

    loaded: tuple[str, ...]
    resized: tuple[str, ...]  # position embeddings and patch kernels, with their shapes
    initialised: tuple[str, ...]  # fresh in the model
    dropped: tuple[str, ...]  # left in the checkpoint

    def __str__(self) -> str:
        lines = [f"loaded {len(self.loaded)} tensors"]
        for kind in ("resized", "initialised", "dropped"):
            if listed := getattr(self, kind):
                lines.append(f"{kind} {len(listed)}: " + ", ".join(listed))
        return "\n".join(lines)


def adapt(
    source: dict,
    target: dict,
    *,
    grid: tuple[int, int] | None,
    source_grid: tuple[int, int] | None = None,
    reinitialize: tuple[str, ...] = REINITIALIZE,
    drop: tuple[str, ...] = DROP,
) -> tuple[dict, AdaptReport]:
    """Takes the parameters of `source` into the tree of `target`, a freshly initialised model.

    Layers are stacked or unstacked as `target` has them, position embeddings resized to its grid,
    patch kernels to its patch. The regexes match whole names, as they are in `target`'s layout.

    Args:
        source: nested dict of arrays.
        target: nested dict of arrays, or of their shapes.
        grid: the target's patches (rows, columns), None where it has none: `Model.grid`.
        source_grid: the source's patches; None: of a square.
        reinitialize: regexes of tensors to leave as they are in `target`.
        drop: regexes of tensors of `source` that `target` need not have.

    Returns:
        The filled tree and the report. Leaves that were not loaded are `target`'s own.

    Raises:
        ValueError: a tensor has no counterpart, or one of another shape (lists all of them, both
            sides); a regex that isn't among the defaults matches nothing.
    """
    target = flatten(target)
    source = {name: np.asarray(array) for name, array in flatten(source).items()}
    source = _match_layout(source, target)
    fresh = _select("reinitialize", reinitialize, target)
    left = (_select("drop", drop, source) - target.keys()) | (fresh & source.keys())
    missing = target.keys() - source.keys() - fresh
    surplus = source.keys() - target.keys() - left

    filled, loaded, resized, misfits = dict(target), [], [], {}
    for name in (target.keys() & source.keys()) - fresh:
        array, shape = source[name], target[name].shape
        old, new = _unfold(name, array.shape, source_grid), _unfold(name, shape, grid)
        other_grid = re.fullmatch(names.RELATIVE_POSITIONS, name) and source_grid not in (
            None,
            grid,
        )
        if old == new and not other_grid:
            filled[name] = array
            loaded.append(name)
        elif array.ndim == len(shape) and (
            (fitted := _resize(name, array.reshape(old), new)) is not None
        ):
            filled[name] = fitted.reshape(shape)
            resized.append(f"{name} {old} -> {new}")
        else:
            misfits[name] = f"{old} in the checkpoint, {new} here"

    if missing or surplus or misfits:
        problems = {
            **misfits,
            **{n: f"{target[n].shape} in the model, not in the checkpoint" for n in missing},
            **{n: f"{source[n].shape} in the checkpoint, not in the model" for n in surplus},
        }
        advice = [text for regex, text in _ADVICE.items() if _matching(regex, misfits)]
        if loaded:
            advice += _suggest("checkpoint", "drop", drop, surplus, target)
            advice += _suggest("model", "reinitialize", reinitialize, missing, source)
        raise ValueError(
            "the checkpoint is of another architecture than the model:\n"
            + "\n".join(f"  {name}: {problem}" for name, problem in sorted(problems.items()))
            + "\nUse the architecture of the checkpoint; name tensors to leave out in drop, "
            + "\n".join(["tensors to start afresh in reinitialize.", *advice])
        )
    report = AdaptReport(*(tuple(sorted(group)) for group in (loaded, resized, fresh, left)))
    return unflatten(filled), report


def _matching(regex: str, among: Iterable[str]) -> set[str]:
    return {name for name in among if re.fullmatch(regex, name)}


def _modules(among: Iterable[str]) -> set[str]:
    """Regexes of what stands at the top: "cls" -> "cls", "head/bias" -> "head/.*"."""
    return {re.sub("/.*", "/.*", name) for name in among}


def _suggest(
    side: str, option: str, given: tuple[str, ...], among: Iterable[str], others: Iterable[str]
) -> list[str]:
    """What one side alone has all of, such as a class token, may well be meant to differ."""
    extra = sorted(_modules(among) - _modules(others))
    value = (*given, *extra)
    return [f"If only the {side} is to have {', '.join(extra)}: {option}={value}."] * bool(extra)


def _select(kind: str, regexes: tuple[str, ...], among: Iterable[str]) -> set[str]:
    """The names that any of the regexes matches."""
    selected = set()
    for regex in regexes:
        try:
            matched = _matching(regex, among)
        except re.error as error:
            raise ValueError(f"{kind}: {regex!r} is no regular expression: {error}") from error
        if not matched and regex not in REINITIALIZE + DROP:  # which are for models of all kinds
            raise unknown(f"tensor in {kind}", regex, _modules(among))
        selected |= matched
    return selected


def _match_layout(source: dict, target: dict) -> dict:
    """Stacks or unstacks the source's layers as the target has them."""
    layers = unstack(source)
    stacked = next((target[name] for name in target if names.is_stacked(name)), None)
    return layers if stacked is None else stack(layers, stacked.shape[0])


def _unfold(name: str, shape: tuple[int, ...], grid: tuple[int, int] | None) -> tuple[int, ...]:
    """[..., N, D] of position embeddings -> [..., rows, columns, D], of a grid of N patches."""
    if not re.fullmatch(names.POSITIONS, name) or len(shape) < 3:
        return shape
    *batch, patches, width = shape
    rows, columns = grid or (math.isqrt(patches),) * 2
    return (*batch, rows, columns, width) if rows * columns == patches else shape


def _resize(name: str, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray | None:
    """Resizes position embeddings and patch kernels; None for other tensors."""
    old = array.shape
    if (
        re.fullmatch(f"{names.POSITIONS}|{names.POSITION_AXES}", name)
        and len(old) == len(shape) >= 4
    ):
        rest, new = (*old[:-3], old[-1]), (*shape[:-3], shape[-1])
        return resize_positions(array, shape[-3:-1]) if rest == new else None
    if re.fullmatch(names.PATCH_KERNEL, name) and len(old) == 4 and old[2:] == shape[2:]:
        return resize_patch_kernel(array, shape[:2])
    return None


def resize_positions(table: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """[..., r, c, D] -> [..., *grid, D]: bilinear, corner on corner.

    As the published fine-tuning code does (section 3.2 of the paper).
    """
    down, along = (
        _interpolation(n, m, corners=True) for n, m in zip(table.shape[-3:-1], grid, strict=True)
    )
    return np.einsum("...rcd,Rr,Cc->...RCd", table, down, along, optimize=True).astype(np.float32)


def resize_patch_kernel(kernel: np.ndarray, patch: tuple[int, int]) -> np.ndarray:
    """[p, q, C, D] -> [*patch, C, D]: on resized patches the tokens of before.

    FlexiViT's pseudo-inverse (arXiv 2212.08013, section 3.4): of all kernels, the one whose tokens
    of bilinearly resized patches differ least, in the mean square over white-noise patches, from
    the old kernel's of the patches themselves. To a larger patch they don't differ at all.
    """
    # The resizing is separable, and so is its pseudo-inverse.
    down, along = (
        np.linalg.pinv(_interpolation(n, m, corners=False).T)
        for n, m in zip(kernel.shape[:2], patch, strict=True)
    )
    return np.einsum("pqcd,Pp,Qq->PQcd", kernel, down, along, optimize=True).astype(np.float32)


def _interpolation(old: int, new: int, *, corners: bool) -> np.ndarray:
    """[new, old]: linear interpolation, with the centres of the first and last elements fixed
    (`corners`), or their outer edges."""
    # With its default mode scipy takes some last elements for outside, and puts 0 there.
    options = {"order": 1, "mode": "nearest", "grid_mode": not corners}
    from scipy import ndimage  # slow to import, and few checkpoints are resized

    return ndimage.zoom(np.eye(old), (new / old, 1), **options)
