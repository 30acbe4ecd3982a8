"""Stratified splits: every class is shared among the parts in the same proportions."""

from collections.abc import Mapping

import numpy as np

from vit_jax.config import InputError


def stratified_split(
    labels: np.ndarray, fractions: Mapping[str, float], seed: int
) -> dict[str, np.ndarray]:
    """Indices of each part, ascending: labels [N] -> {name: int64 [n]}, every example in one part.

    Each class is cut by itself, after a shuffle that depends on the seed and on the class alone, so
    other classes can come and go. The first part is never left without an example of a class; of a
    class with too few examples for all parts, those with the larger fractions get one.

    Raises ValueError for fractions that don't make 1.
    """
    names, shares = list(fractions), np.array(list(fractions.values()))
    if not np.isclose(shares.sum(), 1) or shares.min() <= 0:
        raise InputError(f"fractions {dict(fractions)}: expected positive ones that make 1")
    parts = {name: [] for name in names}
    for label in np.unique(labels):
        indices = np.flatnonzero(labels == label)
        rng = np.random.default_rng([seed, int(label)])
        for name, chosen in zip(names, _cut(rng.permutation(indices), shares), strict=True):
            parts[name].append(chosen)
    return {name: np.sort(np.concatenate(chosen)) for name, chosen in parts.items()}


def _cut(indices: np.ndarray, shares: np.ndarray) -> list[np.ndarray]:
    """By largest remainders: sizes are within 1 of the exact ones, and none is 0 in vain."""
    exact = shares * len(indices)
    sizes = np.floor(exact).astype(int)
    for i in np.argsort(sizes - exact, kind="stable")[: len(indices) - sizes.sum()]:
        sizes[i] += 1
    for i in np.argsort(-shares, kind="stable"):  # an empty part takes one of the largest
        if sizes[i] == 0 and sizes.max() > 1:
            sizes[sizes.argmax()] -= 1
            sizes[i] = 1
    if sizes[0] == 0:
        sizes[sizes.argmax()] -= 1
        sizes[0] = 1
    return np.split(indices, np.cumsum(sizes)[:-1])
