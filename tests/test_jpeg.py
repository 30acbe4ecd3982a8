"""Partially decoded JPEG crops have the same pixels as the whole image decoded by Pillow."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageChops

from vit_jax.data.augment import parse_preprocess
from vit_jax.data.decode import MAX_PIXELS, Jpeg, decode_image, open_image

GOLDEN = np.load(Path(__file__).parent / "golden" / "tf_image.npz")
PHOTOS = ["astronaut", "china", "flower"]
HEIGHT, WIDTH = 107, 160  # of china


def photo(name="china"):
    return Image.fromarray(decode_image(GOLDEN[f"{name}/jpeg"].tobytes()))


def encode(image, file_format="JPEG", **options):
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


JPEGS = {
    "420": {"subsampling": 2},
    "422": {"subsampling": 1},
    "444": {"subsampling": 0},
    "progressive": {"progressive": True},
    "restarts": {"restart_marker_blocks": 3},
    "exif": {"exif": Image.Exif()},
    "rgb": {"keep_rgb": True},
    "grey": {"mode": "L"},
}


def jpeg(kind):
    options = dict(JPEGS[kind])
    if kind == "exif":
        options["exif"][0x0112] = 6  # turn it by 90 degrees: not applied, as published
    return encode(photo().convert(options.pop("mode", "RGB")), quality=90, **options)


@pytest.mark.parametrize("kind", JPEGS)
def test_any_crop_equals_the_whole_decoded_by_pillow(kind):
    data = jpeg(kind)
    whole = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    image = open_image(data)
    assert isinstance(image, Jpeg)
    assert image.shape == whole.shape == (HEIGHT, WIDTH, 3)
    assert (image.height_at is None) == (kind == "progressive")
    np.testing.assert_array_equal(image.decode(), whole)
    rng = np.random.default_rng(0)
    for _ in range(50):
        top, bottom = np.sort(rng.choice(HEIGHT + 1, 2, replace=False))
        left, right = np.sort(rng.choice(WIDTH + 1, 2, replace=False))
        found = image.crop((left, top, right, bottom), (bottom - top, right - left))
        np.testing.assert_array_equal(found, whole[top:bottom, left:right])


@pytest.mark.parametrize("scale", [2, 4, 8])
@pytest.mark.parametrize("kind", ["420", "422", "444"])
def test_large_crops_are_decoded_smaller(kind, scale):
    """Equals Pillow's decoding of the whole at the same scale, with and without rows below."""
    data = encode(photo().resize((480, 321)), **JPEGS[kind])
    with Image.open(io.BytesIO(data)) as image:
        image.draft("RGB", (480 // scale, 321 // scale))
        whole = np.asarray(image)
    image = open_image(data)
    side = 160
    for left, top in ((0, 0), (5, 33), (480 - side, 321 - side)):
        box = (left, top, left + side, top + side)
        found = image.crop(box, (side // scale, side // scale))
        expected = whole[top // scale :, left // scale :][: found.shape[0], : found.shape[1]]
        assert side // scale <= found.shape[0] <= side // scale + 1
        np.testing.assert_array_equal(found, expected)
        assert image.crop(box, (side // scale + 1, 1)).shape[0] >= side // scale * 2


def test_rows_below_the_crop_are_not_read():
    data = jpeg("420")
    image = open_image(data)
    whole = image.decode()
    at = len(data) * 2 // 3
    broken = open_image(data[:at] + bytes(len(data) - at - 2) + data[-2:])
    box = (0, 0, WIDTH, HEIGHT // 2)
    np.testing.assert_array_equal(broken.crop(box, box[2:]), whole[: HEIGHT // 2])
    assert not np.array_equal(broken.decode(), whole)


@pytest.mark.parametrize("kind", JPEGS)
def test_preprocessing_is_the_same_for_both(kind):
    data = jpeg(kind)
    for spec in ("inception_crop|flip", "central_crop(0.875)", "resize|flip"):
        run = parse_preprocess(spec, (64, 96))  # less than half of it: not decoded smaller
        for seed in range(8):
            fast = run(open_image(data), np.random.default_rng(seed))
            general = run(decode_image(data), np.random.default_rng(seed))
            np.testing.assert_array_equal(fast, general)


def test_smaller_decoding_is_nearer_to_antialiasing():
    """Compares mean grey levels with an antialiased resize, at a reduction by more than 4."""
    data = encode(photo("astronaut").resize((480, 480), Image.Resampling.BICUBIC), quality=95)
    size = (96, 96)
    best = parse_preprocess("resize('bilinear_antialias')", size)(decode_image(data), None)
    whole = parse_preprocess("inception_crop(1, 1)", size)

    def distance(image):
        return np.abs(whole(image, Whole()).astype(float) - best).mean()

    class Whole:  # draws the largest square
        def uniform(self, low, high):
            return 1.0

        def integers(self, *bounds, endpoint):
            return bounds[-1]

    assert distance(open_image(data)) < 1.5
    assert distance(open_image(data)) < distance(decode_image(data))


# What the fast path must leave to Pillow, and what it must not accept as complete.


def without_adobe(data):
    """Makes a CMYK JPEG with inks that aren't inverted: Pillow inverts them, as Adobe does."""
    at = data.index(b"\xff\xee")
    (length,) = struct.unpack_from(">H", data, at + 2)
    return data[:at] + data[at + 2 + length :]


def test_cmyk_with_and_without_adobes_inversion():
    colour = Image.new("RGB", (32, 16), (200, 40, 90))
    data = encode(colour.convert("CMYK"), quality=95)
    assert isinstance(open_image(data), np.ndarray)
    adobe = decode_image(data).astype(int)
    assert np.abs(adobe - (200, 40, 90)).max() <= 4
    negative = encode(ImageChops.invert(colour.convert("CMYK")), quality=95)
    plain = decode_image(without_adobe(negative)).astype(int)
    assert np.abs(plain - (200, 40, 90)).max() <= 4


def test_16_bit_colour_keeps_its_upper_byte():
    pixels = np.random.default_rng(0).integers(1 << 16, size=(5, 7, 3)).astype(">u2")

    def chunk(kind, content):
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", 7, 5, 16, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    data += chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    np.testing.assert_array_equal(decode_image(data), (pixels >> 8).astype(np.uint8))


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame(file_format):
    first = Image.new("RGB", (20, 10), (255, 0, 0))
    later = [Image.new("RGB", (20, 10), (0, 0, 255))] * 2
    options = {"lossless": True} if file_format == "WEBP" else {}
    data = encode(first, file_format, save_all=True, append_images=later, **options)
    np.testing.assert_array_equal(open_image(data), np.asarray(first))


def test_grey_and_palette_with_transparency_in_webp_and_png():
    half = np.zeros((8, 8, 4), np.uint8)
    half[:, :4, 3] = 255  # black on the left, nothing on the right
    for file_format in ("PNG", "WEBP"):
        options = {"lossless": True} if file_format == "WEBP" else {}
        found = open_image(encode(Image.fromarray(half), file_format, **options))
        assert (found[:, :4] == 0).all()
        assert (found[:, 4:] == 255).all()


@pytest.mark.parametrize("kind", JPEGS)
def test_a_truncated_jpeg_is_an_error_whatever_the_crop(kind):
    data = jpeg(kind)
    crop = parse_preprocess("inception_crop(0.05, 0.06)", (8, 8))
    for length in (0, 1, 2, 20, 200, len(data) // 2, len(data) - 60):
        for seed in range(3):
            with pytest.raises(ValueError, match=f"cannot decode {length} bytes"):
                crop(open_image(data[:length]), np.random.default_rng(seed))


def write_size(data, height, width):
    """Writes height x width into the header, whatever the pixels."""
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bombs_are_refused():
    with pytest.raises(ValueError, match="exceeds limit"):
        open_image(write_size(jpeg("420"), 65500, 65500))
    with pytest.raises(ValueError, match=r"exceeds limit .* set VIT_JAX_MAX_PIXELS"):
        open_image(write_size(jpeg("420"), 65000, 1 + MAX_PIXELS // 65000))
    black = encode(Image.new("1", (30_000, 6_000)), "PNG")
    assert len(black) < 100_000
    with pytest.raises(ValueError, match="cannot decode"):
        open_image(black)
    scans = jpeg("progressive")
    at = scans.rindex(b"\xff\xda")
    with pytest.raises(ValueError, match="more than 500 scans"):
        open_image(scans[:at] + scans[at:-2] * 500 + scans[-2:])


def test_a_jpeg_takes_seconds_and_not_minutes():
    scans = jpeg("progressive")
    at = scans.rindex(b"\xff\xda")
    many = scans[:at] + scans[at:-2] * 490 + scans[-2:]
    frame = many.index(b"\xff\xc2") + 5
    many = many[:frame] + struct.pack(">HH", 4000, 4000) + many[frame + 4 :]
    with pytest.raises(ValueError, match="scans of 16,000,000 pixels each, more than"):
        open_image(many)


@pytest.mark.slow
def test_large_photographs_are_decoded_at_half_their_size(monkeypatch):
    """Photographs of 100 megapixels are real; the limit may be changed."""
    data = encode(Image.new("RGB", (12_000, 8_500), (9, 200, 77)), "JPEG")
    pixels = decode_image(data)
    assert pixels.shape == (4250, 6000, 3)
    assert np.abs(pixels[::100, ::100].astype(int) - (9, 200, 77)).max() < 4
    monkeypatch.setenv("VIT_JAX_MAX_PIXELS", "100000000")
    with pytest.raises(ValueError, match=r"more than 100,000,000: .*VIT_JAX_MAX_PIXELS=102000000"):
        decode_image(data)


def crops(data):
    """Returns the pixels, or that they were refused, for each way to read the file."""
    for read in (
        decode_image,
        lambda data: open_image(data).crop((0, 0, 40, 40), (40, 40)),
        lambda data: parse_preprocess("inception_crop", (8, 8))(
            open_image(data), np.random.default_rng(0)
        ),
    ):
        try:
            yield read(data).shape != ()
        except ValueError:
            yield False


@pytest.mark.parametrize("kind", ["420", "progressive"])
def test_one_verdict_on_damaged_files(kind):
    """Training refuses the same files as `predict` and `prepare`."""
    whole, verdicts = jpeg(kind), []
    start = whole.index(b"\xff\xda") + 20
    for i, at in enumerate(np.linspace(start, len(whole) - 40, 40).astype(int)):
        data = bytearray(whole)
        data[at : at + 2] = [b"\xff\xc4", b"\xff\x07", b"\xff\xd9", b"\x00\x00"][i % 4]
        found = set(crops(bytes(data)))
        assert len(found) == 1, (i, at)
        verdicts += found
        if any(found):
            data = bytes(data)
            np.testing.assert_array_equal(decode_image(data), open_image(data).decode())
    assert len(set(verdicts)) == 2


def test_files_that_call_programs_are_not_opened():
    with pytest.raises(ValueError, match="cannot decode"):
        decode_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n")


# TensorFlow.


@pytest.mark.parametrize("name", PHOTOS)
def test_resizing_is_tensorflows(name):
    """Equals tf.image's floats within one grey level, including rounding (up to 0.5)."""
    image = open_image(GOLDEN[f"{name}/jpeg"].tobytes())
    whole = image.decode()
    for method in ("bilinear", "area", "bilinear_antialias"):
        specs = {f"resize_{method}": f"resize({method!r})"}
        if method != "bilinear_antialias":
            specs[f"central_crop_{method}"] = f"central_crop(0.875, {method!r})"
        for golden, spec in specs.items():
            ours = parse_preprocess(spec, (24, 24))(image, None).astype(float)
            theirs = GOLDEN[f"{name}/{golden}"] / 128
            assert np.abs(ours - theirs).max() < 1, golden
            assert np.abs(ours - theirs).mean() < 0.3, golden
    larger = parse_preprocess("resize", (24, 24))(whole[:18, :15], None).astype(float)
    assert np.abs(larger - GOLDEN[f"{name}/resize_larger_bilinear"] / 128).max() < 1


def test_antialiased_resizing_is_pillows():
    whole = photo()
    for method, filter_ in (("bilinear", "BILINEAR"), ("bicubic", "BICUBIC")):
        ours = parse_preprocess(f"resize('{method}_antialias')", (24, 30))(np.asarray(whole), None)
        theirs = np.asarray(whole.resize((30, 24), Image.Resampling[filter_]))
        np.testing.assert_array_equal(ours, theirs)
