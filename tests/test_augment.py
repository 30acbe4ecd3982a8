import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from vit_jax.data.augment import OPS, parse_preprocess

SIZE = (24, 16)
ALL_OPS = [
    "resize",
    "inception_crop",
    "random_crop(0.8)",
    "central_crop(0.875)",
    "torchvision_crop(0.9)",
    "resize|pad_crop(3)",
    "resize|flip",
    "resize|affine",
    "resize|randaugment(2, 15)",
    "resize|autoaugment",
    "resize|random_erasing",
]
KEEP_CONSTANTS = ALL_OPS[:8]


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(256, size=(height, width, 3), dtype=np.uint8)


def ramp(height, width):
    """Makes an image: red is the row, green the column, blue constant."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows, columns, np.full_like(rows, 77)], axis=2).astype(np.uint8)


def run(spec, image, seed=0, size=SIZE):
    return parse_preprocess(spec, size)(image, np.random.default_rng(seed))


def test_every_op_is_tested():
    assert {op.split("|")[-1].split("(")[0] for op in ALL_OPS} == set(OPS) - {"upright"}


@pytest.mark.parametrize("spec", ALL_OPS)
@pytest.mark.parametrize("shape", [(50, 37), (10, 90), (1, 1), SIZE])
def test_output_is_uint8_of_the_size_and_the_input_untouched(spec, shape):
    image = noise(*shape)
    before = image.copy()
    for seed in range(5):
        out = run(spec, image, seed)
        assert out.shape == (*SIZE, 3)
        assert out.dtype == np.uint8
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize("spec", ALL_OPS)
def test_output_depends_on_the_image_and_the_generator_alone(spec):
    image = noise(50, 37)
    outs = [run(spec, image, seed) for seed in range(20)]
    for seed, out in enumerate(outs):
        np.testing.assert_array_equal(run(spec, image, seed), out)
    is_random = spec not in ("resize", "central_crop(0.875)", "torchvision_crop(0.9)")
    assert (len({out.tobytes() for out in outs}) > 1) == is_random


@pytest.mark.parametrize("spec", ["resize", "central_crop(1.0)", "random_crop(1)", "pad_crop(0)"])
def test_identity_where_the_size_fits(spec):
    image = noise(*SIZE)
    np.testing.assert_array_equal(run(spec, image), image)


@pytest.mark.parametrize("spec", KEEP_CONSTANTS)
def test_a_constant_image_stays_constant_inside(spec):
    out = run(spec, np.full((60, 45, 3), 200, np.uint8))
    assert (out[4:-4, 4:-4] == 200).all()


def test_flip_is_the_image_or_its_mirror_image_half_the_time():
    image = noise(*SIZE)
    flipped = 0
    for seed in range(400):
        out = run("flip", image, seed)
        mirrored = np.array_equal(out, image[:, ::-1])
        assert mirrored or np.array_equal(out, image)
        flipped += mirrored
    assert 160 < flipped < 240  # 4 standard deviations


def test_central_crop_is_the_centre_with_the_aspect_kept():
    # 64 x 128 at 0.5 and 16: the smaller side to 32, so one output pixel is 2 x 2 input pixels.
    out = run("central_crop(0.5)", ramp(64, 128), size=(16, 16)).astype(float)
    assert out[:, :, 0].mean() == pytest.approx(31.5, abs=0.6)
    assert out[:, :, 1].mean() == pytest.approx(63.5, abs=0.6)
    assert np.diff(out[:, 0, 0]).mean() == pytest.approx(2, abs=0.1)
    assert np.diff(out[0, :, 1]).mean() == pytest.approx(2, abs=0.1)


def test_central_crop_of_published_evaluation():
    """0.875 at 224: the smaller side to 256, then 16 pixels off each side."""
    image = noise(256, 300)
    out = run("central_crop(0.875)", image, size=(224, 224))
    np.testing.assert_array_equal(out, image[16:240, 38:262])


def test_random_crop_reaches_every_position():
    image = ramp(28, 28)
    corners = {
        tuple(run("random_crop(0.857)", image, seed, (24, 24))[0, 0, :2]) for seed in range(300)
    }
    assert corners == {(row, column) for row in range(5) for column in range(5)}


def test_random_crop_ignores_the_aspect_as_bit_does():
    out = run("random_crop(1.0)", ramp(48, 64), size=(24, 16)).astype(float)
    assert np.diff(out[4:-4, 0, 0]).mean() == pytest.approx(2, abs=0.1)
    assert np.diff(out[0, 4:-4, 1]).mean() == pytest.approx(4, abs=0.1)


def test_pad_crop_shifts_and_fills_with_black():
    image = ramp(8, 8) + 1
    seen = set()
    for seed in range(300):
        out = run("pad_crop(1)", image, seed, (8, 8))
        padded = np.pad(image, ((1, 1), (1, 1), (0, 0)))
        shifts = [
            (r, c)
            for r in range(3)
            for c in range(3)
            if np.array_equal(out, padded[r : r + 8, c : c + 8])
        ]
        assert len(shifts) == 1
        seen.update(shifts)
    assert len(seen) == 9


def boxes(spec, height, width, count=300):
    """Measures top, left, height and width of random crops on a ramp."""
    found = []
    for seed in range(count):
        out = run(spec, ramp(height, width), seed, (64, 64)).astype(float)
        # Away from the edges a resized ramp is a ramp: its slope is the zoom.
        rows, columns = out[8:-8, 32, 0], out[32, 8:-8, 1]
        box_height = 64 * (rows[-1] - rows[0]) / 47
        box_width = 64 * (columns[-1] - columns[0]) / 47
        top, left = out[:, 32, 0].min(), out[32, :, 1].min()
        found.append((top, left, box_height, box_width))
    return np.array(found)


def test_inception_crop_distribution():
    found = boxes("inception_crop(0.2, 0.8)", 200, 250)
    top, left, height, width = found.T
    area = height * width / (200 * 250)
    assert top.min() >= 0
    assert left.min() >= 0
    assert (top + height).max() <= 202  # the measurement is good to 2 pixels
    assert (left + width).max() <= 252
    assert 0.18 < area.min() < 0.25
    assert 0.7 < area.max() < 0.84
    aspect = width / height
    assert 0.72 < aspect.min() < 0.8
    assert 1.25 < aspect.max() < 1.38
    assert aspect.mean() == pytest.approx((3 / 4 + 4 / 3) / 2, abs=0.04)  # uniform, not log-uniform
    # The height, not the area, is uniform: its mean is that of the two ends.
    ends = np.sqrt(np.array([0.2, 0.8]) * 200 * 250)
    expected = np.mean([(e / np.sqrt(a)) for e in ends for a in np.linspace(3 / 4, 4 / 3, 50)])
    assert height.mean() == pytest.approx(expected, rel=0.04)


def test_inception_crop_of_a_thin_image_is_the_whole_image():
    image = noise(10, 400)
    np.testing.assert_array_equal(run("inception_crop(0.9)", image), run("resize", image))


def test_affine_moves_within_its_bounds():
    image = np.zeros((41, 41, 3), np.uint8)
    image[20, 20] = 255
    np.testing.assert_array_equal(run("affine(0, 0, 0)", image), image)
    shifts = []
    for seed in range(200):
        bright = run("affine(90, 0.3, 0.1)", image, seed)[:, :, 0].astype(float)
        assert bright.sum() > 0
        rows, columns = np.mgrid[:41, :41]
        shifts.append(
            (
                (bright * rows).sum() / bright.sum() - 20,
                (bright * columns).sum() / bright.sum() - 20,
            )
        )
    shifts = np.abs(shifts)
    assert shifts.max() <= 0.1 * 41 + 0.6  # the centre only shifts
    assert shifts.max() > 0.08 * 41
    # A horizontal bar turned by up to 45 degrees.
    bar = np.zeros((41, 41, 3), np.uint8)
    bar[19:22, 5:36] = 255
    angles = []
    for seed in range(200):
        rows, columns = np.nonzero(run("affine(45, 0, 0)", bar, seed)[:, :, 0] > 128)
        angles.append(np.degrees(np.arctan(np.polyfit(columns, rows, 1)[0])))
    assert -47 < min(angles) < -38
    assert 38 < max(angles) < 47


def test_affine_scale():
    square = np.zeros((60, 60, 3), np.uint8)
    square[20:40, 20:40] = 255
    sides = [
        np.sqrt((run("affine(0, 0.25, 0)", square, seed)[:, :, 0] / 255).sum())
        for seed in range(200)
    ]
    assert 14.8 < min(sides) < 16
    assert 24 < max(sides) < 25.3
    assert np.mean(sides) == pytest.approx(20, abs=0.7)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "inception_crp",
            "unknown preprocessing op 'inception_crp': did you mean 'inception_crop'",
        ),
        ("", "cannot read preprocessing op ''"),
        ("resize|", "cannot read preprocessing op ''"),
        ("flip(", "cannot read preprocessing op 'flip('"),
        ("central_crop(__import__('os'))", "cannot read preprocessing op"),
        ("flip.flip", "cannot read preprocessing op"),
        ("resize + flip", "cannot read preprocessing op"),
        ("central_crop", "missing a required argument: 'fraction'; expected central_crop(fraction"),
        ("flip(0.5)", "too many positional arguments; expected flip()"),
        ("pad_crop(size=3)", "multiple values for argument 'size'; expected pad_crop(pixels: int)"),
        ("inception_crop(area=1)", "unexpected keyword argument 'area'"),
        ("central_crop(256)", "expected 0 < fraction <= 1, found 256"),
        ("random_crop('a')", "expected random_crop(fraction: float"),
        ("inception_crop(0.5, 0.1)", "expected 0 < min_area <= max_area <= 1"),
        ("pad_crop(1.5)", "expected a whole number of pixels"),
        ("affine(scale=1)", "0 <= scale < 1"),
        ("randaugment(2, 31)", "0 <= magnitude <= 30, found 2 and 31"),
        ("randaugment(1.5)", "layers >= 0"),
        ("random_erasing(2)", "0 <= probability <= 1"),
    ],
)
def test_bad_specs(spec, message):
    with pytest.raises(ValueError) as error:
        parse_preprocess(spec, SIZE)
    assert message in str(error.value)


def test_keyword_and_positional_arguments_agree():
    image = noise(60, 60)
    for seed in range(5):
        np.testing.assert_array_equal(
            run("inception_crop(0.3, 0.4)", image, seed),
            run(" inception_crop( max_area=0.4, min_area=0.3 ) ", image, seed),
        )


def test_crop_of_too_small_an_image_says_to_resize():
    with pytest.raises(ValueError, match=r"24 x 16 out of 10 x 10 pixels: add `resize`"):
        run("pad_crop(1)", noise(8, 8))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_upright_is_what_a_viewer_shows(kind):
    """All eight orientations, and damaged EXIF data, which viewers ignore."""
    image = Image.fromarray(np.add.outer(np.arange(24), 3 * np.arange(40)).astype(np.uint8))
    prepare = parse_preprocess("upright|resize", (24, 40))
    plain = parse_preprocess("resize", (24, 40))
    for turn in range(1, 9):
        exif, file = Image.Exif(), io.BytesIO()
        exif[0x0112] = turn
        image.save(file, kind, exif=exif.tobytes())
        with Image.open(file) as stored:
            expected = plain(np.asarray(ImageOps.exif_transpose(stored).convert("RGB")), None)
        np.testing.assert_allclose(prepare(file.getvalue(), None), expected, atol=2)
        ignored = plain(file.getvalue(), None)
        assert (turn == 1) == np.array_equal(prepare(file.getvalue(), None), ignored)
    file = io.BytesIO()
    image.save(file, "JPEG", exif=exif.tobytes()[:16])
    assert np.array_equal(prepare(file.getvalue(), None), plain(file.getvalue(), None))
    with pytest.raises(ValueError, match="upright comes first"):
        parse_preprocess("resize|upright", (24, 40))
