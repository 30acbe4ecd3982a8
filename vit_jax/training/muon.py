"""Muon: orthogonalised momentum for the matrices inside a model, AdamW's direction for the rest.

Keller Jordan's optimizer (https://kellerjordan.github.io/posts/muon) with the update scale of
"Muon is Scalable for LLM Training" (arXiv 2502.16982, section 2.2). With the gradient g and the
momentum m of a matrix [in, out]:

    m <- momentum * m + g
    u <- 0.2 * sqrt(max(in, out)) * orthogonalize(g + momentum * m)

The scale gives u the root mean square of AdamW's updates, so AdamW's learning rates are a good
start. Query, key and value are one matrix each over all heads; experiments/efficiency/README.md
compares this with one matrix per head.

Letters in shapes: N matrices, m shorter side, n longer side.
"""

import math
import re
from collections import defaultdict
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vit_jax.config import InputError
from vit_jax.models.names import KERNELS, PROJECTIONS, is_stacked
from vit_jax.parallel.mesh import map_over_devices, path_name

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic polynomial
ITERATIONS = 5
RMS = 0.2  # of AdamW's updates


def muon(
    kernels: str, momentum: float, momentum_dtype: Any, adam: optax.GradientTransformation, params
) -> optax.GradientTransformation:
    """Muon's direction for parameters whose whole path matches `kernels`, `adam`'s for the others.

    `params` may hold arrays or shapes. Raises ValueError if `kernels` isn't a regex, matches
    nothing, or matches a parameter that isn't a matrix.
    """
    try:
        regex = re.compile(kernels)
    except re.error as error:
        raise InputError(f"muon_kernels={kernels!r} isn't a regular expression: {error}") from error
    leaves = jax.tree_util.tree_leaves_with_path(params)
    chosen = [(path_name(path), x.shape) for path, x in leaves if regex.fullmatch(path_name(path))]
    if not chosen:
        raise InputError(
            f"muon_kernels={kernels!r} matches no parameter: the default is the kernels of "
            "Transformer and Mixer blocks; for other models use adamw or sgd, or name the kernels"
        )
    for name, shape in chosen:
        if not re.fullmatch(KERNELS, name) or min(matrix_shape(name, shape)[1:], default=0) < 2:
            raise InputError(
                f"Muon orthogonalises matrices, muon_kernels={kernels!r} matches {name} {shape}: "
                "expected kernels with at least two inputs and two outputs"
            )

    def label(tree: Any) -> Any:
        def of(path: tuple, _: Any) -> str:
            return "muon" if regex.fullmatch(path_name(path)) else "adam"

        return jax.tree_util.tree_map_with_path(of, tree)

    trace = optax.trace(momentum, nesterov=True, accumulator_dtype=momentum_dtype)
    scaled = optax.chain(trace, optax.stateless(lambda updates, _: _orthogonalize_tree(updates)))
    return optax.partition({"muon": scaled, "adam": adam}, label)


def orthogonalize(x: jax.Array) -> jax.Array:
    """Newton-Schulz iterations of matrices [N, m, n]: singular values become about 1 (0.7 to 1.2).

    Products have the platform's default precision: bfloat16 inputs on TPUs, TF32 on GPUs.
    """
    a, b, c = COEFFICIENTS
    x = x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-8)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def matrix_shape(name: str, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Returns (N, in, out) of a kernel; N is the number of scanned layers, or 1."""
    layers, axes = (shape[0], shape[1:]) if is_stacked(name) else (1, shape)
    inputs = 1 if re.fullmatch(PROJECTIONS, name) else len(axes) - 1
    return layers, math.prod(axes[:inputs]), math.prod(axes[inputs:])


def _orthogonalize_tree(updates: Any) -> Any:
    """Orthogonalises and scales all matrices, batched by shape and split over devices."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(updates)
    shapes = [matrix_shape(path_name(path), x.shape) for path, x in leaves]
    groups = defaultdict(list)  # (m, n) -> positions in `leaves`
    for i, (_, rows, columns) in enumerate(shapes):
        groups[min(rows, columns), max(rows, columns)].append(i)

    def wide(i: int, x: jax.Array) -> jax.Array:  # [N, in, out] -> [N, m, n], and back
        return x if shapes[i][1] <= shapes[i][2] else x.mT

    results = [x for _, x in leaves]
    for (_, longer), members in groups.items():
        matrices = [wide(i, results[i].reshape(shapes[i])) for i in members]
        joined = jnp.concatenate(matrices).astype(jnp.float32)
        joined = RMS * longer**0.5 * map_over_devices(orthogonalize, joined)
        ends = np.cumsum([len(x) for x in matrices])
        for i, part in zip(members, jnp.split(joined, ends[:-1]), strict=True):
            results[i] = wide(i, part).reshape(results[i].shape).astype(results[i].dtype)
    return tree.unflatten(results)
