"""What a Transformer sees: attention rollout, attention distance, similarity of positions, filters.

Figures 6, 7, 10, 11 and 14 of arXiv 2010.11929, as numbers; `figures.py` draws them.

Letters in shapes: B images, N tokens, H heads, L layers, D width.
"""

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.models.variants import Model

Grid = tuple[int, int]  # rows and columns of patches


def rollout(attention: jax.Array) -> jax.Array:
    """Attention of all layers together: weights [L, B, H, N, N] -> [B, N, N], rows sum to 1.

    Heads are averaged, the identity is added for the residual connection, rows are normalised, and
    layers multiplied: row n says of which input tokens output n is made (Abnar and Zuidema, arXiv
    2005.00928; appendix D.8 of arXiv 2010.11929).
    """
    layers = attention.mean(axis=2) + jnp.eye(attention.shape[-1])
    layers = layers / layers.sum(axis=-1, keepdims=True)
    rolled = layers[0]
    for layer in layers[1:]:
        rolled = layer @ rolled
    return rolled


def attention_maps(model: Model, params: dict, images: jax.Array) -> jax.Array:
    """Where a ViT or hybrid looks in images [B, H, W, 3]: rollout [B, rows, columns].

    It is the row of the class token; a model without one looks with all its patches alike.
    """
    rolled = rollout(model.intermediates(params, images)["attention"])
    prefix = model.module.positions.prefix
    seen = rolled[:, 0] if model.config.pool == "token" else rolled[:, prefix:].mean(axis=1)
    return seen[:, prefix:].reshape(-1, *model.grid)


def patch_distances(grid: Grid, cell: tuple[float, float]) -> np.ndarray:
    """Euclidean distances between the centres of patches of `cell` pixels: [N, N], in pixels."""
    centres = np.stack(np.indices(grid), axis=-1).reshape(-1, 2) * cell
    return np.linalg.norm(centres[:, None] - centres[None], axis=-1)


def mean_attention_distance(attention: jax.Array, distances: np.ndarray) -> jax.Array:
    """How far each head looks: weights [L, B, H, N, N], distances [P, P] -> pixels [L, B, H].

    The distance from a query's patch to all patches, weighted by attention, averaged over queries
    (Figure 7, right, and appendix D.7). Of N tokens the last P are patches; the others are left
    out, and what the patches' queries pay to them is shared among the patches.
    """
    patches = attention[..., -len(distances) :, -len(distances) :]
    weights = patches / patches.sum(axis=-1, keepdims=True)
    return (weights * distances).sum(axis=-1).mean(axis=-1)


def head_distances(model: Model, params: dict, images: jax.Array) -> jax.Array:
    """Mean attention distance of every head on every image [B, H, W, 3]: pixels [L, B, H]."""
    cell = tuple(side / n for side, n in zip(model.image_size, model.grid, strict=True))
    attention = model.intermediates(params, images)["attention"]
    return mean_attention_distance(attention, patch_distances(model.grid, cell))


def position_embeddings(model: Model, params: dict) -> np.ndarray:
    """The vector that is added at each place: [rows, columns, D] (section 3.1, equation 1).

    Raises ValueError for a model that adds none, or a different one in every layer.
    """
    config, positions = model.config, model.module.positions
    if config.position == "learned_1d" and config.position_at != "layers":
        table = params["pos_embedding"]
    elif config.position == "learned_2d" and config.position_at != "layers":
        down, along = params["pos_embedding_rows"], params["pos_embedding_columns"]
        halves = [np.broadcast_to(x, (1, *positions.grid, x.shape[-1])) for x in (down, along)]
        table = np.concatenate(halves, axis=-1)
    else:
        raise ValueError(
            f"{config.variant} has {config.position} positions in {config.position_at}: there is "
            "no one learned table to look at"
        )
    return np.asarray(table, np.float32).reshape(*positions.grid, -1)


def cosine_similarity(table: np.ndarray) -> np.ndarray:
    """Of every place to every place: [rows, columns, D] -> [rows, columns, rows, columns]."""
    unit = table / np.linalg.norm(table, axis=-1, keepdims=True)
    return np.einsum("abd,xyd->abxy", unit, unit)


def rgb_filters(model: Model, params: dict) -> np.ndarray:
    """The filters on the image itself: [side, side, 3, D], of patches or of a ResNet's root."""
    for module in ("conv_root", "embedding", "stem"):  # a hybrid's embedding sees no image
        if module in params:
            return np.asarray(params[module]["kernel"], np.float32)
    raise ValueError(f"{model.config.variant}: no filters among {', '.join(sorted(params))}")


def filter_components(filters: np.ndarray, count: int = 28) -> tuple[np.ndarray, np.ndarray]:
    """Principal components of filters [side, side, 3, D]: ([count, side, side, 3], shares [count]).

    Unit vectors, the most important first, and the share of the filters' variance along each
    (Figure 7, left). Fewer where there are fewer filters.
    """
    vectors = filters.reshape(-1, filters.shape[-1]).T
    _, lengths, components = np.linalg.svd(vectors - vectors.mean(axis=0), full_matrices=False)
    shares = lengths**2 / np.sum(lengths**2)
    return components[:count].reshape(-1, *filters.shape[:3]), shares[:count]
