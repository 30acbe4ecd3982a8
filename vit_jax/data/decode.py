"""Bytes -> pixels.

`decode_image` reads whatever there is (Pillow). `open_image` leaves an ordinary JPEG undecoded, so
that a random crop can decode less than the whole (libjpeg-turbo through simplejpeg; least with the
markers of `jpeg_markers`). Both give the same pixels.
"""

import functools
import io
import struct
import zlib
from dataclasses import dataclass

import cv2
import numpy as np
import simplejpeg
from PIL import Image, ImageChops, UnidentifiedImageError

from vit_jax.data import jpeg_markers
from vit_jax.data.files import system_error

# Others aren't tried: some call programs (EPS), and some read anything (ICNS, MSP).
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
MAX_PIXELS = 89_478_485  # a quarter of a GiB as RGB; Pillow's own bound
MAX_SCANS = 500  # of a progressive JPEG; each one is a pass over all its pixels

cv2.setNumThreads(0)  # the pipeline has threads of its own


@dataclass(frozen=True)
class Jpeg:
    """An image that is not decoded yet.

    Attributes:
      data: the file.
      shape: H, W, 3.
      height_at: where in the file H stands, if fewer rows may be decoded by lowering it.
    """

    data: bytes
    shape: tuple[int, int, int]
    height_at: int | None

    def decode(self) -> np.ndarray:
        """All of it: uint8 [H, W, 3]. Raises ValueError as `decode_image`."""
        return self.crop((0, 0, self.shape[1], self.shape[0]), self.shape[:2])

    def crop(self, box: tuple[int, int, int, int], at_least: tuple[int, int]) -> np.ndarray:
        """The pixels inside box (left, top, right, bottom), or a half, quarter or eighth of them.

        libjpeg's inverse cosine transform gives the smallest of the four that is still `at_least`
        so many pixels high and wide. A smaller one's borders may lie up to a pixel of its own
        outside the box.

        Returns uint8 [h, w, 3]. Raises ValueError as `decode_image`.
        """
        left, top, right, bottom = box
        height, width = self.shape[:2]
        scale = 1
        while scale < 8 and all(
            side >= 2 * scale * least
            for side, least in zip((bottom - top, right - left), at_least, strict=True)
        ):
            scale *= 2
        data, x, y = self.data, 0, 0
        if self.height_at is not None:
            # Chroma is interpolated from the rows below; below these, nothing matters.
            enough = bottom + 4 * scale
            if part := jpeg_markers.cut(data, self.height_at - 5, box, margin=scale):
                data, (x, y), (height, width) = part
            elif enough < height:
                height, data = enough, bytearray(data)
                struct.pack_into(">H", data, self.height_at, height)
        least = (-(-height // scale), -(-width // scale)) if scale > 1 else (0, 0)
        try:
            # Not strict: what follows the lowered height is one of the things it would mind.
            pixels = simplejpeg.decode_jpeg(
                data, min_height=least[0], min_width=least[1], strict=False
            )
        except ValueError:  # a kind that simplejpeg doesn't know, or broken: let Pillow say
            pixels, scale, x, y = decode_image(self.data), 1, 0, 0
        rows = slice((top - y) // scale, -(-(bottom - y) // scale))
        return pixels[rows, (left - x) // scale : -(-(right - x) // scale)]


def open_image(data: bytes | np.ndarray) -> Jpeg | np.ndarray:
    """As `decode_image`, but an ordinary JPEG is not decoded yet."""
    return (not isinstance(data, np.ndarray) and _read_header(data)) or decode_image(data)


def decode_image(data: bytes | np.ndarray) -> np.ndarray:
    """Decodes an image into RGB, whatever its file format and colour mode.

    Args:
      data: an encoded image (one of `FORMATS`), or uint8 pixels [H, W], [H, W, 1] or [H, W, 3].
        Transparent pixels are laid over white; 16-bit channels keep their upper byte; of an
        animation the first frame is decoded. As in the published pipelines, the EXIF orientation
        is not applied.

    Returns:
      uint8 [H, W, 3]. Pixels that came as [H, W, 3] are returned as they are, not copied.

    Raises:
      ValueError: the bytes are no image or are truncated, it has more than `MAX_PIXELS` pixels, or
        the array has another shape or type.
    """
    if isinstance(data, np.ndarray):
        return _decode_array(data)
    try:
        if data[:2] == b"\xff\xd8" and data.count(b"\xff\xda") > MAX_SCANS:
            raise ValueError(f"a JPEG of more than {MAX_SCANS} scans")
        with Image.open(io.BytesIO(data), formats=_known_formats()) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels, more than {MAX_PIXELS}")
            return _to_rgb(image)
    except _BROKEN as error:
        if fault := system_error(error):
            raise fault from error
        known = not isinstance(error, UnidentifiedImageError)
        reason = error if known else f"it begins like none of {', '.join(FORMATS)}"
        raise ValueError(
            f"cannot decode {len(data)} bytes that begin with {bytes(data[:8])!r}: expected a "
            f"whole image file, such as a JPEG or a PNG ({reason})"
        ) from error


# What Pillow raises for broken files.
_BROKEN = (
    *(OSError, SyntaxError, ValueError, Image.DecompressionBombError),
    *(EOFError, IndexError, KeyError, TypeError, struct.error, zlib.error),
)


@functools.cache
def _known_formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)  # AVIF: Pillow 11.3


def _read_header(data: bytes) -> Jpeg | None:
    """None for what is no JPEG, or one that only Pillow reads right, or says what is wrong with."""
    at, end = 2, len(data)
    if data[:2] != b"\xff\xd8":
        return None
    while at + 10 <= end and data[at] == 0xFF:
        marker = data[at + 1]
        if marker in (0xC0, 0xC1, 0xC2):  # baseline, extended, progressive
            bits, height, width, components = struct.unpack_from(">BHHB", data, at + 4)
            baseline = marker != 0xC2
            if (
                bits == 8
                and components in (1, 3)
                and 0 < height * width <= MAX_PIXELS
                # Cut off? Then Pillow says so; a lowered height would hide it.
                and data.rfind(b"\xff\xd9", at) > 0
                and (baseline or data.count(b"\xff\xda", at) <= MAX_SCANS)
            ):
                return Jpeg(data, (height, width, 3), at + 5 if baseline else None)
            return None
        if marker == 0xDA:
            return None
        # 0xFF alone fills up.
        at += 1 if marker == 0xFF else 2 + struct.unpack_from(">H", data, at + 2)[0]
    return None


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
    if image.mode == "CMYK" and image.format in ("JPEG", "MPO") and "adobe" not in image.info:
        image = ImageChops.invert(image)  # Pillow takes all for Adobe's, which are negatives
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"))
