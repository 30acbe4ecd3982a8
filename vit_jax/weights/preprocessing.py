"""The preprocessing that belongs to weights: from timm's and Hugging Face's files, and back.

Ours is a string, see `data.augment.parse_preprocess`; means and deviations of pixels are fields of
`ModelConfig`. What a file doesn't say has the default of the library that wrote it.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

from vit_jax.config import InputError
from vit_jax.weights.stated import Stated

MEAN = STD = (0.5, 0.5, 0.5)  # of pixels in [0, 1]: they map to [-1, 1]
# timm's `IMAGENET_DEFAULT_MEAN` and `IMAGENET_DEFAULT_STD`, the defaults of its evaluation.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_METHODS = {name: f"{name}_antialias" for name in ("bilinear", "bicubic", "lanczos")}
_RESAMPLE = {1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers
_SQUARE = {  # kinds of transformers' image processors: whether a number is the size of both sides
    **dict.fromkeys(("ViT", "DeiT", "DINOv3ViT", "Siglip2"), True),
    **dict.fromkeys(("CLIP", "Siglip", "Bit"), False),
}
_CROP = re.compile(
    r"torchvision_crop\((?P<fraction>[\d.e-]+), '(?P<method>\w+)_antialias'"
    r"(?P<squash>, True)?(?:, floor=True)?\)"
)
_OURS = re.compile(
    r"resize(?:\('?(?P<resize>\w+)'?\))?"
    r"|central_crop\((?P<fraction>[\d.]+)(?:, '(?P<method>\w+)')?\)"
)


def from_timm(config: Stated) -> tuple[str, tuple, tuple]:
    """Returns the preprocessing, mean and standard deviation of timm's `pretrained_cfg`."""
    method = config.choice("interpolation", _METHODS, "bicubic")
    mode = config.choice("crop_mode", {m: m for m in ("center", "squash")}, "center")
    fraction = config.number("crop_pct", 0.875, above=0)
    if fraction > 1:
        raise config.wrong("crop_pct", "a fraction up to 1")
    mean = config.triple("mean", IMAGENET_MEAN)
    std = config.triple("std", IMAGENET_STD, positive=True)
    return _crop(fraction, method, mode == "squash"), mean, std


def from_hugging_face(config: Stated, size: tuple[int, int]) -> tuple[str, tuple, tuple]:
    """Returns the preprocessing, mean and standard deviation of `preprocessor_config.json`.

    `size`: height and width of the model's images; the crop's fraction is kept for it. Raises
    ValueError for pixels that aren't scaled by 1/255.
    """
    rescale = config.number("rescale_factor", 1 / 255)
    if not config.flag("do_rescale", True) or abs(rescale * 255 - 1) > 1e-6:
        raise InputError(
            f"{config.file} does not scale pixels by 1/255: expected do_rescale = true and "
            "rescale_factor = 1/255"
        )
    mean, std = (0.0,) * 3, (1.0,) * 3
    if config.flag("do_normalize", True):
        mean = config.triple("image_mean", MEAN)
        std = config.triple("image_std", STD, positive=True)
    number = config.whole("resample", 2)
    if number not in _RESAMPLE:
        raise config.wrong("resample", f"one of {', '.join(map(str, _RESAMPLE))}")
    method = _METHODS[_RESAMPLE[number]]
    if not config.flag("do_resize", True):
        raise config.wrong("do_resize", "true: images of any size must fit the model")
    cropped = config.flag("do_center_crop", False)
    edge, squash = _edges(config, "size", size, square=_is_square(config, cropped))
    crop = _edges(config, "crop_size", size)[0] if cropped else edge
    fraction = crop[0] / edge[0]
    if crop[0] * edge[1] != crop[1] * edge[0] or fraction > 1:
        raise config.wrong("crop_size", f"a part of size, {edge[0]}x{edge[1]}, of its shape")
    if squash and fraction == 1:
        return f"resize('{method}')", mean, std
    while math.floor(crop[0] / fraction) < edge[0]:
        fraction = math.nextafter(fraction, 0)
    return _crop(fraction, method, squash).replace(")", ", floor=True)"), mean, std


def _is_square(config: Stated, cropped: bool) -> bool:
    """Whether a number in `size` is that of both sides, instead of the shorter side's.

    Raises ValueError for kinds of processors that do something else.
    """
    field = "feature_extractor_type" if "feature_extractor_type" in config else ""
    field = "image_processor_type" if "image_processor_type" in config else field
    if not field:
        return not cropped
    kind = re.sub("(ImageProcessor(Fast|Pil)?|FeatureExtractor)$", "", config.text(field))
    if kind not in _SQUARE:
        raise config.wrong(field, f"that of {', '.join(_SQUARE)}; others may crop in another way")
    return _SQUARE[kind]


def _edges(
    config: Stated, name: str, default: tuple[int, int], square: bool = True
) -> tuple[tuple[int, int], bool]:
    """Returns the size that a field states, and whether it is both sides' or the shorter's."""
    value = config.fields.get(name)
    if isinstance(value, dict):
        part = config.part(name)
        if "shortest_edge" in part:
            return (part.whole("shortest_edge", least=1),) * 2, False
        sides = part.whole("height", least=1), part.whole("width", least=1)
        if None in sides:
            raise config.wrong(name, "height and width, or shortest_edge")
        return sides, True
    return config.size(name, default), square or value is None


def to_timm(preprocessing: str) -> dict[str, Any]:
    """Returns the fields of timm's `pretrained_cfg`; ValueError for what it can't state."""
    fraction, method, squash = _parts(preprocessing, "timm's pretrained_cfg")
    mode = "squash" if squash else "center"
    return {"interpolation": method, "crop_pct": fraction, "crop_mode": mode}


def to_hugging_face(preprocessing: str, size: Sequence[int], mean: Any, std: Any) -> dict[str, Any]:
    """Returns the contents of `preprocessor_config.json`; ValueError for what it can't state."""
    fraction, method, squash = _parts(preprocessing, "preprocessor_config.json")
    height, width = (math.floor(side / fraction) for side in size)
    both = {"height": height, "width": width}
    config = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": both if squash else {"shortest_edge": min(height, width)},
        "resample": next(number for number, name in _RESAMPLE.items() if name == method),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
    }
    if not squash or fraction != 1:
        if not squash and height != width:
            raise InputError(
                f"preprocessor_config.json can't state {preprocessing} for images of "
                f"{size[0]}x{size[1]}: expected square ones, or the preprocessing resize"
            )
        config |= {"image_processor_type": "CLIPImageProcessor", "do_center_crop": True}
        config["crop_size"] = {"height": size[0], "width": size[1]}
    return config


def _crop(fraction: float, method: str, squash: bool) -> str:
    if squash and fraction == 1:
        return f"resize('{method}')"
    return f"torchvision_crop({fraction!r}, '{method}'{', True' if squash else ''})"


def _parts(preprocessing: str, target: str) -> tuple[float, str, bool]:
    """Returns fraction, way of resizing and `squash`.

    Resizing without antialiasing, which neither library has, becomes bilinear with it.
    """
    if match := _CROP.fullmatch(preprocessing):
        return float(match["fraction"]), match["method"], match["squash"] is not None
    if match := _OURS.fullmatch(preprocessing):
        method = match["resize"] or match["method"] or "bilinear"
        method = method.removesuffix("_antialias")
        method = "bilinear" if method == "area" else method
        return float(match["fraction"] or 1), method, match["fraction"] is None
    raise InputError(
        f"{target} can't state the preprocessing {preprocessing!r}: expected resize, central_crop "
        "or torchvision_crop alone; use the format npz or orbax"
    )
