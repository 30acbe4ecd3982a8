"""Compares every Vision Transformer of timm with ours, with random weights and two blocks.

    pip install torch timm
    python experiments/benchmarks/timm_table.py [PATTERN] > vit_jax/weights/TIMM.md

Each architecture is made small in depth and image alone, saved as `timm.models.save_for_hf` does,
read, run, written, and read by timm again. Differences are of the logits, or of the features where
there is no head, relative to the largest value. Deviations of weights let values grow to order 1.
"""

import re
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import timm
import torch
from timm.models import save_for_hf

from vit_jax.command_line import explained_errors
from vit_jax.config import InputError
from vit_jax.weights.trained import load

NAMES = r"(vit_|deit|flexivit|eva).*"
TOLERANCE = 2e-5


def scrambled(name: str) -> torch.nn.Module:
    """Returns a model of two blocks and a small image with random weights."""
    patch = int((re.search(r"patch(\d+)", name) or [0, 16])[1])
    side = 64 if re.search(r"_r(26|50)_|resnet|mci", name) else 4 * patch
    model = timm.create_model(name, depth=2, img_size=side, num_classes=7)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if not tensor.is_floating_point():
                continue
            spread = 0.2
            if tensor.ndim in (2, 4):
                spread = 0.3 if "conv" in key else tensor[0].numel() ** -0.5
            scale = tensor.ndim == 1 and key.endswith("weight")
            tensor.copy_(spread * torch.randn(tensor.shape, generator=generator) + float(scale))
    return model.eval()


def theirs(model: torch.nn.Module, images: np.ndarray) -> np.ndarray:
    """Runs a timm model on images [B, H, W, 3] in [0, 255], standardised as its config says."""
    cfg = model.pretrained_cfg
    pixels = torch.from_numpy(images.transpose(0, 3, 1, 2)).float() / 255
    mean, std = (torch.tensor(cfg[key])[:, None, None] for key in ("mean", "std"))
    with torch.no_grad():
        return model((pixels - mean) / std).numpy()


def ours(folder: Path, images: np.ndarray) -> tuple:
    """Returns our model in float32 for images of their size, and its logits."""
    import dataclasses

    from vit_jax.models.variants import build_model

    model = load(folder, images.shape[1:3])
    config = dataclasses.replace(model.config, dtype="float32")
    model = dataclasses.replace(
        model, architecture=build_model(config, model.num_classes, model.image_size)
    )
    return model, model.logits(images)


def row(name: str) -> str:
    """Compares one architecture, and returns its row of the table."""
    try:
        model = scrambled(name)
    except (TypeError, AssertionError, RuntimeError) as error:
        return f"| {name} | no | | | timm can't build it smaller: {str(error)[:60]} |"
    side = model.patch_embed.img_size
    images = np.random.default_rng(1).integers(0, 256, (2, *side, 3), np.uint8)
    with tempfile.TemporaryDirectory() as place:
        first, second = Path(place, "first"), Path(place, "second")
        save_for_hf(model, first, safe_serialization=True)
        try:
            model_of_ours, found = ours(first, images)
        except InputError as error:
            reason = str(error).splitlines()[0].partition("first/model.safetensors: ")[2]
            reason = re.sub(r": did you mean.*|Known: .*", "", reason)
            return f"| {name} | no | | | {reason[:110]} |"
        expected = theirs(model, images)
        read = np.abs(found - expected).max() / max(1, np.abs(expected).max())
        try:
            model_of_ours.save(second, format="timm")
        except InputError as error:
            return f"| {name} | yes | {read:.1e} | | not written: {str(error)[:90]} |"
        again = timm.create_model(f"local-dir:{second}", pretrained=True).eval()
        written = np.abs(theirs(again, images) - expected).max() / max(1, np.abs(expected).max())
        unit = side[0] // model.patch_embed.grid_size[0]
        others = np.random.default_rng(2).integers(0, 256, (2, 5 * unit, 3 * unit, 3), np.uint8)
        model.set_input_size(img_size=others.shape[1:3])
        expected = theirs(model, others)
        resized = np.abs(ours(first, others)[1] - expected).max() / max(1, np.abs(expected).max())
    note = "" if max(read, written, resized) < TOLERANCE else "DIFFERS"
    if note and re.search(r"_r(26|50)_", name):  # see `timm_export.to_timm`
        note = "timm standardises a hybrid's kernels with another epsilon"
    return f"| {name} | read and written | {max(read, written):.1e} | {resized:.1e} | {note} |"


def main(arguments: list[str]) -> None:
    """Prints the table as Markdown."""
    warnings.filterwarnings("ignore")
    pattern = re.compile(arguments[1] if len(arguments) > 1 else NAMES)
    names = [name for name in timm.list_models() if pattern.fullmatch(name)]
    print(f"# Vision Transformers of timm {timm.__version__}\n")
    print("Made by `experiments/benchmarks/timm_table.py`: see there what is compared.\n")
    print("| architecture | | largest difference | at another image size | why not |")
    print("|---|---|---|---|---|")
    for name in names:
        print(row(name), flush=True)


if __name__ == "__main__":
    with explained_errors():
        main(sys.argv)
