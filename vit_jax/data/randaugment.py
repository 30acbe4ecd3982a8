"""RandAugment, AutoAugment's ImageNet policy and random erasing on uint8 [H, W, 3].

The operations are those of the TensorFlow code that trained EfficientNet, AugReg's ViTs and "Better
plain ViT baselines" (google-research/big_vision, pp/autoaugment.py). Its oddities are kept, since
published results depend on them:

- Magnitudes run from 0 to 10; AugReg also uses 15 and 20. 0 isn't mild: Brightness gives a nearly
  black image, Color a nearly grey one, Posterize one bit per channel and Solarize the negative.
- Posterize and Solarize become weaker as the magnitude rises to 10. Above 10, Solarize's threshold
  wraps around, because TensorFlow casts it to uint8: 10 and 20 give the negative of the whole
  image, 15 solarizes at 128. Posterize keeps 6 bits at 15, and all of them at 20.
- Contrast blends with the constant min(H * W / 256, 255), not with the image's mean.
- Rotate turns about the centre; ShearX and ShearY keep the upper left corner. All take the nearest
  pixel. Uncovered pixels and Cutout's square are grey (128).
- Translations (100 pixels at magnitude 10) and Cutout (a square of 80) don't scale with the image.

Results are bit-identical to Pillow's on x86. Pillow itself only moves pixels here: for the rest
OpenCV and numpy are faster, and Pillow's blending holds the interpreter's lock.
"""

import math
from collections.abc import Callable

import cv2
import numpy as np
from PIL import Image

from vit_jax.config import InputError

Operation = Callable[[np.ndarray, float, np.random.Generator], np.ndarray]
GREY = (128, 128, 128)
VALUES = np.arange(256, dtype=np.uint8)
# Rec. 601 luma as in Pillow, in 65,536ths, and a half for rounding: exact in float32 (24 bits).
TO_LUMA = np.tile(np.float32([19595, 38470, 7471, 32768]) / 65536, (3, 1))
# Pillow's smoothing kernel.
SMOOTH = np.float32([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13


def randaugment(
    image: np.ndarray,
    rng: np.random.Generator,
    size: tuple[int, int],
    layers: int = 2,
    magnitude: float = 10,
) -> np.ndarray:
    """Applies `layers` operations in sequence, each drawn from the 16 with equal probability.

    Cubuk et al., arXiv:1909.13719. AugReg (arXiv:2106.10270) trains with 2 layers of magnitude 0,
    10, 15 or 20.
    """
    if not (isinstance(layers, int) and layers >= 0 and 0 <= magnitude <= 30):
        raise InputError(
            f"expected layers >= 0 and 0 <= magnitude <= 30, found {layers} and {magnitude}"
        )
    names = list(OPERATIONS)
    for choice in rng.integers(len(names), size=layers):
        image = OPERATIONS[names[choice]](image, magnitude, rng)
    return image


def autoaugment(image: np.ndarray, rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """Applies one of AutoAugment's 25 sub-policies for ImageNet, drawn at random.

    Cubuk et al., arXiv:1805.09501, table 9. Magnitudes are as for `randaugment`, but Posterize
    keeps at least 4 bits (table 6).
    """
    for name, probability, magnitude in IMAGENET_POLICY[rng.integers(len(IMAGENET_POLICY))]:
        if rng.random() < probability:
            operation = _posterize_from_4 if name == "Posterize" else OPERATIONS[name]
            image = operation(image, magnitude, rng)
    return image


def random_erasing(
    image: np.ndarray,
    rng: np.random.Generator,
    size: tuple[int, int],
    probability: float = 0.5,
    min_area: float = 0.02,
    max_area: float = 0.4,
    min_aspect: float = 0.3,
) -> np.ndarray:
    """With `probability`, replaces a rectangle of the image by noise, uniform in 0 to 255.

    Zhong et al., arXiv:1708.04896, algorithm 1 with its ImageNet values. The rectangle's area, as a
    fraction of the image's, is uniform in [min_area, max_area], its height / width in [min_aspect,
    1 / min_aspect]. They are redrawn until the rectangle fits. After 100 failed attempts the image
    is unchanged.
    """
    if not (0 <= probability <= 1 and 0 < min_area <= max_area < 1 and 0 < min_aspect <= 1):
        raise InputError(
            "expected 0 <= probability <= 1, 0 < min_area <= max_area < 1 and 0 < min_aspect <= 1, "
            f"found {probability}, {min_area}, {max_area} and {min_aspect}"
        )
    if rng.random() >= probability:
        return image
    image_height, image_width = image.shape[:2]
    for _ in range(100):
        area = rng.uniform(min_area, max_area) * image_height * image_width
        aspect = rng.uniform(min_aspect, 1 / min_aspect)
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < height <= image_height and 0 < width <= image_width:
            top = int(rng.integers(image_height - height, endpoint=True))
            left = int(rng.integers(image_width - width, endpoint=True))
            noise = rng.integers(256, size=(height, width, 3), dtype=np.uint8)
            image = image.copy()
            image[top : top + height, left : left + width] = noise
            break
    return image


def _autocontrast(image, magnitude, rng):
    return cv2.merge([_stretch(channel) for channel in cv2.split(image)])


def _stretch(channel):
    low, high, *_ = cv2.minMaxLoc(channel)
    if low == high:
        return channel
    scale = 255 / (high - low)
    return cv2.LUT(channel, np.clip(VALUES * scale - low * scale, 0, 255).astype(np.uint8))


def _equalize(image, magnitude, rng):
    return cv2.merge([_flatten(channel) for channel in cv2.split(image)])


def _flatten(channel):
    # Counts in float32 are exact for images of up to 2 ** 24 pixels.
    counts = cv2.calcHist([channel], [0], None, [256], [0, 256]).ravel().astype(int)
    step = (counts.sum() - counts[np.flatnonzero(counts)[-1]]) // 255
    if step == 0:  # a single value, or hardly any pixels
        return channel
    table = (np.cumsum(counts) - counts + step // 2) // step
    return cv2.LUT(channel, np.minimum(table, 255).astype(np.uint8))


def _invert(image, magnitude, rng):
    return ~image


def _rotate(image, magnitude, rng):
    angle = math.radians(_either_sign(3.0 * magnitude, rng))
    cos, sin = math.cos(angle), math.sin(angle)
    bottom, right = image.shape[0] - 1, image.shape[1] - 1
    to_x = (right - (cos * right - sin * bottom)) / 2
    to_y = (bottom - (sin * right + cos * bottom)) / 2
    return _move(image, (cos, -sin, to_x, sin, cos, to_y))


def _posterize(image, magnitude, rng):
    shift = min((8 - int(magnitude / 10 * 4)) % 256, 7)  # TensorFlow shifts by at most 7
    return image & (256 - 2**shift)


def _posterize_from_4(image, magnitude, rng):
    return image & (256 - 2 ** (4 - int(magnitude / 10 * 4)))


def _solarize(image, magnitude, rng):
    threshold = int(magnitude / 10 * 256) % 256
    return cv2.LUT(image, np.where(threshold <= VALUES, ~VALUES, VALUES))


def _solarize_add(image, magnitude, rng):
    added = np.minimum(VALUES.astype(int) + int(magnitude / 10 * 110), 255)
    return cv2.LUT(image, np.where(VALUES < 128, added, VALUES).astype(np.uint8))


def _color(image, magnitude, rng):
    grey = cv2.transform(image.astype(np.float32), TO_LUMA).astype(np.uint8)
    return _blend(grey, image, magnitude)


def _contrast(image, magnitude, rng):
    level = min(image.shape[0] * image.shape[1] // 256, 255)
    return cv2.LUT(image, _blend(level, VALUES, magnitude))


def _brightness(image, magnitude, rng):
    return cv2.LUT(image, _blend(0, VALUES, magnitude))


def _sharpness(image, magnitude, rng):
    smooth = image.copy()  # keeps the border
    # Sums are in thirteenths, never halves, so the order of summation doesn't change the rounding.
    smooth[1:-1, 1:-1] = cv2.filter2D(image, -1, SMOOTH)[1:-1, 1:-1]
    return _blend(smooth, image, magnitude)


def _shear_x(image, magnitude, rng):
    return _move(image, (1, _either_sign(0.03 * magnitude, rng), 0, 0, 1, 0))


def _shear_y(image, magnitude, rng):
    return _move(image, (1, 0, 0, _either_sign(0.03 * magnitude, rng), 1, 0))


def _translate_x(image, magnitude, rng):
    return _move(image, (1, 0, _either_sign(10.0 * magnitude, rng), 0, 1, 0))


def _translate_y(image, magnitude, rng):
    return _move(image, (1, 0, 0, 0, 1, _either_sign(10.0 * magnitude, rng)))


def _cutout(image, magnitude, rng):
    reach = int(magnitude / 10 * 40)
    height, width = image.shape[:2]
    row, column = int(rng.integers(height)), int(rng.integers(width))
    image = image.copy()
    image[max(row - reach, 0) : row + reach, max(column - reach, 0) : column + reach] = GREY
    return image


OPERATIONS: dict[str, Operation] = {
    "AutoContrast": _autocontrast,
    "Equalize": _equalize,
    "Invert": _invert,
    "Rotate": _rotate,
    "Posterize": _posterize,
    "Solarize": _solarize,
    "Color": _color,
    "Contrast": _contrast,
    "Brightness": _brightness,
    "Sharpness": _sharpness,
    "ShearX": _shear_x,
    "ShearY": _shear_y,
    "TranslateX": _translate_x,
    "TranslateY": _translate_y,
    "Cutout": _cutout,
    "SolarizeAdd": _solarize_add,
}

# Each sub-policy is two of (operation, probability, magnitude).
IMAGENET_POLICY = (
    (("Posterize", 0.4, 8), ("Rotate", 0.6, 9)),
    (("Solarize", 0.6, 5), ("AutoContrast", 0.6, 5)),
    (("Equalize", 0.8, 8), ("Equalize", 0.6, 3)),
    (("Posterize", 0.6, 7), ("Posterize", 0.6, 6)),
    (("Equalize", 0.4, 7), ("Solarize", 0.2, 4)),
    (("Equalize", 0.4, 4), ("Rotate", 0.8, 8)),
    (("Solarize", 0.6, 3), ("Equalize", 0.6, 7)),
    (("Posterize", 0.8, 5), ("Equalize", 1.0, 2)),
    (("Rotate", 0.2, 3), ("Solarize", 0.6, 8)),
    (("Equalize", 0.6, 8), ("Posterize", 0.4, 6)),
    (("Rotate", 0.8, 8), ("Color", 0.4, 0)),
    (("Rotate", 0.4, 9), ("Equalize", 0.6, 2)),
    (("Equalize", 0.0, 7), ("Equalize", 0.8, 8)),
    (("Invert", 0.6, 4), ("Equalize", 1.0, 8)),
    (("Color", 0.6, 4), ("Contrast", 1.0, 8)),
    (("Rotate", 0.8, 8), ("Color", 1.0, 2)),
    (("Color", 0.8, 8), ("Solarize", 0.8, 7)),
    (("Sharpness", 0.4, 7), ("Invert", 0.6, 8)),
    (("ShearX", 0.6, 5), ("Equalize", 1.0, 9)),
    (("Color", 0.4, 0), ("Equalize", 0.6, 3)),
    (("Equalize", 0.4, 7), ("Solarize", 0.2, 4)),
    (("Solarize", 0.6, 5), ("AutoContrast", 0.6, 5)),
    (("Invert", 0.6, 4), ("Equalize", 1.0, 8)),
    (("Color", 0.6, 4), ("Contrast", 1.0, 8)),
    (("Equalize", 0.8, 8), ("Equalize", 0.6, 3)),
)


def _blend(other: np.ndarray | int, image: np.ndarray, magnitude: float) -> np.ndarray:
    """Returns uint8 other + factor (image - other), rounded down; factor 1 keeps the image."""
    factor, other = np.float32(magnitude / 10 * 1.8 + 0.1), np.float32(other)
    blended = image.astype(np.float32)
    blended -= other
    blended *= factor
    blended += other
    return np.clip(blended, 0, 255, out=blended).astype(np.uint8)


def _either_sign(value: float, rng: np.random.Generator) -> float:
    return value if rng.random() < 0.5 else -value


def _move(image: np.ndarray, matrix: tuple[float, ...]) -> np.ndarray:
    """Sets each pixel (x, y) to the pixel nearest to (a x + b y + c, d x + e y + f)."""
    a, b, c, d, e, f = matrix
    # Pillow's pixel centres begin at 0.5, and it rounds down.
    matrix = (a, b, c + (1 - a - b) / 2, d, e, f + (1 - d - e) / 2)
    picture = Image.fromarray(image)
    affine = Image.Transform.AFFINE
    return np.asarray(picture.transform(picture.size, affine, matrix, fillcolor=GREY))
