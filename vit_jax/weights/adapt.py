"""Adapts a checkpoint's parameters to another model, and reports on every tensor.

Internal functions take flat parameters: "/"-joined name -> array.
"""

import dataclasses
import math
import re
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.config import InputError, unknown
from vit_jax.models import names
from vit_jax.models.stacking import flatten, stack, unflatten, unstack
from vit_jax.models.variants import described_model

# Fine-tuning as in arXiv 2010.11929: a new head, without the pretraining head's hidden layer
# (section 3.2) and the parameters of masked patch prediction (appendix B.1.2).
REINITIALIZE = ("head/.*",)
DROP = names.PRETRAINING_ONLY

_ADVICE = {  # for tensors whose shape doesn't fit
    names.POSITIONS: "The checkpoint's position embeddings are assumed to form a square grid of "
    "patches: for another grid set source_grid.",
    names.RELATIVE_POSITIONS: "Relative positions cannot be resized to another grid of patches: "
    "add '.*relative_embedding' to reinitialize.",
    names.TOKEN_MIXING: "A Mixer's token mixing cannot be resized to another number of patches: "
    "choose an image size that gives the same number.",
}


@dataclasses.dataclass(frozen=True)
class AdaptReport:
    """What happened to each tensor: sorted names."""

    loaded: tuple[str, ...]
    resized: tuple[str, ...]  # position embeddings and patch kernels, with their shapes
    initialised: tuple[str, ...]  # kept from the model
    dropped: tuple[str, ...]  # in the checkpoint only

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
    method: str = "bilinear",
) -> tuple[dict, AdaptReport]:
    """Loads the parameters of `source` into the tree of `target`, an initialised model.

    Stacks or unstacks layers like `target`. Resizes position embeddings to its grid and patch
    kernels to its patch. Regexes match whole names in `target`'s layout.

    Args:
        source: nested dict of arrays.
        target: nested dict of arrays, or of their shapes.
        grid: the target's grid of patches (rows, columns): `Model.grid`.
        source_grid: the source's grid of patches; None assumes a square.
        reinitialize: regexes of tensors to keep from `target`.
        drop: regexes of tensors of `source` to ignore if `target` doesn't have them.
        method: how position embeddings are resized: the source's `ModelConfig.position_resize`.

    Returns:
        The filled tree and the report. Leaves that weren't loaded are those of `target`.

    Raises:
        ValueError: tensors without a counterpart or of another shape (the message lists all); a
            regex that matches nothing, unless it is a default.
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
        elif (fitted := resize(name, array, shape, source_grid, grid, method)) is not None:
            filled[name] = fitted
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
        raise InputError(
            "the checkpoint is of another architecture than the model:\n"
            + "\n".join(f"  {name}: {problem}" for name, problem in sorted(problems.items()))
            + "\nUse the architecture of the checkpoint; name tensors to leave out in drop, "
            + "\n".join(["tensors to start afresh in reinitialize.", *advice])
        )
    report = AdaptReport(*(tuple(sorted(group)) for group in (loaded, resized, fresh, left)))
    return unflatten(filled), report


def _matching(regex: str, among: Iterable[str]) -> set[str]:
    """The names that a regex matches; DeiT's second head is matched by what matches the head."""
    alias = (names.DISTILLATION_HEAD, "head/")
    return {n for n in among if re.fullmatch(regex, n) or re.fullmatch(regex, n.replace(*alias))}


def _modules(among: Iterable[str]) -> set[str]:
    """Returns regexes of top-level modules: "cls" -> "cls", "head/bias" -> "head/.*"."""
    return {re.sub("/.*", "/.*", name) for name in among}


def _suggest(
    side: str, option: str, given: tuple[str, ...], among: Iterable[str], others: Iterable[str]
) -> list[str]:
    """Suggests an option for top-level modules that only one side has, such as a class token."""
    extra = sorted(_modules(among) - _modules(others))
    value = (*given, *extra)
    return [f"If only the {side} is to have {', '.join(extra)}: {option}={value}."] * bool(extra)


def _select(kind: str, regexes: tuple[str, ...], among: Iterable[str]) -> set[str]:
    """Returns the names that match any of the regexes."""
    selected = set()
    for regex in regexes:
        try:
            matched = _matching(regex, among)
        except re.error as error:
            raise InputError(f"{kind}: {regex!r} is not a regular expression: {error}") from error
        if not matched and regex not in REINITIALIZE + DROP:  # defaults may match nothing
            raise unknown(f"tensor in {kind}", regex, _modules(among))
        selected |= matched
    return selected


def _match_layout(source: dict, target: dict) -> dict:
    """Stacks or unstacks the layers of `source` like those of `target`."""
    layers = unstack(source)
    stacked = next((target[name] for name in target if names.is_stacked(name)), None)
    return layers if stacked is None else stack(layers, stacked.shape[0])


def _unfold(name: str, shape: tuple[int, ...], grid: tuple[int, int] | None) -> tuple[int, ...]:
    """Returns the shape [..., rows, columns, D] for position embeddings [..., N, D]."""
    if not re.fullmatch(names.POSITIONS, name) or len(shape) < 3:
        return shape
    *batch, patches, width = shape
    rows, columns = grid or (math.isqrt(patches),) * 2
    return (*batch, rows, columns, width) if rows * columns == patches else shape


def resize(
    name: str,
    array: np.ndarray | jax.Array,
    shape: tuple[int, ...],
    source_grid: tuple[int, int] | None,
    grid: tuple[int, int] | None,
    method: str = "bilinear",
) -> np.ndarray | jax.Array | None:
    """Resizes position embeddings and patch kernels to `shape`; None for other tensors.

    Linear in `array`, which may be traced: gradients pass. Grids are those of the array and of the
    result.
    """
    old, new = _unfold(name, array.shape, source_grid), _unfold(name, shape, grid)
    if re.fullmatch(f"{names.POSITIONS}|{names.POSITION_AXES}", name):
        fits = len(old) == len(new) >= 4 and (*old[:-3], old[-1]) == (*new[:-3], new[-1])
        resized = resize_positions(array.reshape(old), new[-3:-1], method) if fits else None
        return resized if resized is None else resized.reshape(shape)
    if re.fullmatch(names.PATCH_KERNEL, name) and len(old) == len(new) == 4 and old[2:] == new[2:]:
        return resize_patch_kernel(array, shape[:2])
    return None


def _einsum(subscripts: str, array: np.ndarray | jax.Array, *matrices: np.ndarray):
    if isinstance(array, np.ndarray):
        return np.einsum(subscripts, array, *matrices, optimize=True).astype(np.float32)
    return jnp.einsum(subscripts, array, *map(jnp.float32, matrices), precision="highest")


def resize_positions(
    table: np.ndarray | jax.Array, grid: tuple[int, int], method: str = "bilinear"
) -> np.ndarray | jax.Array:
    """Resizes [..., r, c, D] to [..., *grid, D], by a method of `ModelConfig.position_resize`.

    `bilinear`, with aligned corners, is that of the published fine-tuning code (arXiv 2010.11929,
    section 3.2).
    """
    down, along = (
        _linear(n, m, corners=True) if method == "bilinear" else _torch(n, m, method)
        for n, m in zip(table.shape[-3:-1], grid, strict=True)
    )
    return _einsum("...rcd,Rr,Cc->...RCd", table, down, along)


def with_image_size(
    params: dict, description: dict, image_size: tuple[int, int]
) -> tuple[dict, dict]:
    """Returns flat parameters and description for another image size: resizes positions.

    Tensors that can't be resized, such as a Mixer's, keep their shapes. Raises ValueError for a
    size that the model can't have.
    """
    old = described_model(description)
    description = {**description, "image_size": list(image_size)}
    grid, resized = described_model(description).grid, dict(params)
    if grid is None or grid == old.grid:
        return params, description
    for name, array in params.items():
        *batch, _, width = array.shape if array.ndim > 2 else (0,) * 3
        if re.fullmatch(names.POSITIONS, name):
            shape = (*batch, math.prod(grid), width)
        elif re.fullmatch(names.POSITION_AXES, name):
            shape = (*batch[:-1], *((grid[0], 1) if "rows" in name else (1, grid[1])), width)
        else:
            continue
        resized[name] = resize(name, array, shape, old.grid, grid, old.config.position_resize)
    return resized, description


def resize_patch_kernel(
    kernel: np.ndarray | jax.Array, patch: tuple[int, int]
) -> np.ndarray | jax.Array:
    """Resizes a kernel [p, q, C, D] to [*patch, C, D] so that tokens stay nearly the same.

    FlexiViT's pseudo-inverse (arXiv 2212.08013, section 3.4). Minimises the mean squared difference
    between the new kernel's tokens of bilinearly resized patches and the old kernel's tokens of the
    original ones, over white-noise patches. The difference is zero for larger patches.
    """
    # The resizing is separable, and so is its pseudo-inverse.
    down, along = (
        np.linalg.pinv(_linear(n, m, corners=False).T)
        for n, m in zip(kernel.shape[:2], patch, strict=True)
    )
    return _einsum("pqcd,Pp,Qq->PQcd", kernel, down, along)


def fold_standardisation(params: dict, mean: Iterable[float], std: Iterable[float]) -> dict:
    """Folds a standardisation of pixels into the patch embedding of a ViT, which has no padding.

    Converts nested parameters for pixels (p - mean) / std, p in [0, 1], to those for 2 p - 1.
    """
    mean, std = (np.asarray(x, np.float64) for x in (mean, std))
    kernel = np.asarray(params["embedding"]["kernel"], np.float64)
    bias = params["embedding"].get("bias")
    if bias is None:
        raise InputError("the patch embedding has no bias to fold the mean of pixels into")
    shift = np.einsum("hwco,c->o", kernel, (0.5 - mean) / std)
    embedding = {
        "kernel": (kernel * (0.5 / std)[:, None]).astype(np.float32),
        "bias": (bias + shift).astype(np.float32),
    }
    return {**params, "embedding": embedding}


def _linear(old: int, new: int, *, corners: bool) -> np.ndarray:
    """Returns the matrix [new, old] of linear interpolation.

    `corners` aligns the centres of the first and last elements; otherwise their outer edges.
    """
    # By default scipy treats some last elements as outside and sets them to 0.
    options = {"order": 1, "mode": "nearest", "grid_mode": not corners}
    from scipy import ndimage  # slow to import, and few checkpoints are resized

    return ndimage.zoom(np.eye(old), (new / old, 1), **options)


def _torch(old: int, new: int, method: str) -> np.ndarray:
    """Returns the matrix [new, old] of PyTorch's interpolation with aligned edges.

    The kernel of `..._antialias` is widened where the grid shrinks, and its weights sum to 1 inside
    the grid. `bicubic` has another parameter, and repeats the grid's border.
    """
    scale, antialias = old / new, method.endswith("_antialias")
    width, a = (max(scale, 1.0), -0.5) if antialias else (1.0, -0.75)
    centre = (np.arange(new) + 0.5) * scale - 0.5
    reach = math.ceil(2 * width) + 1
    taps = np.floor(centre)[:, None].astype(int) + np.arange(1 - reach, reach + 1)
    x = np.abs(taps - centre[:, None]) / width
    if method.startswith("bilinear"):
        weights = np.maximum(1 - x, 0)
    else:
        near = ((a + 2) * x - (a + 3)) * x * x + 1
        weights = np.where(x <= 1, near, np.where(x < 2, (((x - 5) * x + 8) * x - 4) * a, 0.0))
    if antialias:
        weights *= (taps >= 0) & (taps < old)
        weights /= weights.sum(axis=1, keepdims=True)
    matrix = np.zeros((new, old))
    np.add.at(matrix, (np.arange(new)[:, None], taps.clip(0, old - 1)), weights)
    return matrix
