"""Stratified splits: every class is shared among the parts in the same proportions."""

from collections.abc import Mapping

import numpy as np

from vit_jax.config import InputError


def stratified_split(
    labels: np.ndarray, fractions: Mapping[str, float], seed: int
) -> dict[str, np.ndarray]:
    """Splits examples into parts: labels [N] -> {part: ascending indices, int64 [n]}.

    Every example is in one part. Each class is cut by itself, after a shuffle that depends on the
    seed and the class alone, so adding or removing other classes changes nothing. The first part
    gets at least one example of each class. If a class has too few examples for all parts, the
    parts with the larger fractions get one each.

    Raises ValueError unless the fractions are positive and sum to 1.
    """
    names, shares = list(fractions), np.array(list(fractions.values()))
    if not np.isclose(shares.sum(), 1) or shares.min() <= 0:
        raise InputError(f"fractions {dict(fractions)}: expected positive ones that sum to 1")
    parts = {name: [] for name in names}
    for label in np.unique(labels):
        indices = np.flatnonzero(labels == label)
        rng = np.random.default_rng([seed, int(label)])
        for name, chosen in zip(names, _cut(rng.permutation(indices), shares), strict=True):
            parts[name].append(chosen)
    return {name: np.sort(np.concatenate(chosen)) for name, chosen in parts.items()}


def _cut(indices: np.ndarray, shares: np.ndarray) -> list[np.ndarray]:
    """Cuts by largest remainders: sizes are within 1 of exact, and empty only if unavoidable."""
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
