"""Where a patch is: every kind of position embedding, at every place of Table 8 of the paper.

Kinds (arXiv 2010.11929, appendix D.4, unless said otherwise):

- `learned_1d`: a vector a patch, in raster order; the paper's.
- `learned_2d`: half of the vector from the patch's row, half from its column.
- `sincos_2d`: fixed, sines and cosines of row and column (arXiv 2205.01580).
- `relative`: a learned key a head for every offset between two tokens of the raster order, which
  queries meet as they meet the tokens' own keys (arXiv 1803.02155).
- `rotary`: queries and keys are rotated by angles proportional to row and column (axial, arXiv
  2403.13298).
- `none`.

Places: `stem`, before the first block; `layers`, in every block with parameters of its own;
`shared`, in every block with the same parameters. The last two kinds act inside attention: at the
stem they are those of the first block alone.

Letters in shapes: B images, N tokens, D width, H heads, K = D / H.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

ADDED = ("learned_1d", "learned_2d", "sincos_2d")
IN_ATTENTION = ("relative", "rotary")
KINDS = ("none", *ADDED, *IN_ATTENTION)
PLACES = ("stem", "layers", "shared")


@dataclasses.dataclass(frozen=True)
class Positions:
    """Of tokens that are `prefix` ones without a place in the image, then a grid of patches."""

    kind: str
    at: str
    grid: tuple[int, int]  # rows, columns
    prefix: int  # class token and registers

    def add(self, x: jax.Array, table: jax.Array | None) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Puts the table to use: (x [B, N, D] with it, or what attention is to be given)."""
        if table is None:
            return x, {}
        if self.kind == "rotary":
            return x, {"angles": table}
        if self.kind == "relative":
            order = np.arange(x.shape[1])
            return x, {"offsets": table[order[:, None] - order[None, :] + len(order) - 1]}
        padded = jnp.pad(table.astype(x.dtype), ((0, 0), (self.prefix, 0), (0, 0)))
        return x + padded, {}


def position_table(
    module: nn.Module, positions: Positions, width: int, num_heads: int
) -> jax.Array | None:
    """The position table; its parameters, where it has any, become those of `module`.

    Added kinds: [1, patches, D]; relative: [2N - 1, H, K]; rotary: [N, K / 2] angles; none: None.
    """
    rows, columns = positions.grid
    tokens = positions.prefix + rows * columns
    init = nn.initializers.normal(0.02)
    match positions.kind:
        case "learned_1d":
            return module.param("pos_embedding", init, (1, rows * columns, width))
        case "learned_2d":
            down = module.param("pos_embedding_rows", init, (1, rows, 1, width // 2))
            along = module.param("pos_embedding_columns", init, (1, 1, columns, width // 2))
            halves = [jnp.broadcast_to(x, (1, rows, columns, width // 2)) for x in (down, along)]
            return jnp.concatenate(halves, axis=-1).reshape(1, rows * columns, width)
        case "sincos_2d":
            return jnp.asarray(sincos_2d(positions.grid, width))
        case "relative":
            shape = (2 * tokens - 1, num_heads, width // num_heads)
            return module.param("relative_embedding", init, shape)
        case "rotary":
            angles = rotary_angles(positions.grid, width // num_heads)
            return jnp.asarray(np.pad(angles, ((positions.prefix, 0), (0, 0))))
    return None


def sincos_2d(grid: tuple[int, int], width: int) -> np.ndarray:
    """[1, rows * columns, D]: sin and cos of the column, then of the row, at D / 4 frequencies."""
    frequency = 10_000.0 ** -np.linspace(0, 1, width // 4)
    row, column = (axis.reshape(-1, 1) * frequency for axis in np.indices(grid))
    waves = [np.sin(column), np.cos(column), np.sin(row), np.cos(row)]
    return np.concatenate(waves, axis=1)[None].astype(np.float32)


def rotary_angles(grid: tuple[int, int], head_dim: int) -> np.ndarray:
    """[rows * columns, K / 2]: K / 4 angles from the row, K / 4 from the column; base 100."""
    frequency = 100.0 ** -(np.arange(head_dim // 4) / (head_dim // 4))
    row, column = (axis.reshape(-1, 1) * frequency for axis in np.indices(grid))
    return np.concatenate([row, column], axis=1).astype(np.float32)


def rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Rotates the pairs (x[..., i], x[..., i + K / 2]) of x [B, N, H, K] by angles [N, K / 2]."""
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x.dtype)
