"""A formula-driven pretraining set of textures and shapes in colour: `textures/1000`.

A class is a random procedure, after "Procedural Image Programs for Representation Learning"
(Baradad et al., NeurIPS 2022): two to four layers, each a field over the plane (waves, rings,
noise, ridges, cells, cracks, characters, polygons) that is warped, cut at a threshold and coloured.
As in `data.formula`, whose law on exact arithmetic holds here too, image i is a pure function of
(seed, i). All fields have the values [0, 1]; S is the image's side.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from vit_jax.data.formula import CLASS, INSTANCE, FormulaSet, between, uniform

LAYERS, DRAWS = 4, 64  # most layers; random numbers of each
TAIL = 32  # random numbers of the whole image


@dataclass(frozen=True)
class Textures(FormulaSet):
    """Layers of coloured fields, by default of 64 pixels.

    An instance moves, turns and scales the plane, perturbs every parameter, and varies colours,
    light, contrast and noise; half of the instances have colours of their own. The fields are those
    of the base class.
    """

    image_size: int = 64

    def _draw(self, label: int, index: int) -> np.ndarray:
        size = self.image_size
        u = uniform(LAYERS * DRAWS + TAIL, self.seed, CLASS, label)
        v = uniform(LAYERS * DRAWS + TAIL, self.seed, INSTANCE, index)
        of_class, of_image = u[-TAIL:], v[-TAIL:]
        u, v = u[:-TAIL].reshape(LAYERS, DRAWS), v[:-TAIL].reshape(LAYERS, DRAWS)

        plane = _plane(size, of_image[:4])
        plane = _warped(plane, of_class[:3], index)
        grey = of_class[3] < 0.25 or of_image[4] < 0.15
        own_colours = of_image[5] < 0.5
        picture = np.empty((size, size, 3), np.float32)
        picture[:] = _colour(u[0, :3], v[0, :3], own_colours)
        for layer in range(2 + int(3 * of_class[4])):
            # A layer's parameters are its class's but for a few percent.
            p = np.clip(u[layer, 8:] + between(-0.04, 0.04, v[layer, 8:]), 0, 0.999)
            field = FAMILIES[int(len(FAMILIES) * u[layer, 7])](plane, p, (index, layer))
            ink = np.clip((field - between(0.25, 0.75, p[0])) * between(1.5, 12, p[1]) + 0.5, 0, 1)
            colour = _colour(u[layer, 3:6], v[layer, 3:6], own_colours)
            opacity = between(0.5, 1.0, u[layer, 6])
            picture += (colour - picture) * (ink * np.float32(opacity))[..., None]
        if grey:
            picture[:] = np.float32(0.3) * picture[..., :1] + np.float32(0.7) * picture[..., 1:2]
        return _exposed(picture, of_image[6:], self.seed, index)


def _plane(size: int, u: np.ndarray) -> np.ndarray:
    """Coordinates of the pixels, float32 [2, S, S], about -1 to 1: turned, scaled and moved."""
    axis = (2 * np.arange(size) + 1) / size - 1
    x, y = np.meshgrid(axis, axis)
    t = between(-0.12, 0.12, u[0])  # tan(angle / 2)
    cos, sin = (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)
    scale = between(0.75, 1.3, u[1])
    shift = between(-0.3, 0.3, u[2:4])
    plane = np.stack([cos * x - sin * y, sin * x + cos * y]) * scale + shift[:, None, None]
    return plane.astype(np.float32)


def _warped(plane: np.ndarray, u: np.ndarray, index: int) -> np.ndarray:
    """The plane, bent by noise: half of the classes more than a little."""
    strength = np.float32(0.02 + 0.5 * max(0.0, u[0] - 0.5))
    frequency = np.float32(between(0.7, 3.0, u[1]))
    bends = [_noise(plane * frequency, index, LAYERS + axis) for axis in (0, 1)]
    return plane + strength * (2 * np.stack(bends) - 1)


def _colour(u: np.ndarray, v: np.ndarray, own: bool) -> np.ndarray:
    """Red, green and blue: a class's with small changes, or an image's own."""
    return (v if own else np.clip(u + between(-0.1, 0.1, v), 0, 1)).astype(np.float32)


def _exposed(picture: np.ndarray, u: np.ndarray, seed: int, index: int) -> np.ndarray:
    """uint8 [S, S, 3] under light from one side, with contrast and pixel noise."""
    size = len(picture)
    axis = ((2 * np.arange(size) + 1) / size - 1).astype(np.float32)
    slope = between(-0.3, 0.3, u[:2]).astype(np.float32)
    light = 1 + slope[0] * axis + slope[1] * axis[:, None]
    contrast = np.float32(between(0.4, 1.1, u[2]))
    level = np.float32(between(0.25, 0.75, u[3]))
    picture = (picture - np.float32(0.5)) * contrast * light[..., None] + level
    noise = uniform(size * size, seed, INSTANCE, index, 1).reshape(size, size, 1)
    strength = np.float32(0.15 * u[4] * u[4])
    picture += strength * (noise.astype(np.float32) - np.float32(0.5))
    return np.floor(255 * np.clip(picture, 0, 1)).astype(np.uint8)


def _turned(plane: np.ndarray, u: float) -> np.ndarray:
    """The plane turned by up to half a turn, by u in [0, 1)."""
    t = between(-1, 1, u)
    cos, sin = np.float32((1 - t * t) / (1 + t * t)), np.float32(2 * t / (1 + t * t))
    x, y = plane
    return np.stack([cos * x - sin * y, sin * x + cos * y])


def _triangle(x: np.ndarray) -> np.ndarray:
    """A smooth wave of period 1, without sin."""
    x = np.abs(2 * (x - np.floor(x)) - 1)
    return x * x * (3 - 2 * x)


@dataclass(frozen=True)
class _Lattice:
    """A random number float32 in [0, 1) for each point of the lattice under a plane.

    `column` and `row`: the pixels' cells, int64 [S, S].
    """

    column: np.ndarray
    row: np.ndarray

    @cached_property
    def _index(self) -> tuple[np.ndarray, int, int]:
        """(position of each pixel's cell in the table, the table's width, its height)."""
        left, top = self.column.min() - 1, self.row.min() - 1
        width, height = int(self.column.max() - left) + 2, int(self.row.max() - top) + 2
        return (self.row - top) * width + (self.column - left), width, height

    def table(self, *key: int) -> Callable[[int, int], np.ndarray]:
        """(down, right) -> the numbers of the cells so far from the pixels', float32 [S, S]."""
        index, width, height = self._index
        numbers = uniform(width * height, *key).astype(np.float32)
        return lambda down, right: numbers[index + (down * width + right)]


def _noise(plane: np.ndarray, *key: int) -> np.ndarray:
    """Value noise of about one bump a unit."""
    cell = np.floor(plane)
    f = plane - cell
    f = f * f * (3 - 2 * f)
    number = _Lattice(*cell.astype(np.int64)).table(*key)
    upper = number(0, 0) + f[0] * (number(0, 1) - number(0, 0))
    lower = number(1, 0) + f[0] * (number(1, 1) - number(1, 0))
    return upper + f[1] * (lower - upper)


def _waves(plane: np.ndarray, u: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Stripes, or of two directions a grid or checks."""
    x, y = _turned(plane, u[2]) * np.float32(between(0.8, 6, u[3]))
    first, second = (
        _triangle(x + np.float32(u[4])),
        _triangle(y * np.float32(between(0.5, 1, u[5]))),
    )
    return (first, np.maximum(first, second), first * second, np.abs(first - second))[int(4 * u[6])]


def _rings(plane: np.ndarray, u: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Concentric ellipses, or squares."""
    x, y = _turned(plane - between(-0.6, 0.6, u[4:6]).astype(np.float32)[:, None, None], u[2])
    y = y * np.float32(between(0.4, 1, u[6]))
    distance = np.sqrt(x * x + y * y) if u[7] < 0.6 else np.maximum(np.abs(x), np.abs(y))
    return _triangle(distance * np.float32(between(0.4, 4, u[3])))


def _clouds(plane: np.ndarray, u: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """One to three octaves of noise, longer in one direction."""
    x, y = _turned(plane, u[2]) * np.float32(between(1, 8, u[3]))
    plane = np.stack([x, y * np.float32(between(0.15, 1, u[4]))])
    total, weights, share, weight = 0, 0, np.float32(between(0.3, 0.8, u[5])), np.float32(1)
    for octave in range(1 + int(3 * u[6])):
        total = total + weight * _noise(plane * 2**octave, *key, octave)
        weights, weight = weights + weight, weight * share
    return np.clip(1.6 * total / weights - 0.3, 0, 1)


def _ridges(plane: np.ndarray, u: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Crests of noise: veins."""
    return 1 - np.minimum(3 * np.abs(2 * _clouds(plane, u, key) - 1), 1)


def _cells(plane: np.ndarray, u: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Cells around random points (Worley, SIGGRAPH 1996): dots, cones, walls or flat mosaics."""
    x, y = _turned(plane, u[2]) * np.float32(between(1, 5, u[3]))
    y = y * np.float32(between(0.5, 1, u[4]))
    left, top = np.floor(x), np.floor(y)
    lattice = _Lattice(left.astype(np.int64), top.astype(np.int64))
    across, along, owners = (lattice.table(*key, part) for part in range(3))
    x, y, spread = x - left - 0.5, y - top - 0.5, np.float32(between(0.2, 1, u[5]))
    nearest = np.full(x.shape, 9, np.float32)
    second, owner = nearest, nearest
    for down, right in itertools.product((-1, 0, 1), repeat=2):
        dx = spread * (across(down, right) - 0.5) + (right - x)
        dy = spread * (along(down, right) - 0.5) + (down - y)
        distance = dx * dx + dy * dy
        second = np.minimum(second, np.maximum(nearest, distance))
        owner = np.where(distance < nearest, owners(down, right), owner)
        nearest = np.minimum(nearest, distance)
    nearest, second = np.sqrt(nearest), np.sqrt(second)
    kind = int(4 * u[6])
    if kind == 0:
        return np.clip(1.2 - 2 * nearest, 0, 1)
    return (owner, nearest, 1 - np.minimum(4 * (second - nearest), 1))[kind - 1]


def _distance(plane: np.ndarray, points: np.ndarray) -> np.ndarray:
    """The distance from each pixel to polylines, float32 [lines, points, 2] -> [S, S]."""
    points = points.astype(np.float32)
    start = points[:, :-1].reshape(-1, 2, 1, 1)
    along = (points[:, 1:] - points[:, :-1]).reshape(-1, 2, 1, 1)
    dx, dy = plane[0] - start[:, 0], plane[1] - start[:, 1]
    length = along[:, 0] * along[:, 0] + along[:, 1] * along[:, 1] + np.float32(1e-6)
    t = np.clip((dx * along[:, 0] + dy * along[:, 1]) / length, 0, 1)
    dx, dy = dx - t * along[:, 0], dy - t * along[:, 1]
    return np.sqrt((dx * dx + dy * dy).min(axis=0))


def _cracks(plane: np.ndarray, u: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """One to three random walks across the image."""
    count = 1 + int(3 * u[2])
    first, last = between(-1.2, 1.2, u[4:16].reshape(2, 3, 2)[:, :count])
    t = (np.arange(6) / 5)[:, None]
    walk = between(-0.25, 0.25, u[16:52].reshape(3, 6, 2)[:count])
    lines = first[:, None] * (1 - t) + last[:, None] * t + walk
    return 1 - np.minimum(_distance(plane, lines) * np.float32(between(6, 25, u[3])), 1)


def _characters(plane: np.ndarray, u: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """One to three strokes, quadratic curves through the middle."""
    count = 1 + int(3 * u[2])
    points = between(-0.75, 0.75, u[4:22].reshape(3, 3, 2)[:count])
    t = (np.arange(6) / 5)[:, None]
    weights = ((1 - t) * (1 - t), 2 * t * (1 - t), t * t)
    curves = sum(w * points[:, i, None] for i, w in enumerate(weights))
    return 1 - np.minimum(_distance(plane, curves) * np.float32(between(2, 8, u[3])), 1)


def _polygons(plane: np.ndarray, u: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """A convex polygon of three to seven sides, soft towards its edge, or its outline."""
    x, y = plane - between(-0.5, 0.5, u[4:6]).astype(np.float32)[:, None, None]
    reach = np.float32(between(0.25, 0.7, u[3]))
    field, sides = np.full(x.shape, -9, np.float32), 3 + int(5 * u[2])
    for side in range(sides):
        t = 2 * (side + u[8 + side]) / sides - 1  # a rational point of the circle
        t = t / (1 - 0.8 * t * t)
        cos, sin = np.float32((1 - t * t) / (1 + t * t)), np.float32(2 * t / (1 + t * t))
        far = np.float32(between(0.6, 1.2, u[16 + side])) * reach
        field = np.maximum(field, cos * x + sin * y - far)
    if u[6] < 0.35:
        return 1 - np.minimum(np.abs(field) * np.float32(between(4, 12, u[7])), 1)
    return np.clip(0.5 - field * np.float32(between(1, 8, u[7])), 0, 1)


Family = Callable[[np.ndarray, np.ndarray, tuple[int, int]], np.ndarray]
# Fields by a draw of the class; characters and polygons twice, as shapes are what photographs show.
FAMILIES: tuple[Family, ...] = (
    *(_waves, _rings, _clouds, _ridges, _cells, _cracks, _characters, _polygons),
    *(_clouds, _cells, _characters, _polygons),
)
