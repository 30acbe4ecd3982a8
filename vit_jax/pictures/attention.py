"""Computes attention rollout, attention distance, position similarity and filters.

The numbers of Figures 6, 7, 10, 11 and 14 of arXiv 2010.11929; `figures.py` draws them.

Letters in shapes: B images, N tokens, H heads, L layers, D width.
"""

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.config import InputError
from vit_jax.models import names
from vit_jax.models.variants import Model

Grid = tuple[int, int]  # rows and columns of patches


def rollout(attention: jax.Array) -> jax.Array:
    """Combines the attention of all layers: weights [L, B, H, N, N] -> [B, N, N].

    Averages heads, adds the identity for the residual connection, normalises rows and multiplies
    layers. Row n holds the shares of the input tokens in output n and sums to 1 (Abnar and Zuidema,
    arXiv 2005.00928; arXiv 2010.11929, appendix D.8).
    """
    layers = attention.mean(axis=2) + jnp.eye(attention.shape[-1])
    layers = layers / layers.sum(axis=-1, keepdims=True)
    rolled = layers[0]
    for layer in layers[1:]:
        rolled = layer @ rolled
    return rolled


def attention_maps(model: Model, params: dict, images: jax.Array) -> jax.Array:
    """Computes the attention map of images: [B, H, W, 3] -> rollout [B, rows, columns].

    Uses the rollout's row of the class token, or the mean over patches without one. Raises
    ValueError for models other than ViTs and hybrids.
    """
    rolled = rollout(model.intermediates(params, images)["attention"])
    prefix = model.module.positions.prefix
    seen = rolled[:, 0] if model.config.has_class_token else rolled[:, prefix:].mean(axis=1)
    return seen[:, prefix:].reshape(-1, *model.grid)


def patch_distances(grid: Grid, cell: tuple[float, float]) -> np.ndarray:
    """Returns distances between the centres of patches of `cell` pixels: [N, N], in pixels."""
    centres = np.stack(np.indices(grid), axis=-1).reshape(-1, 2) * cell
    return np.linalg.norm(centres[:, None] - centres[None], axis=-1)


def mean_attention_distance(attention: jax.Array, distances: np.ndarray) -> jax.Array:
    """Computes each head's mean attention distance (Figure 7, right, and appendix D.7).

    Args:
      attention: weights [L, B, H, N, N]. The last P tokens are patches; others are removed and the
        rows renormalised.
      distances: [P, P], in pixels.

    Returns:
      [L, B, H]: distances weighted by attention, averaged over queries, in pixels.
    """
    patches = attention[..., -len(distances) :, -len(distances) :]
    weights = patches / patches.sum(axis=-1, keepdims=True)
    return (weights * distances).sum(axis=-1).mean(axis=-1)


def head_distances(model: Model, params: dict, images: jax.Array) -> jax.Array:
    """Computes mean attention distances on images [B, H, W, 3]: [L, B, H], in pixels."""
    cell = tuple(side / n for side, n in zip(model.image_size, model.grid, strict=True))
    attention = model.intermediates(params, images)["attention"]
    return mean_attention_distance(attention, patch_distances(model.grid, cell))


def position_embeddings(model: Model, params: dict) -> np.ndarray:
    """Returns the position embeddings [rows, columns, D] (section 3.1, equation 1).

    Raises ValueError for a model without them or with separate ones per layer.
    """
    config, positions = model.config, model.module.positions
    if config.position == "learned_1d" and config.position_at != "layers":
        table = params[names.POSITION]
    elif config.position == "learned_2d" and config.position_at != "layers":
        down, along = params[names.POSITION_ROWS], params[names.POSITION_COLUMNS]
        halves = [np.broadcast_to(x, (1, *positions.grid, x.shape[-1])) for x in (down, along)]
        table = np.concatenate(halves, axis=-1)
    else:
        raise InputError(
            f"{config.variant} has {config.position} positions in {config.position_at}: there is "
            "no single table of position embeddings"
        )
    return np.asarray(table, np.float32).reshape(*positions.grid, -1)


def cosine_similarity(table: np.ndarray) -> np.ndarray:
    """Computes all pairwise similarities: [rows, columns, D] -> [rows, columns, rows, columns]."""
    unit = table / np.linalg.norm(table, axis=-1, keepdims=True)
    return np.einsum("abd,xyd->abxy", unit, unit)


def rgb_filters(model: Model, params: dict) -> np.ndarray:
    """Returns the filters on RGB pixels [side, side, 3, D]: patch embedding or ResNet root."""
    for module in names.PIXEL_MODULES:
        if module in params:
            return np.asarray(params[module]["kernel"], np.float32)
    raise InputError(f"{model.config.variant}: no filters among {', '.join(sorted(params))}")


def filter_components(filters: np.ndarray, count: int = 28) -> tuple[np.ndarray, np.ndarray]:
    """Computes principal components of filters [side, side, 3, D] (Figure 7, left).

    Returns unit vectors [count, side, side, 3] in descending order of variance, and their shares of
    the variance [count]. Returns fewer if there are fewer filters.
    """
    vectors = filters.reshape(-1, filters.shape[-1]).T
    _, lengths, components = np.linalg.svd(vectors - vectors.mean(axis=0), full_matrices=False)
    shares = lengths**2 / np.sum(lengths**2)
    return components[:count].reshape(-1, *filters.shape[:3]), shares[:count]
