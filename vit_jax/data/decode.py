"""Bytes -> pixels."""

import io

import numpy as np
from PIL import Image


def decode_image(data: bytes | np.ndarray) -> np.ndarray:
    """Decodes an image into RGB, whatever its file format and colour mode.

    Args:
      data: an encoded image (JPEG, PNG, WebP, ... anything Pillow reads), or uint8 pixels
        [H, W], [H, W, 1] or [H, W, 3]. Transparent pixels are laid over white; 16-bit
        grey keeps its upper byte; of an animation the first frame is decoded. As in the published
        pipelines, the EXIF orientation is not applied.

    Returns:
      uint8 [H, W, 3]. Pixels that came as [H, W, 3] are returned as they are, not copied.

    Raises:
      ValueError: the bytes are no image or are truncated, or the array has another shape or type.
    """
    if isinstance(data, np.ndarray):
        return _decode_array(data)
    try:
        with Image.open(io.BytesIO(data)) as image:
            return _to_rgb(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"cannot decode {len(data)} bytes that begin with {bytes(data[:8])!r}: expected a "
            f"whole image file, such as a JPEG or a PNG ({error})"
        ) from error


def _decode_array(pixels: np.ndarray) -> np.ndarray:
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] not in (1, 3):
        raise ValueError(
            f"image array is {pixels.dtype} {list(pixels.shape)}: "
            "expected uint8 [H, W], [H, W, 1] or [H, W, 3]"
        )
    return pixels if pixels.shape[2] == 3 else np.repeat(pixels, 3, axis=2)


def _to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode == "RGB":
        return np.asarray(image)
    if image.mode.startswith("I;16"):  # Pillow would clip at 255 instead
        return _decode_array((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"its pixels are 32-bit numbers of unknown range (mode {image.mode!r})")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"))
