"""The preprocessing of timm's and Hugging Face's files: read, written again, equal to theirs."""

import numpy as np
import pytest
from PIL import Image

from vit_jax.data.augment import parse_preprocess
from vit_jax.weights.preprocessing import (
    from_hugging_face,
    from_timm,
    to_hugging_face,
    to_timm,
)
from vit_jax.weights.stated import Stated

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
TIMM = [
    {"crop_pct": 0.9, "interpolation": "bicubic", "crop_mode": "center"},
    {"crop_pct": 0.875, "interpolation": "bilinear", "crop_mode": "center"},
    {"crop_pct": 0.95, "interpolation": "bicubic", "crop_mode": "squash"},
    {"crop_pct": 1.0, "interpolation": "lanczos", "crop_mode": "squash"},
]
HUGGING_FACE = [
    {"size": {"height": 32, "width": 32}, "resample": 3},
    {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}, "resample": 3},
    {"size": {"height": 37, "width": 37}, "crop_size": 32, "do_center_crop": True, "resample": 2},
]


def photos():
    """Smooth noise of odd sizes, landscape and portrait."""
    rng = np.random.default_rng(0)
    for height, width in ((50, 71), (71, 50), (33, 200), (31, 31), (32, 32), (129, 47)):
        small = Image.fromarray(rng.integers(0, 256, (9, 9, 3), np.uint8))
        yield np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


@pytest.mark.parametrize("fields", TIMM)
def test_timms_fields_and_back(fields):
    stated = Stated({**fields, "mean": MEAN, "std": STD}, "pretrained_cfg")
    spec, mean, std = from_timm(stated)
    assert to_timm(spec) == fields and (list(mean), list(std)) == (MEAN, STD)


@pytest.mark.parametrize("fields", HUGGING_FACE)
def test_hugging_faces_fields_and_back(fields):
    fields = {"do_center_crop": "crop_size" in fields, **fields}
    stated = Stated({**fields, "image_mean": MEAN, "image_std": STD}, "preprocessor_config.json")
    spec, mean, std = from_hugging_face(stated, (32, 32))
    written = to_hugging_face(spec, (32, 32), mean, std)
    again = from_hugging_face(Stated(written, "preprocessor_config.json"), (32, 32))
    assert again == (spec, mean, std)
    assert written["size"] == fields["size"] and written["resample"] == fields["resample"]


def test_what_would_change_numbers_is_named():
    for fields, message in (
        ({"crop_mode": "border"}, "unknown crop_mode"),
        ({"interpolation": "nearest"}, "unknown interpolation"),
        ({"crop_pct": 0}, "crop_pct = 0: expected a number above 0"),
        ({"std": 0}, "std = 0: expected three numbers above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            from_timm(Stated(fields, "pretrained_cfg"))
    for fields, message in (
        ({"do_rescale": False}, "does not scale pixels by 1/255"),
        ({"resample": 0}, "resample = 0: expected one of"),
        ({"do_resize": False}, "do_resize = False"),
        ({"size": {"longest_edge": 3}}, "expected height and width, or shortest_edge"),
    ):
        with pytest.raises(ValueError, match=message):
            from_hugging_face(Stated(fields, "preprocessor_config.json"), (32, 32))
    with pytest.raises(ValueError, match="can't state the preprocessing 'flip'"):
        to_timm("flip")


def test_a_number_as_size_is_what_the_kind_of_processor_takes_it_for():
    for kind, expected in (
        ("ViTImageProcessor", "resize('bilinear_antialias')"),
        ("DeiTFeatureExtractor", "resize('bilinear_antialias')"),
        ("CLIPImageProcessorFast", "torchvision_crop(1.0, 'bilinear_antialias', floor=True)"),
        ("CLIPFeatureExtractor", "torchvision_crop(1.0, 'bilinear_antialias', floor=True)"),
    ):
        field = "feature_extractor_type" if "Feature" in kind else "image_processor_type"
        stated = Stated({field: kind, "size": 32}, "preprocessor_config.json")
        assert from_hugging_face(stated, (32, 32))[0] == expected, kind
    with pytest.raises(ValueError, match="ConvNextImageProcessor': expected that of ViT, DeiT"):
        stated = Stated({"image_processor_type": "ConvNextImageProcessor"}, "x.json")
        from_hugging_face(stated, (32, 32))


def test_sizes_of_torchvisions_crop():
    """4 x 9 pixels: the shorter side is 2 / 0.5, and the crop begins at round((9 - 2) / 2) = 4."""
    process = parse_preprocess("torchvision_crop(0.5, 'bilinear_antialias')", (2, 2))
    image = np.repeat(np.arange(9, dtype=np.uint8)[None, :, None], 4, 0).repeat(3, 2)
    np.testing.assert_array_equal(process(image, None)[0, :, 0], [4, 5])


@pytest.mark.parametrize("fields", TIMM)
def test_pixels_of_timm(fields):
    timm_data = pytest.importorskip("timm.data")
    spec, _, _ = from_timm(Stated(fields, "pretrained_cfg"))
    ours = parse_preprocess(spec, (32, 32))
    theirs = timm_data.create_transform(
        input_size=(3, 32, 32), is_training=False, mean=(0, 0, 0), std=(1, 1, 1), **fields
    )
    for photo in photos():
        expected = theirs(Image.fromarray(photo)).numpy().transpose(1, 2, 0) * 255
        found = ours(photo, np.random.default_rng(0)).astype(np.float32)
        np.testing.assert_allclose(found, expected, atol=1e-3)


@pytest.mark.parametrize("fields", HUGGING_FACE)
def test_pixels_of_transformers(fields):
    transformers = pytest.importorskip("transformers")
    fields = {"do_center_crop": "crop_size" in fields, **fields}
    spec, _, _ = from_hugging_face(Stated(fields, "preprocessor_config.json"), (32, 32))
    ours = parse_preprocess(spec, (32, 32))
    processor = transformers.CLIPImageProcessor(**fields, do_normalize=False)
    for photo in photos():
        found = processor(Image.fromarray(photo), return_tensors="np")["pixel_values"][0]
        expected = np.asarray(found).transpose(1, 2, 0) * 255
        assert np.abs(ours(photo, np.random.default_rng(0)) - expected).max() <= 1.01
