"""Converts weights between our checkpoints and other formats.

vit_jax convert --input=R26_S_32.npz --output=checkpoints/r26s32
vit_jax convert --input=runs/digits --output=exported --format=hugging_face
vit_jax convert --input=hf://google/vit-base-patch16-224 --output=checkpoints/b16

Reads `.npz` of google-research/vision_transformer, big_vision, BiT and MLP-Mixer, `.safetensors` of
timm and Hugging Face with their `config.json`, and our own checkpoints, from local paths, https://,
gs:// and hf://. Writes the formats of --format; ONNX needs jax2onnx, onnx and onnxruntime.
"""

from absl import flags

from vit_jax.command_line import numbers, run
from vit_jax.config import InputError
from vit_jax.weights.formats import check_output
from vit_jax.weights.trained import FORMATS, load

INPUT = flags.DEFINE_string("input", None, "Checkpoint to read: a folder, a file or its URL.")
OUTPUT = flags.DEFINE_string("output", None, "Where to write; must not exist.")
FORMAT = flags.DEFINE_enum(
    "format",
    "orbax",
    FORMATS,
    "Format to write. orbax: our checkpoint; official: .npz as in the ViT and AugReg releases; "
    "npz: our names; timm, hugging_face: a folder; onnx: graph and weights, input uint8 pixels.",
)
IMAGE_SIZE = flags.DEFINE_list(
    "image_size", None, "HEIGHT,WIDTH of the model's images; by default those of the input file."
)
VARIANT = flags.DEFINE_string(
    "variant", None, "Architecture of safetensors without a config.json: ViT-B/16, or timm's name."
)


def main(_) -> None:
    """Reads, checks and writes a model, and prints a summary."""
    if IMAGE_SIZE.value and len(IMAGE_SIZE.value) != 2:
        raise InputError(f"--image_size={','.join(IMAGE_SIZE.value)}: expected HEIGHT,WIDTH")
    check_output(OUTPUT.value)
    size = numbers("image_size", IMAGE_SIZE.value, int)
    model = load(INPUT.value, size, VARIANT.value)
    model.save(OUTPUT.value, FORMAT.value)
    for note in model.notes:
        print(f"{INPUT.value}: {note}")
    height, width = model.image_size
    print(
        f"{OUTPUT.value}: {model.config.variant}, {height}x{width} pixels, "
        f"{model.num_classes} classes, {model.num_parameters:,} parameters, as {FORMAT.value}"
    )


if __name__ == "__main__":
    run(main, "input", "output")
