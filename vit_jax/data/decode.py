"""Decodes images: bytes -> pixels.

`decode_image` decodes ordinary JPEGs with libjpeg-turbo (simplejpeg) and everything else with
Pillow. `open_image` leaves an ordinary JPEG undecoded, so that a random crop can decode only a part
(the smallest with the markers of `jpeg_markers`). Both give the same pixels and reject the same
files.
"""

import contextlib
import functools
import io
import os
import re
import struct
import threading
import warnings
import zlib
from dataclasses import dataclass

import cv2
import numpy as np
import simplejpeg
from PIL import ExifTags, Image, ImageChops, UnidentifiedImageError

from vit_jax.config import InputError
from vit_jax.data import jpeg_markers
from vit_jax.data.foreign_files import system_error

# Pillow's other formats aren't tried: some run programs (EPS), some accept any bytes (ICNS, MSP).
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
LIMIT = "VIT_JAX_MAX_PIXELS"  # environment variable: most pixels an image may have, in any format
# Default limits of JPEGs, and of other formats, whose decoding takes up to 16 bytes a pixel. The
# second is Pillow's own limit: a quarter of a GiB as RGB.
MAX_PIXELS, MAX_PIXELS_OF_OTHERS = 200_000_000, 89_478_485
WHOLE_PIXELS = 89_478_485  # larger JPEGs are decoded at half their height and width
MAX_SCANS = 500  # of a progressive JPEG; each one is a pass over all its pixels
MAX_SCANNED = 4_000_000_000  # scans times pixels; takes some seconds
_LARGE = 1 << 24  # pixels; larger images are decoded one at a time
_ONE_LARGE = threading.Lock()

# The warning names no file, and the pixels are unaffected. `classifier.audit` names the files.
warnings.filterwarnings("ignore", "Corrupt EXIF data", UserWarning)
cv2.setNumThreads(0)  # the pipeline has threads of its own


@dataclass(frozen=True)
class Jpeg:
    """A JPEG that is not decoded yet.

    Attributes:
      data: the file's bytes.
      shape: H, W, 3.
      height_at: byte offset of H, if lowering it is a way to decode fewer rows; else None.
    """

    data: bytes
    shape: tuple[int, int, int]
    height_at: int | None

    def decode(self) -> np.ndarray:
        """Decodes the whole image: uint8 [H, W, 3], at half size above `WHOLE_PIXELS` pixels.

        Raises ValueError as `decode_image`.
        """
        height, width, _ = self.shape
        half = 2 if height * width > WHOLE_PIXELS else 1
        with _few_large(height * width):
            return self.crop((0, 0, width, height), (height // half, width // half))

    def crop(self, box: tuple[int, int, int, int], at_least: tuple[int, int]) -> np.ndarray:
        """Decodes box (left, top, right, bottom) at full size, or at 1/2, 1/4 or 1/8 of its size.

        Uses the smallest of the four sizes that is at least `at_least` (height, width); libjpeg
        scales in the inverse cosine transform. The borders of a scaled crop may lie up to one of
        its own pixels outside the box.

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
            # Chroma is interpolated from some rows below the box. Rows below those aren't needed.
            enough = bottom + 4 * scale
            if part := jpeg_markers.cut(data, self.height_at - 5, box, margin=scale):
                data, (x, y), (height, width) = part
            elif enough < height:
                height, data = enough, bytearray(data)
                struct.pack_into(">H", data, self.height_at, height)
        least = (-(-height // scale), -(-width // scale)) if scale > 1 else (0, 0)
        # Strict decoding would reject the data that are left over below a lowered height.
        whole = data is self.data
        try:
            pixels = simplejpeg.decode_jpeg(
                data, min_height=least[0], min_width=least[1], strict=whole
            )
        except ValueError:  # unknown to simplejpeg, or damaged: raises unless Pillow can decode it
            pixels = _decode_with_pillow(self.data)
            if not whole or scale > 1:
                try:
                    pixels = simplejpeg.decode_jpeg(
                        data, min_height=least[0], min_width=least[1], strict=False
                    )
                except ValueError:
                    scale, x, y = 1, 0, 0
        rows = slice((top - y) // scale, -(-(bottom - y) // scale))
        return pixels[rows, (left - x) // scale : -(-(right - x) // scale)]


def open_image(data: bytes | np.ndarray) -> Jpeg | np.ndarray:
    """Like `decode_image`, but leaves an ordinary JPEG undecoded."""
    if isinstance(data, np.ndarray):
        return _decode_array(data)
    return _read_header(data) or _decode_with_pillow(data)


def decode_image(data: bytes | np.ndarray) -> np.ndarray:
    """Decodes an image into RGB, whatever its file format and colour mode.

    Args:
      data: an encoded image (one of `FORMATS`), or uint8 pixels [H, W], [H, W, 1] or [H, W, 3].
        Transparency is blended over white. 16-bit channels keep their upper byte. Animations give
        their first frame. The EXIF orientation is not applied, as in the published pipelines.

    Returns:
      uint8 [H, W, 3]. An array [H, W, 3] is returned without a copy. A JPEG of more than
      `WHOLE_PIXELS` is decoded at half its height and width.

    Raises:
      ValueError: the bytes are not an image or are truncated, the image has more than `max_pixels`
        pixels, or the array has another shape or type.
      OSError, MemoryError: a fault of the machine, not of the image.
    """
    image = open_image(data)
    return image.decode() if isinstance(image, Jpeg) else image


def decode_upright(data: bytes | np.ndarray) -> np.ndarray:
    """Like `decode_image`, but applies the EXIF orientation; ignores damaged EXIF data."""
    pixels, turn = decode_image(data), 1
    if isinstance(data, bytes):
        with contextlib.suppress(ValueError):
            turn = _orientation(data)
    return np.ascontiguousarray(_TURNS[turn](pixels)) if turn in _TURNS else pixels


def _orientation(data: bytes) -> int:
    if data[:2] == b"\xff\xd8":
        return jpeg_markers.orientation(data)
    with Image.open(io.BytesIO(data)) as image:  # Pillow turns TIFFs itself
        return 1 if image.format == "TIFF" else image.getexif().get(ExifTags.Base.Orientation, 1)


# EXIF orientation -> function that turns the stored pixels upright.
_TURNS = {
    2: np.fliplr,
    3: lambda pixels: np.rot90(pixels, 2),
    4: np.flipud,
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: np.rot90(pixels, 2).swapaxes(0, 1),
    8: np.rot90,
}


def max_pixels(image_format: str = "") -> int:
    """Returns the most pixels an image may have; ValueError if the set limit is not a number."""
    if not (text := os.environ.get(LIMIT)):
        return MAX_PIXELS if image_format in ("JPEG", "MPO") else MAX_PIXELS_OF_OTHERS
    try:
        Image.MAX_IMAGE_PIXELS = int(text)  # Pillow has a limit of its own
    except ValueError as error:
        raise InputError(f"{LIMIT}={text}: expected a number of pixels") from error
    return Image.MAX_IMAGE_PIXELS


def _decode_with_pillow(data: bytes) -> np.ndarray:
    max_pixels()
    try:
        with Image.open(io.BytesIO(data), formats=_known_formats()) as image:
            pixels, most = image.width * image.height, max_pixels(image.format)
            if pixels > most:
                raise InputError(
                    f"{image.width} x {image.height} pixels, more than {most:,}: make it smaller, "
                    f"or set {LIMIT}={pixels} if there is memory for it"
                )
            if image.format == "JPEG":
                _check_scans(data.count(b"\xff\xda"), pixels)
            with _few_large(pixels):
                return _to_rgb(image)
    except _BROKEN as error:
        if fault := system_error(error):
            raise fault from error
        reason = str(error)
        if isinstance(error, UnidentifiedImageError):
            reason = _unknown_kind(data)
        elif isinstance(error, Image.DecompressionBombError):
            reason += f". If there is memory for it, set {LIMIT}"
        raise InputError(
            f"cannot decode {len(data)} bytes that begin with {bytes(data[:8])!r}: expected a "
            f"whole image file, such as a JPEG or a PNG ({reason})"
        ) from error


def _unknown_kind(data: bytes) -> str:
    if data[4:12] in (b"ftypheic", b"ftypheix", b"ftypmif1", b"ftypmsf1"):
        return "it is a HEIC photograph: convert it with magick mogrify -format jpg FILE"
    if data[4:12] in (b"ftypavif", b"ftypavis"):
        return "it is an AVIF image: upgrade Pillow to 11.3 or later, or convert the image"
    return f"its first bytes are those of none of {', '.join(FORMATS)}"


def _check_scans(scans: int, pixels: int) -> None:
    if scans > MAX_SCANS:
        raise InputError(f"a JPEG of more than {MAX_SCANS} scans: save it with fewer")
    if scans * pixels > MAX_SCANNED:
        raise InputError(
            f"a JPEG of {scans} scans of {pixels:,} pixels each, more than {MAX_SCANNED:,} in all: "
            "save it with fewer"
        )


def _few_large(pixels: int) -> contextlib.AbstractContextManager:
    return _ONE_LARGE if pixels > _LARGE else contextlib.nullcontext()


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
    """Returns an ordinary JPEG; None if Pillow must decode the data or explain their fault."""
    at, end, shape, height_at = 2, len(data), None, None
    if data[:2] != b"\xff\xd8":
        return None
    while at + 10 <= end and data[at] == 0xFF:
        marker = data[at + 1]
        if marker in (0xC0, 0xC1, 0xC2):  # baseline, extended, progressive
            bits, height, width, components = struct.unpack_from(">BHHB", data, at + 4)
            if shape or bits != 8 or components not in (1, 3):
                return None
            shape = (height, width, 3)
            height_at = at + 5 if marker != 0xC2 else None
        # A repeated 0xFF is padding.
        at += 1 if marker == 0xFF else 2 + struct.unpack_from(">H", data, at + 2)[0]
        if marker == 0xDA:
            break
    else:
        return None
    if shape is None or not 0 < shape[0] * shape[1] <= max_pixels("JPEG"):
        return None
    # Pillow reports truncated files. Decoding with a lowered height would hide the truncation.
    found = _MARKER.search(data, at)
    if found is None or data.rfind(b"\xff\xd9", at) < 0:
        return None
    if found[0] == b"\xff\xd9":
        return Jpeg(data, shape, height_at)
    # Several scans, or damage inside a scan: the whole image is decoded.
    scans = 1 + data.count(b"\xff\xda", at)
    if scans > MAX_SCANS or scans * shape[0] * shape[1] > MAX_SCANNED:
        return None
    return Jpeg(data, shape, None)


_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # a marker that can't be inside a scan


def _decode_array(pixels: np.ndarray) -> np.ndarray:
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] not in (1, 3):
        raise InputError(
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
        raise InputError(f"its pixels are 32-bit numbers of unknown range (mode {image.mode!r})")
    if image.mode == "CMYK" and image.format in ("JPEG", "MPO") and "adobe" not in image.info:
        image = ImageChops.invert(image)  # Pillow takes all for Adobe's, which are inverted
    if image.has_transparency_data:
        return _over_white(image.convert("RGBA"))
    return np.asarray(image.convert("RGB"))


def _over_white(image: Image.Image) -> np.ndarray:
    """Blends RGBA over white in strips of rows: as a whole, four copies would be in memory."""
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    rows = max(1, (1 << 20) // image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        white = Image.new("RGBA", strip.size, "white")
        pixels[top : top + rows] = Image.alpha_composite(white, strip).convert("RGB")
    return pixels
