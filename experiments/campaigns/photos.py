"""Photographs at odd sizes: pixels and first labels beside those of timm and transformers.

Needs torch, timm, transformers and scikit-image, whose photographs and scikit-learn's it takes:

    pip install torch timm transformers scikit-image
"""

import dataclasses
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from vit_jax.models.variants import build_model
from vit_jax.weights.trained import load

SIDE, WIDTH, PHOTOGRAPHS = 48, 320, 15
SIZE = {"height": SIDE, "width": SIDE}
OPENAI = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
TIMM = [
    {"crop_pct": 0.875, "interpolation": "bicubic"},
    {"crop_pct": 0.9, "interpolation": "bicubic", "mean": [0.5] * 3, "std": [0.5] * 3},
    {"crop_pct": 1.0, "interpolation": "bilinear"},
    {"crop_pct": 0.95, "interpolation": "lanczos"},
    {"crop_pct": 0.9, "interpolation": "bicubic", "crop_mode": "squash"},
    {"crop_pct": 1.0, "interpolation": "bicubic", "crop_mode": "squash"},
]
TRANSFORMERS = [
    ("ViTImageProcessor", {"size": SIZE}),
    ("SiglipImageProcessor", {"size": SIZE}),
    ("DINOv3ViTImageProcessor", {"size": SIZE}),
    ("DeiTImageProcessor", {"size": {"height": 55, "width": 55}, "crop_size": SIZE}),
    ("CLIPImageProcessor", {"size": SIDE, "crop_size": SIDE, **OPENAI}),
    ("CLIPImageProcessorPil", {"size": {"shortest_edge": SIDE}, "crop_size": SIZE, **OPENAI}),
    ("BitImageProcessor", {"size": {"shortest_edge": 55}, "crop_size": SIZE}),
    ("BitImageProcessorPil", {"size": {"shortest_edge": 55}, "crop_size": SIZE}),
]


def photographs(count: int, rng: np.random.Generator) -> Iterator[bytes]:
    """Yields files of parts of photographs at random sizes, in several formats and modes."""
    from skimage import data
    from sklearn.datasets import load_sample_images

    names = ("astronaut", "coffee", "chelsea", "rocket", "retina", "hubble_deep_field", "camera")
    names += ("coins", "moon", "brick", "grass", "gravel", "immunohistochemistry")
    whole = [Image.fromarray(getattr(data, name)()) for name in names]
    whole += [Image.fromarray(image) for image in load_sample_images().images]
    for i in range(count):
        image = whole[i % len(whole)].convert("RGB")
        height, width = (int(rng.integers(60, side + 1)) for side in image.size[::-1])
        left, top = (
            int(rng.integers(image.width - width + 1)),
            int(rng.integers(image.height - height + 1)),
        )
        image = image.crop((left, top, left + width, top + height))
        size = tuple(int(rng.integers(24, 420)) | 1 for _ in range(2))
        image, file = image.resize(size, Image.Resampling.BICUBIC), io.BytesIO()
        exif = Image.Exif()
        exif[0x0112] = 6  # a turn that neither library applies
        kinds = [
            (image, "JPEG", {"quality": 90}),
            (image, "PNG", {}),
            (image.convert("L"), "PNG", {}),
            (image, "JPEG", {"progressive": True, "exif": exif}),
            (image.convert("RGBA"), "PNG", {}),  # opaque
            (image.convert("CMYK"), "JPEG", {}),
            (image.convert("L"), "JPEG", {"quality": 80}),
            (image.quantize(128), "PNG", {}),
            (image, "WEBP", {}),
            (image.convert("LA"), "PNG", {}),
        ]
        picture, name, options = kinds[i // len(whole) % len(kinds)]
        picture.save(file, name, **options)
        yield file.getvalue()


def _timm(fields: dict) -> tuple:
    """Returns a small ViT of timm: how it prepares an image, network, head, how it is saved."""
    import timm
    from timm.models import save_for_hf

    arguments = {"img_size": SIDE, "patch_size": 8, "embed_dim": WIDTH, "depth": 1, "num_heads": 4}
    model = _scrambled(timm.create_model("vit_tiny_patch16_224", num_classes=WIDTH, **arguments))
    imagenet = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    config = {**imagenet, **fields, "input_size": [3, SIDE, SIDE], "num_classes": WIDTH}
    model.pretrained_cfg = {**model.pretrained_cfg, **config}
    prepare = timm.data.create_transform(**timm.data.resolve_data_config(model=model))

    def save(folder):
        save_for_hf(model, folder, model_args=arguments, safe_serialization=True)

    return prepare, model, model.head, save


def _transformers(name: str, fields: dict) -> tuple:
    """As `_timm`."""
    import transformers

    sizes = {
        "hidden_size": WIDTH,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "patch_size": 8,
    }
    config = transformers.ViTConfig(
        **sizes, image_size=SIDE, intermediate_size=128, num_labels=WIDTH
    )
    model = _scrambled(transformers.ViTForImageClassification(config))
    processor = getattr(transformers, name)(**fields)

    def save(folder):
        model.save_pretrained(folder)
        processor.save_pretrained(folder)

    return (
        lambda image: processor(image, return_tensors="pt")["pixel_values"][0],
        lambda pixels: model(pixels).logits,
        model.classifier,
        save,
    )


def _scrambled(model):
    """Random weights that depend on the picture more than on positions."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            spread = 0.02 if "pos" in name else 0.2
            if tensor.ndim in (2, 4):
                spread = 2 * tensor[0].numel() ** -0.5
            scale = float(tensor.ndim == 1 and name.endswith("weight"))
            tensor.copy_(spread * torch.randn(tensor.shape, generator=generator) + scale)
    return model.eval()


def _fit(head, network: Callable, pixels, classes: np.ndarray) -> None:
    """Fits the head to tell the photographs apart, by least squares; its width is the features'."""
    import torch

    with torch.no_grad():
        head.weight.copy_(torch.eye(WIDTH))
        head.bias.zero_()
        features = network(pixels).numpy().astype(np.float64)
        features = np.concatenate([features, np.ones((len(features), 1))], axis=1)
        targets = np.eye(WIDTH)[classes]
        gram = features.T @ features + 1e-3 * len(features) * np.eye(WIDTH + 1)
        fitted = torch.from_numpy(10 * np.linalg.solve(gram, features.T @ targets).T)
        head.weight.copy_(fitted[:, :-1])
        head.bias.copy_(fitted[:, -1])


def _compare(made: tuple, folder: Path, files: list[bytes]) -> dict:
    """Returns the share of equal labels and the differences of pixels, in grey levels."""
    import torch

    prepare, network, head, save = made
    theirs = torch.stack([prepare(Image.open(io.BytesIO(f)).convert("RGB")) for f in files])
    classes = np.arange(len(files)) % PHOTOGRAPHS
    _fit(head, network, theirs, classes)
    save(folder)
    with torch.no_grad():
        labels = network(theirs).argmax(-1).numpy()

    model = load(folder)
    config = dataclasses.replace(model.config, dtype="float32")
    exact = build_model(config, model.num_classes, model.image_size)
    model = dataclasses.replace(model, architecture=exact)
    ours = np.stack([model.preprocess(file) for file in files])
    mean, std = (np.float32(v)[:, None, None] for v in (config.mean, config.std))
    differences = np.abs((theirs.numpy() * std + mean) * 255 - ours.transpose(0, 3, 1, 2))
    largest = differences.max(axis=(1, 2, 3))
    return {
        "first label equal": float((model.logits(ours).argmax(-1) == labels).mean()),
        "right": round(float((labels == classes).mean()), 3),
        "largest difference of a pixel": round(float(largest.max()), 2),
        "pixels over one level": float(f"{(differences > 1.01).mean():.1e}"),
        "photographs with such": int((largest > 1.01).sum()),
    }


def campaign(count: int, seed: int, folder: Path) -> dict[str, int]:
    """Counts preprocessings whose first labels agree on 99.5% and whose pixels differ by a level.

    torchvision's bicubic, which transformers uses by default, differs from Pillow's, which timm and
    transformers' `...Pil` classes use, by more than a level at some edges: of its pixels 1 in 1,000
    may.
    """
    outcomes, files = Counter(), list(photographs(count, np.random.default_rng(seed)))
    cases = [("timm", fields) for fields in TIMM] + TRANSFORMERS
    for number, (name, fields) in enumerate(cases):
        place = folder / str(number)
        place.mkdir(parents=True, exist_ok=True)
        made = _timm(fields) if name == "timm" else _transformers(name, fields)
        found = _compare(made, place, files)
        print(json.dumps({"library": name, **fields, **found}))
        most = 1e-3 if name.endswith("ImageProcessor") else 0
        good = found["first label equal"] >= 0.995 and found["pixels over one level"] <= most
        outcomes["as the home library" if good else f"WRONG: {name} {fields}"] += 1
    return dict(outcomes)
