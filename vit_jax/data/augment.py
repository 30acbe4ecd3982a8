"""Preprocessing on the host, written as a string: `"inception_crop|flip"`.

An operation is a function (image, rng, size, *arguments) -> image on uint8 [H, W, 3]. Crops and
`resize` return images of `size`, so a recipe states the image size once. Other operations keep the
image's size.

By default images are resized bilinearly without antialiasing, as in TensorFlow. The published
weights were trained with this, and it is the fastest. Other values of `method`:

- `bilinear_antialias`, `bicubic_antialias`, `lanczos_antialias`: Pillow's, as for Hugging Face's
  and timm's weights;
- `area`: means over rectangles, big_vision's default for resizing the smaller side.
"""

import ast
import functools
import inspect
import math
from collections.abc import Callable

import cv2
import numpy as np
from PIL import Image

from vit_jax.config import InputError, unknown
from vit_jax.data.decode import Jpeg, decode_upright, open_image
from vit_jax.data.randaugment import autoaugment, randaugment, random_erasing

Size = tuple[int, int]  # height, width
Preprocess = Callable[[bytes | np.ndarray | Jpeg, np.random.Generator], np.ndarray]

METHODS = {
    "bilinear": cv2.INTER_LINEAR,
    "area": cv2.INTER_AREA,
    "bilinear_antialias": Image.Resampling.BILINEAR,
    "bicubic_antialias": Image.Resampling.BICUBIC,
    "lanczos_antialias": Image.Resampling.LANCZOS,
}


def upright(image: np.ndarray, rng: np.random.Generator, size: Size) -> np.ndarray:
    """Turns an encoded image by its EXIF orientation, as browsers do. Must be the first operation.

    Published pipelines ignore the orientation. Decoded pixels are left unchanged.
    """
    return image


def resize(
    image: np.ndarray, rng: np.random.Generator, size: Size, method: str = "bilinear"
) -> np.ndarray:
    """Resizes the whole image to `size`; changes its aspect ratio."""
    if method not in METHODS:
        raise unknown("resize method", method, METHODS)
    if image.shape[:2] == size:
        return image
    if method.endswith("_antialias"):
        return np.asarray(Image.fromarray(image).resize((size[1], size[0]), METHODS[method]))
    return cv2.resize(image, (size[1], size[0]), interpolation=METHODS[method])


def inception_crop(
    image: np.ndarray | Jpeg,
    rng: np.random.Generator,
    size: Size,
    min_area: float = 0.05,
    max_area: float = 1.0,
    method: str = "bilinear",
) -> np.ndarray:
    """Crops a random box and resizes it (Szegedy et al., arXiv:1409.4842, section 6).

    Decodes only as much of a JPEG as the box needs. A box at least twice as large as `size` is
    decoded at 1/2, 1/4 or 1/8 of its size; this averages pixels and so prevents aliasing.

    Draws the box as TensorFlow's `sample_distorted_bounding_box` does. Width / height is uniform in
    [3/4, 4/3]. Then the height is uniform among those for which the box covers `min_area` to
    `max_area` of the image and fits inside. After 100 failed attempts the box is the whole image.
    """
    if not 0 < min_area <= max_area <= 1:
        raise InputError(f"expected 0 < min_area <= max_area <= 1, found {min_area} and {max_area}")
    image_height, image_width = image.shape[:2]
    area = image_height * image_width
    for _ in range(100):
        aspect = rng.uniform(3 / 4, 4 / 3)
        lowest = max(1, round(math.sqrt(min_area * area / aspect)))
        highest = round(math.sqrt(max_area * area / aspect))
        highest = min(highest, image_height, int(image_width / aspect))
        if lowest <= highest:
            height = int(rng.integers(lowest, highest, endpoint=True))
            width = max(1, round(height * aspect))
            top = int(rng.integers(image_height - height, endpoint=True))
            left = int(rng.integers(image_width - width, endpoint=True))
            break
    else:
        left, top, width, height = 0, 0, image_width, image_height
    box = (left, top, left + width, top + height)
    if isinstance(image, Jpeg):
        part = image.crop(box, at_least=size)
    else:
        part = image[box[1] : box[3], box[0] : box[2]]
    return resize(part, rng, size, method)


def random_crop(
    image: np.ndarray,
    rng: np.random.Generator,
    size: Size,
    fraction: float,
    method: str = "bilinear",
) -> np.ndarray:
    """Resizes to size / fraction and takes a random crop; BiT fine-tunes with 384 / 448 = 0.857.

    Kolesnikov et al., arXiv:1912.11370, section 3.3.
    """
    return _crop(resize(image, rng, _enlarge(size, fraction), method), size, rng)


def central_crop(
    image: np.ndarray,
    rng: np.random.Generator,
    size: Size,
    fraction: float,
    method: str = "bilinear",
) -> np.ndarray:
    """Resizes to just cover size / fraction, keeping the aspect ratio, and crops the centre.

    With 0.875 and 224, resizes the smaller side to 256 and keeps the central 224 x 224.
    """
    enlarged = _enlarge(size, fraction)
    scale = max(enlarged[0] / image.shape[0], enlarged[1] / image.shape[1])
    covering = (round(image.shape[0] * scale), round(image.shape[1] * scale))
    return _crop(resize(image, rng, covering, method), size)


def torchvision_crop(
    image: np.ndarray,
    rng: np.random.Generator,
    size: Size,
    fraction: float = 1.0,
    method: str = "bicubic_antialias",
    squash: bool = False,
    floor: bool = False,
) -> np.ndarray:
    """The centre of the resized image, with the sizes of torchvision's `Resize` and `CenterCrop`.

    timm's evaluation, and with `floor`, which rounds the crop's offset down, Hugging Face's. The
    image just covers size / fraction, rounded down, with its aspect ratio kept, or with `squash`
    has that size.
    """
    _enlarge(size, fraction)
    enlarged = (math.floor(size[0] / fraction), math.floor(size[1] / fraction))
    if not squash:
        height, width = image.shape[:2]
        if enlarged[0] * width >= enlarged[1] * height:
            enlarged = (enlarged[0], int(enlarged[0] * width / height))
        else:
            enlarged = (int(enlarged[1] * height / width), enlarged[1])
    image = resize(image, rng, enlarged, method)
    spare = ((a - b) / 2 for a, b in zip(enlarged, size, strict=True))
    top, left = (math.floor(s) if floor else round(s) for s in spare)
    return image[top : top + size[0], left : left + size[1]]


def pad_crop(image: np.ndarray, rng: np.random.Generator, size: Size, pixels: int) -> np.ndarray:
    """Adds a black border of `pixels` on each side and takes a random crop; for small images."""
    if not (isinstance(pixels, int) and pixels >= 0):
        raise InputError(f"expected a whole number of pixels, found {pixels}")
    return _crop(np.pad(image, ((pixels, pixels), (pixels, pixels), (0, 0))), size, rng)


def flip(image: np.ndarray, rng: np.random.Generator, size: Size) -> np.ndarray:
    """Mirrors the image left to right with probability 0.5."""
    return cv2.flip(image, 1) if rng.random() < 0.5 else image


def affine(
    image: np.ndarray,
    rng: np.random.Generator,
    size: Size,
    degrees: float = 10,
    scale: float = 0.1,
    shift: float = 0.05,
) -> np.ndarray:
    """Rotates, scales and shifts the image about its centre; uncovered pixels are black.

    Args:
      degrees: the angle is uniform in +-degrees.
      scale: the scale is uniform in 1 +- scale.
      shift: both shifts are uniform in +-shift, as fractions of the image's sides.
    """
    if degrees < 0 or not 0 <= scale < 1 or shift < 0:
        raise InputError(f"expected degrees, shift >= 0 and 0 <= scale < 1, found {scale=}")
    height, width = image.shape[:2]
    angle = math.radians(rng.uniform(-degrees, degrees))
    zoom = rng.uniform(1 - scale, 1 + scale)
    center_x, center_y = width / 2, height / 2
    to_x = center_x + width * rng.uniform(-shift, shift)
    to_y = center_y + height * rng.uniform(-shift, shift)
    # Pillow maps a pixel of the output to its origin: x = cos x' + sin y' + offset, ...
    cos, sin = math.cos(angle) / zoom, math.sin(angle) / zoom
    matrix = (
        *(cos, sin, center_x - cos * to_x - sin * to_y),
        *(-sin, cos, center_y + sin * to_x - cos * to_y),
    )
    moved = Image.fromarray(image).transform(
        (width, height), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR
    )
    return np.asarray(moved)


OPS = {
    op.__name__: op
    for op in (
        *(upright, resize, inception_crop, random_crop, central_crop, torchvision_crop, pad_crop),
        *(flip, affine),
        *(randaugment, autoaugment, random_erasing),
    )
}


def parse_preprocess(spec: str, image_size: Size) -> Preprocess:
    """Builds a preprocessing function from a string such as `"random_crop(0.857)|flip"`.

    Args:
      spec: operations joined by `|`, each with literal arguments by position or by name.
      image_size: height and width in pixels of the images that crops and `resize` return.

    Returns:
      A function (encoded bytes, uint8 [H, W, 3] or Jpeg, np.random.Generator) -> uint8 image. The
      result depends on these arguments alone. The function raises ValueError as `decode_image`.

    Raises:
      ValueError: an unknown operation, or invalid arguments.
    """
    steps = [_parse_op(text.strip(), image_size) for text in spec.split("|")]
    if any(step.func is upright for step in steps[1:]):
        raise InputError(f"preprocessing {spec!r}: upright comes first, before anything is cropped")
    read = decode_upright if steps[0].func is upright else open_image

    def preprocess(image: bytes | np.ndarray | Jpeg, rng: np.random.Generator) -> np.ndarray:
        image = image if isinstance(image, Jpeg) else read(image)
        if isinstance(image, Jpeg) and steps[0].func is not inception_crop:
            image = image.decode()
        for step in steps:
            image = step(image, rng)
        return image

    return preprocess


def _parse_op(text: str, size: Size) -> Preprocess:
    try:
        node = ast.parse(text, mode="eval").body
        call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
        name = call.func.id
        args = [ast.literal_eval(value) for value in call.args]
        kwargs = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError, AttributeError) as error:
        raise InputError(
            f"cannot read preprocessing op {text!r}: expected a name with literal arguments, "
            "such as central_crop(0.875)"
        ) from error
    if name not in OPS:
        raise unknown("preprocessing op", name, OPS)
    signature = inspect.signature(OPS[name])
    try:
        arguments = signature.bind(None, None, size, *args, **kwargs).arguments
        step = functools.partial(OPS[name], **dict(list(arguments.items())[2:]))
        step(np.zeros((*size, 3), np.uint8), np.random.default_rng(0))  # checks the values
    except (TypeError, ValueError) as error:
        shown = ", ".join(map(str, list(signature.parameters.values())[3:]))
        raise InputError(f"preprocessing op {text!r}: {error}; expected {name}({shown})") from error
    return step


def _enlarge(size: Size, fraction: float) -> Size:
    if not 0 < fraction <= 1:
        raise InputError(f"expected 0 < fraction <= 1, found {fraction}")
    return (round(size[0] / fraction), round(size[1] / fraction))


def _crop(image: np.ndarray, size: Size, rng: np.random.Generator | None = None) -> np.ndarray:
    """Takes a random crop, or the central one if `rng` is None."""
    spare_height, spare_width = image.shape[0] - size[0], image.shape[1] - size[1]
    if spare_height < 0 or spare_width < 0:
        raise InputError(
            f"cannot crop {size[0]} x {size[1]} out of {image.shape[0]} x {image.shape[1]} pixels: "
            "add `resize` before the crop"
        )
    if rng is None:
        top, left = spare_height // 2, spare_width // 2
    else:
        top = int(rng.integers(spare_height, endpoint=True))
        left = int(rng.integers(spare_width, endpoint=True))
    return image[top : top + size[0], left : left + size[1]]
