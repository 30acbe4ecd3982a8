"""Position embeddings: every kind and place of Table 8 of arXiv 2010.11929.

Kinds (appendix D.4 unless noted):

- `learned_1d`: one learned vector per patch, in raster order; the paper's default.
- `learned_2d`: half of the vector is learned per row, half per column.
- `sincos_2d`: fixed sines and cosines of row and column (arXiv 2205.01580).
- `relative`: one learned key per head and offset between two tokens in raster order; its product
  with the query is added to the score (arXiv 1803.02155).
- `rotary`: rotates queries and keys by angles proportional to row and column (axial, arXiv
  2403.13298).
- `none`.

Places:

- `stem`: before the first block. `relative` and `rotary` act in the first block's attention only.
- `layers`: in every block, with separate parameters.
- `shared`: in every block, with the same parameters.

`Rotary` rotates the queries and keys of every block, beside any of these kinds:

- `axial`: as `rotary`; its coordinates are those of the grid, plus an offset, or scaled to a
  reference grid (EVA-02, arXiv 2303.11331; Perception Encoder, arXiv 2504.13181);
- `centred`: coordinates of the patches' centres in [-1, 1], times 2 pi (DINOv3, arXiv 2508.10104);
- `mixed`: learned frequencies of row and column for each head and block (arXiv 2403.13298).

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


ROTARY = ("none", "axial", "centred", "mixed")


@dataclasses.dataclass(frozen=True)
class Rotary:
    """Rotary positions of every block; `variants.ModelConfig` documents the fields."""

    kind: str  # one of ROTARY
    base: float
    reference: int | None
    offset: float

    def coordinates(
        self, grid: tuple[int, int], frame: tuple[int, int] | None = None
    ) -> np.ndarray:
        """Returns each patch's coordinates along rows and columns, float32 [2, patches].

        `frame`: see `coordinates`.
        """
        sides = np.float32(grid)[:, None]
        fixed = self.kind == "centred" or self.reference is not None  # whatever the grid
        index = np.stack(coordinates(grid, None if fixed else frame))[..., 0].astype(np.float32)
        if self.kind == "centred":
            return np.float32(2 * np.pi) * (2 * (index + np.float32(0.5)) / sides - 1)
        index = index + np.float32(self.offset)
        return index if self.reference is None else index / sides * np.float32(self.reference)


@dataclasses.dataclass(frozen=True)
class Positions:
    """Position embeddings for `prefix` tokens without a position, then a grid of patches."""

    kind: str  # one of KINDS
    at: str  # one of PLACES
    grid: tuple[int, int]  # rows, columns
    prefix: int  # class token, distillation token and registers
    frame: tuple[int, int] | None = None  # of fixed kinds: see `coordinates`
    rotary: Rotary | None = None

    def add(self, x: jax.Array, table: jax.Array | None) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Applies a `position_table` to x [B, N, D].

        Returns x, with the table added if its kind is in `ADDED`, and the keyword arguments that
        `MultiHeadAttention` needs for the other kinds.
        """
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
    """Returns the position table; `module` owns its parameters.

    Shapes: [1, patches, D] for the kinds in `ADDED`; [2N - 1, H, K] for `relative`; [N, K / 2]
    angles in radians for `rotary`; None for `none`.
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
            return jnp.asarray(sincos_2d(positions.grid, width, positions.frame))
        case "relative":
            shape = (2 * tokens - 1, num_heads, width // num_heads)
            return module.param("relative_embedding", init, shape)
        case "rotary":
            angles = rotary_angles(positions.grid, width // num_heads, positions.frame)
            return jnp.asarray(np.pad(angles, ((positions.prefix, 0), (0, 0))))
    return None


def coordinates(
    grid: tuple[int, int], frame: tuple[int, int] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Returns each patch's row and column, [rows * columns, 1] each.

    With `frame` they are counted in a grid of that size, laid over this one corner to corner.
    """
    axes = (np.linspace(0, of - 1, n) for n, of in zip(grid, frame or grid, strict=True))
    row, column = np.meshgrid(*axes, indexing="ij")
    return row.reshape(-1, 1), column.reshape(-1, 1)


def sincos_2d(
    grid: tuple[int, int], width: int, frame: tuple[int, int] | None = None
) -> np.ndarray:
    """Returns [1, rows * columns, D]: sin and cos of the column, then row, at D / 4 frequencies.

    As in big_vision; D must be a multiple of 4.
    """
    frequency = 10_000.0 ** -np.linspace(0, 1, width // 4)
    row, column = (axis * frequency for axis in coordinates(grid, frame))
    waves = [np.sin(column), np.cos(column), np.sin(row), np.cos(row)]
    return np.concatenate(waves, axis=1)[None].astype(np.float32)


def rotary_angles(
    grid: tuple[int, int], head_dim: int, frame: tuple[int, int] | None = None
) -> np.ndarray:
    """Returns [rows * columns, K / 2] radians: K / 4 angles of the row, K / 4 of the column."""
    frequency = 100.0 ** -(np.arange(head_dim // 4) / (head_dim // 4))
    row, column = (axis * frequency for axis in coordinates(grid, frame))
    return np.concatenate([row, column], axis=1).astype(np.float32)


def rotary_table(
    module: nn.Module, positions: Positions, num_heads: int, head_dim: int
) -> jax.Array:
    """Returns the angles of `positions.rotary`, 0 for the prefix; `module` owns learned ones.

    Shape [N, K / 2], or [N, H, K / 2] for `mixed`; radians.
    """
    rotary = positions.rotary
    row, column = rotary.coordinates(positions.grid, positions.frame)
    frequency = rotary.base ** -(np.arange(head_dim // 4) / (head_dim // 4))
    if rotary.kind == "mixed":
        # K / 4 frequencies in a random direction of each head, and as many at a right angle.
        def init(key):
            turn = jax.random.uniform(key, (num_heads, 1), maxval=2 * np.pi)
            turn = jnp.concatenate([turn + 0 * frequency, turn + np.pi / 2 + 0 * frequency], axis=1)
            return jnp.tile(frequency, 2) * jnp.stack([jnp.cos(turn), jnp.sin(turn)])

        along, down = module.param("rotary_frequencies", init)  # [H, K / 2], of columns and rows
        angles = column[:, None, None] * along + row[:, None, None] * down
    else:
        halves = [axis[:, None] * frequency.astype(np.float32) for axis in (row, column)]
        angles = jnp.asarray(np.concatenate(halves, axis=1))
    return jnp.pad(angles, ((positions.prefix, 0), *((0, 0),) * (angles.ndim - 1)))


def rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Rotates the pairs (x[..., i], x[..., i + K / 2]) of x [B, N, H, K].

    `angles`: [N, K / 2], or [N, H, K / 2] with other angles for each head.
    """
    angles = angles[:, None] if angles.ndim == 2 else angles
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x.dtype)
