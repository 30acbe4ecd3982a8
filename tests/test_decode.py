import io

import numpy as np
import pytest
from PIL import Image

from vit_jax.data.decode import decode_image

RNG = np.random.default_rng(0)
RGB = RNG.integers(256, size=(6, 9, 3), dtype=np.uint8)
GREY = RGB[:, :, 0]


def encode(image, file_format, **options):
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


@pytest.mark.parametrize("file_format", ["PNG", "BMP", "TIFF", "WEBP"])
def test_lossless_formats_are_exact(file_format):
    data = encode(Image.fromarray(RGB), file_format, lossless=True)
    decoded = decode_image(data)
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, RGB)


def test_grey_is_repeated():
    expected = np.stack([GREY] * 3, axis=2)
    np.testing.assert_array_equal(decode_image(encode(Image.fromarray(GREY), "PNG")), expected)
    np.testing.assert_array_equal(decode_image(GREY), expected)
    np.testing.assert_array_equal(decode_image(GREY[:, :, None]), expected)
    one_bit = Image.fromarray(GREY > 127)
    expected = np.stack([np.where(GREY > 127, 255, 0)] * 3, axis=2)
    np.testing.assert_array_equal(decode_image(encode(one_bit, "PNG")), expected)


def test_rgb_pixels_pass_through():
    assert decode_image(RGB) is RGB


def test_palette():
    palette = Image.fromarray(RGB).quantize(16)
    expected = np.asarray(palette.convert("RGB"))
    np.testing.assert_array_equal(decode_image(encode(palette, "PNG")), expected)
    np.testing.assert_array_equal(decode_image(encode(palette, "GIF")), expected)


def test_transparency_is_laid_over_white():
    alpha = np.full((6, 9, 1), 255, np.uint8)
    alpha[0, 0] = 0
    expected = RGB.copy()
    expected[0, 0] = 255
    rgba = Image.fromarray(np.concatenate([RGB, alpha], axis=2))
    np.testing.assert_array_equal(decode_image(encode(rgba, "PNG")), expected)
    grey_alpha = Image.fromarray(np.concatenate([GREY[:, :, None], alpha], axis=2))
    assert grey_alpha.mode == "LA"
    decoded = decode_image(encode(grey_alpha, "PNG"))
    assert (decoded[0, 0] == 255).all()
    np.testing.assert_array_equal(decoded[1:, :, 1], GREY[1:])
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), mode="P")
    palette.putpalette([9, 9, 9, 7, 7, 7])
    decoded = decode_image(encode(palette, "PNG", transparency=0))
    np.testing.assert_array_equal(decoded, [[[255] * 3, [7] * 3]])


def test_16_bit_grey_is_scaled_not_clipped():
    deep = GREY.astype(np.uint16) * 257
    decoded = decode_image(encode(Image.fromarray(deep), "PNG"))
    np.testing.assert_array_equal(decoded, np.stack([GREY] * 3, axis=2))


def test_jpeg_colour_spaces():
    smooth = np.zeros((32, 32, 3), np.uint8)
    smooth[:, :16] = (200, 40, 90)
    image = Image.fromarray(smooth)
    for mode in ("RGB", "CMYK"):
        decoded = decode_image(encode(image.convert(mode), "JPEG", quality=95, subsampling=0))
        assert np.abs(decoded.astype(int) - smooth).max() <= 8, mode
    grey = decode_image(encode(image.convert("L"), "JPEG"))
    assert grey.shape == (32, 32, 3)
    assert (grey[:, :, 0] == grey[:, :, 2]).all()


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "GIF", "WEBP", "BMP"])
def test_truncated_bytes_are_a_value_error(file_format):
    whole = encode(Image.fromarray(RGB), file_format)
    # A file's last bytes may hold no pixels: a PNG's are a checksum (8) and an end mark (12).
    for length in range(0, len(whole) - 20, 3):
        with pytest.raises(ValueError, match=f"cannot decode {length} bytes"):
            decode_image(whole[:length])


def test_corrupt_bytes_decode_or_are_a_value_error():
    whole = np.frombuffer(encode(Image.fromarray(RGB), "PNG"), np.uint8)
    failures = 0
    for i in range(len(whole)):
        broken = whole.copy()
        broken[i] ^= 0x55
        try:
            decode_image(broken.tobytes())
        except ValueError:
            failures += 1
    assert failures > len(whole) // 2


def test_errors_say_what_was_found():
    with pytest.raises(ValueError, match=r"14 bytes that begin with b'<html>no'"):
        decode_image(b"<html>not here")
    with pytest.raises(ValueError, match=r"float32 \[4, 4, 3\]: expected uint8"):
        decode_image(np.zeros((4, 4, 3), np.float32))
    with pytest.raises(ValueError, match=r"uint8 \[4, 4, 4\]"):
        decode_image(np.zeros((4, 4, 4), np.uint8))
    with pytest.raises(ValueError, match="32-bit numbers of unknown range"):
        decode_image(encode(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF"))
