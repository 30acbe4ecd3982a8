"""Converts weights: between our checkpoints and the formats that people have.

python -m vit_jax.convert --input=R26_S_32.npz --output=checkpoints/r26s32
python -m vit_jax.convert --input=runs/digits --output=exported --format=hugging_face
python -m vit_jax.convert --input=hf://google/vit-base-patch16-224 --output=checkpoints/b16

Reads google-research/vision_transformer's, big_vision's, BiT's and MLP-Mixer's `.npz`, timm's and
Hugging Face's `.safetensors` beside their `config.json`, and our own checkpoints; local, gs://
(pip install 'vit_jax[gcs]') and hf:// (vit_jax[hub]). Writes them all, and ONNX (vit_jax[onnx]).
"""

import math
from pathlib import Path

from absl import app, flags

from vit_jax import config as configuration
from vit_jax.training.checkpoint import load_checkpoint, save_checkpoint
from vit_jax.weights import formats
from vit_jax.weights.adapt import flatten

INPUT = flags.DEFINE_string("input", None, "Checkpoint to read: a folder, a file or its URL.")
OUTPUT = flags.DEFINE_string("output", None, "Where to write; must not exist.")
FORMAT = flags.DEFINE_enum(
    "format",
    "orbax",
    ["orbax", *formats.FORMATS],
    "What to write. orbax: our own checkpoint; official: the .npz of the ViT and AugReg releases; "
    "npz: our names; timm, hugging_face: a folder; onnx: graph and weights, uint8 pixels in.",
)
IMAGE_SIZE = flags.DEFINE_list(
    "image_size", None, "HEIGHT,WIDTH of the input's model, where its file doesn't tell."
)
flags.mark_flags_as_required(["input", "output"])


def main(_) -> None:
    """Reads, checks, writes, and says what it was."""
    with configuration.explained_errors():
        if "://" in OUTPUT.value:
            raise ValueError(f"--output={OUTPUT.value}: write to a local path, copy it from there")
        output = Path(OUTPUT.value)
        if output.exists():
            raise ValueError(f"{output} exists: choose another --output, or remove it")
        if IMAGE_SIZE.value and len(IMAGE_SIZE.value) != 2:
            raise ValueError(f"--image_size={','.join(IMAGE_SIZE.value)}: expected HEIGHT,WIDTH")
        size = IMAGE_SIZE.value and tuple(map(int, IMAGE_SIZE.value))
        params, description = load_checkpoint(INPUT.value, size)
        if FORMAT.value == "orbax":
            save_checkpoint(output, params, description)
        else:
            formats.write(output, params, description, FORMAT.value)
        total = sum(math.prod(leaf.shape) for leaf in flatten(params).values())
        height, width = description["image_size"]
        print(
            f"{output}: {description['model']['variant']}, {height}x{width} pixels, "
            f"{description['num_classes']} classes, {total:,} parameters, as {FORMAT.value}"
        )


if __name__ == "__main__":
    app.run(main, flags_parser=configuration.parse_flags)
