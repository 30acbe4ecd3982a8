"""Formula-driven pretraining datasets: any number of images, no download.

`Strokes` draws random characters of one to three cubic Bézier strokes: the idea of Omniglot (Lake
et al., Science 2015) without its data. `Fractals` draws attractors of random iterated function
systems, after "Pre-training without Natural Images" (Kataoka et al., ACCV 2020). `Synthetic` is
for rehearsals: large images that are drawn in no time.

Image i is a pure function of (seed, i), the number of classes and the image size, bit-identical on
every machine. Random bits come from an integer hash. Floats only pass through +, -, *, / and sqrt,
whose rounding IEEE 754 defines. Sums whose order numpy or BLAS may choose are over whole numbers
and stay below 2^53, so they are exact.
"""

import itertools
import operator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from vit_jax.config import InputError

CLASS, INSTANCE = 1, 2  # purposes of random numbers: part of the hash's key

MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class FormulaSet:
    """Examples `first` to `first + num_examples - 1` of an endless set.

    Example i of the endless set has the label i % num_classes. Sources that differ only in `first`
    show images of the same classes, so a validation split is another range of indices.

    Raises ValueError for fields out of range, IndexError for an index outside the source.
    """

    num_examples: int
    num_classes: int = 1000
    image_size: int = 32  # pixels
    seed: int = 0  # changes classes and instances
    first: int = 0

    def __post_init__(self) -> None:
        least = {"num_examples": 1, "num_classes": 1, "image_size": 8, "seed": 0, "first": 0}
        for field, low in least.items():
            value = getattr(self, field)
            if not isinstance(value, int) or not low <= value < 2**62:
                raise InputError(f"{field}={value!r}: expected an int from {low} to 2**62 - 1")

    def __len__(self) -> int:
        return self.num_examples

    def __getitem__(self, i: int) -> dict[str, np.ndarray | int]:
        """Example i: {"image": uint8 [image_size, image_size, 3], "label": int}."""
        if not 0 <= operator.index(i) < self.num_examples:
            raise IndexError(f"example {i}: expected 0 to {self.num_examples - 1}")
        index = self.first + operator.index(i)
        label = index % self.num_classes
        return {"image": self._draw(label, index), "label": label}

    def _draw(self, label: int, index: int) -> np.ndarray:
        raise NotImplementedError


class Strokes(FormulaSet):
    """White characters on black.

    A class has one to three strokes; each further stroke begins where the previous one ends with
    probability 0.5. An instance moves the control points, transforms the character, and varies the
    pen's width and softness. The fields are those of the base class.
    """

    def _draw(self, label: int, index: int) -> np.ndarray:
        size = self.image_size
        u = _character(self.seed, label)
        v = uniform(32, self.seed, INSTANCE, index)

        count = 1 + int(3 * u[0])
        points = (u[3:] + between(-0.12, 0.12, v[:24])).reshape(3, 4, 2)
        for stroke in range(1, count):
            if u[stroke] < 0.5:
                points[stroke, 0] = points[stroke - 1, 3]
        b = _bernstein(3 * size // count)
        p = points[:count].transpose(2, 1, 0)[..., None]  # [2, 4, count, 1]
        curve = b[0] * p[:, 0] + b[1] * p[:, 1] + b[2] * p[:, 2] + b[3] * p[:, 3]
        curve = _pose(curve, v[24:30], size)

        # Ink is the line integral of a round bump: a sum over short pieces, weighted by length. The
        # bump is the product of a row and a column factor, so the sum is a matrix product. The
        # factors are whole numbers, so it is exact.
        step = curve[..., 1:] - curve[..., :-1]
        length = np.sqrt(step[0] * step[0] + step[1] * step[1]).reshape(-1, 1)
        middle = ((curve[..., 1:] + curve[..., :-1]) / 2).reshape(2, -1, 1)
        radius = size * between(0.06, 0.16, v[30])
        bump = 1 - np.square((np.arange(size) + 0.5 - middle) / radius)
        bump = np.square(np.maximum(bump, 0))
        bump[0] *= length / length.max()
        columns, rows = np.floor(4096 * bump)
        softness = between(0.8, 2.0, v[31])
        ink = (rows.T @ columns) * (softness * length.max() / (4096 * 4096 * radius))
        grey = np.floor(255 * np.minimum(ink, 1)).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)


class Fractals(FormulaSet):
    """Coloured attractors on black: a class is an iterated function system of affine maps.

    An instance varies the maps' parameters, the pose, the colours and the density and softness of
    the points. The fields are those of the base class.
    """

    def _draw(self, label: int, index: int) -> np.ndarray:
        size = self.image_size
        maps, cumulative = _function_system(self.seed, label)
        v = uniform(336, self.seed, INSTANCE, index)

        factors = between(0.9, 1.1, v[256:304]).reshape(2, 3, 8)[..., : maps.shape[2]]
        points, last_map = _attractor(maps * factors, cumulative, v[:256])
        column, row = np.clip(np.floor(_pose(points, v[304:310], size)), 0, size - 1)
        bins = (row * size + column) * 8 + np.repeat(last_map, 64)
        counts = np.bincount(bins.astype(np.int64), minlength=size * size * 8)

        # Per pixel, sums red, green and blue of its points and counts them; then blurs along both
        # axes. All are whole numbers, so the matrix products are exact.
        palette = np.ones((8, 4))
        palette[:, :3] = np.floor(between(128, 256, v[310:334])).reshape(8, 3)
        picture = counts.reshape(-1, 8).astype(np.float64) @ palette
        radius = size / 32 * between(0.8, 2.5, v[334])
        offsets = (np.arange(size) - np.arange(size)[:, None]) / radius
        blur = np.floor(256 * np.maximum(1 - np.square(offsets), 0))
        for _ in range(2):
            picture = (blur @ picture.reshape(size, -1)).reshape(size, size, 4).swapaxes(0, 1)
        density = picture[..., 3:]
        contrast = between(0.15, 0.6, v[335]) * np.square(size / 32 / (256 * radius))
        ink = np.minimum(contrast * density, 1)
        return np.floor(picture[..., :3] * (ink / np.maximum(density, 1))).astype(np.uint8)


@dataclass(frozen=True)
class Synthetic(FormulaSet):
    """Squares of colours, of a photograph's size: fast stand-ins for images that aren't at hand.

    A class is 8 x 8 colours; an instance averages them with its own. The fields are those of the
    base class.
    """

    image_size: int = 256

    def _draw(self, label: int, index: int) -> np.ndarray:
        colours = uniform(192, self.seed, CLASS, label) + uniform(192, self.seed, INSTANCE, index)
        colours = np.floor(128 * colours).astype(np.uint8).reshape(8, 8, 3)
        at = np.arange(self.image_size) * 8 // self.image_size
        return np.repeat(colours[at], np.bincount(at), axis=1)


def mix(z):
    """The finaliser of splitmix64 (Steele et al., OOPSLA 2014), of an int or a uint64 array."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def uniform(count: int, *key: int) -> np.ndarray:
    """float64 [count] in [0, 1), a pure function of the key."""
    state = 0
    for part in key:
        state = mix((state + part + GOLDEN) & MASK)
    counters = np.arange(count, dtype=np.uint64) * np.uint64(GOLDEN) + np.uint64(state)
    return (mix(counters) >> 11) * 2.0**-53


def between(low: float, high: float, u):
    """Maps u from [0, 1) to [low, high)."""
    return low + (high - low) * u


def _pose(xy: np.ndarray, u: np.ndarray, size: int) -> np.ndarray:
    """Shears, stretches and rotates a shape, fits it into the image and shifts it.

    Args:
      xy: float64 [2, ...], the shape's points.
      u: float64 [6] in [0, 1), the random numbers.
      size: the image's side in pixels.

    Returns:
      float64 [2, ...], in pixels; may lie slightly outside the image.
    """
    x = (xy[0] + between(-0.15, 0.15, u[0]) * xy[1]) * between(0.9, 1.1, u[1])
    t = between(-0.1, 0.1, u[2])  # tan(angle / 2): a rotation without inexact sin and cos
    cos, sin = (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)
    xy = np.stack([cos * x - sin * xy[1], sin * x + cos * xy[1]])
    axes = tuple(range(1, xy.ndim))
    low, high = xy.min(axis=axes, keepdims=True), xy.max(axis=axes, keepdims=True)
    scale = size * between(0.8, 1.05, u[3]) / np.maximum((high - low).max(), 1e-3)
    shift = size * between(-0.05, 0.05, u[4:6]).reshape(low.shape)
    return (xy - (low + high) / 2) * scale + size / 2 + shift


@lru_cache(maxsize=2**16)
def _character(seed: int, label: int) -> np.ndarray:
    """Returns a class's numbers, float64 [27] in [0, 1): stroke count, 2 joins, 12 points."""
    return uniform(27, seed, CLASS, label)


@lru_cache(maxsize=64)
def _bernstein(pieces: int) -> np.ndarray:
    """Returns the cubic Bernstein polynomials at even steps: float64 [4, pieces + 1]."""
    t = np.arange(pieces + 1) / pieces
    s = 1 - t
    return np.stack([s * s * s, 3 * s * s * t, 3 * s * t * t, t * t * t])


@lru_cache(maxsize=2**16)
def _function_system(seed: int, label: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns a class's affine maps, float64 [2, 3, n], and cumulative probabilities, float64 [n].

    A map is (x, y) -> (ax + by + e, cx + dy + f). As in FractalDB (section 3.1), parameters are
    uniform in [-1, 1], probabilities are proportional to |ad - bc|, and systems that leave too much
    of the image empty are rejected. Unlike there, n is at most 6, and attractors much longer than
    wide are rejected. Every map is scaled to be a contraction, so that all systems and all their
    instances converge.
    """
    for attempt in itertools.count():
        u = uniform(305, seed, CLASS, label, attempt)
        maps = between(-1, 1, u[:48]).reshape(2, 3, 8)[..., : 2 + int(5 * u[48])]
        (a, b, _), (c, d, _) = maps
        squares, det = a * a + b * b + c * c + d * d, a * d - b * c
        norm = np.sqrt((squares + np.sqrt(np.maximum(squares * squares - 4 * det * det, 0))) / 2)
        shrink = np.minimum(0.85 / norm, 1)
        maps[:, :2] *= shrink
        cumulative = np.cumsum(np.maximum(np.abs(det) * shrink * shrink, 0.02))
        cumulative /= cumulative[-1]
        points, _ = _attractor(maps, cumulative, u[49:])
        low, high = points.min(axis=1, keepdims=True), points.max(axis=1, keepdims=True)
        side = high - low
        cells = np.minimum(np.floor((points - low) / side * 32), 31)
        filled = np.unique(cells[0] * 32 + cells[1]).size / 32**2
        if filled > 0.25 and side.min() > 0.3 * side.max():
            return maps, cumulative
    raise AssertionError("unreachable: itertools.count() doesn't end")


def _attractor(maps: np.ndarray, cumulative: np.ndarray, u: np.ndarray):
    """Returns 4,096 points of an attractor: 64 random words of four maps, each on 64 points.

    Args:
      maps: float64 [2, 3, n].
      cumulative: float64 [n], the maps' cumulative probabilities.
      u: float64 [256] in [0, 1), the random numbers.

    Returns:
      The points, float64 [2, 4096], and for each 64 of them the map applied last, int64 [64].
    """
    chosen = np.searchsorted(cumulative, u, side="right")
    pairs = _compose(maps[..., chosen[:128]], maps[..., chosen[128:]])
    words = _compose(pairs[..., :64], pairs[..., 64:])
    x, y = _compose(words, words[..., ::-1])[:, 2]  # the origin's images under words of eight
    points = words[:, 0, :, None] * x + words[:, 1, :, None] * y + words[:, 2, :, None]
    return points.reshape(2, -1), chosen[:64]


def _compose(outer: np.ndarray, inner: np.ndarray) -> np.ndarray:
    """Returns the affine maps that apply `inner`, then `outer`: [2, 3, n] each."""
    composed = outer[:, :1] * inner[:1] + outer[:, 1:2] * inner[1:]
    composed[:, 2] += outer[:, 2]
    return composed
