"""Reads and writes checkpoints in every supported foreign format.

A description is the JSON in our own checkpoints: {"model": fields of ModelConfig, "num_classes":
int, "image_size": [height, width]} and, if known, "class_names".
"""

import json
import os
import shutil
from pathlib import Path

from vit_jax.config import InputError
from vit_jax.models.variants import ModelConfig, described_model
from vit_jax.weights import bit, files, hugging_face, official, onnx, pytorch, timm
from vit_jax.weights.adapt import flatten, unflatten, unstack
from vit_jax.weights.describe import describe

WEIGHTS = "model.safetensors"  # in folders of timm and Hugging Face
_SIDECAR = ".json"  # suffix of the description beside a plain .npz
_FOLDERS = {"timm": timm.to_timm, "hugging_face": hugging_face.to_hugging_face}
_FILES = {"official": official.to_official, "bit": bit.to_bit, "npz": dict}
FORMATS = (*_FILES, *_FOLDERS, "onnx")


def read(path: str | os.PathLike, image_size: tuple[int, int] | None = None) -> tuple[dict, dict]:
    """Reads a checkpoint of any format except our Orbax folders.

    Args:
      path: a `.npz` file (google-research/vision_transformer, big_vision, BiT, MLP-Mixer, or ours),
        a `.safetensors` file beside its `config.json` (timm, Hugging Face) or the folder of both;
        local, `gs://` or `hf://`.
      image_size: (height, width) in pixels, if the file doesn't tell: for position embeddings of a
        grid that isn't square, and for ResNets (default 224 x 224).

    Returns:
      Parameters as a nested dict of float32 arrays with unrolled layers, and the description.

    Raises:
      ValueError: a damaged file, an unknown architecture, or missing or unknown tensors.
      FileNotFoundError: there is no such file.
    """
    path = os.fspath(path)
    if Path(path).is_dir():
        path = os.path.join(path, WEIGHTS)
    arrays = files.read_arrays(path)
    try:
        if any("." in name for name in arrays):  # PyTorch's names
            params, description = _read_pytorch(path, arrays, image_size)
        else:
            params, description = _read_npz(path, arrays, image_size)
        params, _ = pytorch.checked(params, description)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error
    return unflatten(params), description


def _read_npz(path: str, arrays: dict, image_size: tuple[int, int] | None) -> tuple[dict, dict]:
    renamed = bit.from_bit(arrays) if "resnet/group_norm/gamma" in arrays else None
    params = unstack(renamed or official.from_official(arrays))
    described = files.read_json(path.removesuffix(".npz") + _SIDECAR) or {}
    return params, described if "model" in described else describe(params, image_size)


def _read_pytorch(path: str, arrays: dict, image_size: tuple[int, int] | None) -> tuple[dict, dict]:
    folder = path if path.count("/") == 3 and path.startswith("hf://") else os.path.dirname(path)
    configs = {
        name: content
        for name in ("config.json", "preprocessor_config.json")
        if (content := files.read_json(os.path.join(folder, name))) is not None
    }
    reader = timm.from_timm if "architecture" in configs.get("config.json", {}) else None
    return (reader or hugging_face.from_hugging_face)(arrays, configs, image_size)


def write(path: str | os.PathLike, params: dict, description: dict, format: str) -> None:
    """Writes a checkpoint in one of `FORMATS`: a file, or a folder for timm and Hugging Face.

    Reading it back gives the same bits, except ONNX, which `read` doesn't support. Raises
    ValueError, and writes nothing, for models that the format can't hold.
    """
    if "://" in os.fspath(path):
        raise InputError(f"{path}: write to a local path and copy it from there")
    path, flat = Path(path), unstack(flatten(params))
    if format == "onnx":
        onnx.write_onnx(path, unflatten(flat), description)
    elif format in _FOLDERS:
        _write_folder(path, *_FOLDERS[format](flat, description))
    else:
        if format != "npz":
            _check_published(description, format)
        arrays = _FILES[format](flat)
        described = {**description, "model": {**description["model"], "scan": False}}
        path.with_suffix(_SIDECAR).write_text(json.dumps(described, indent=2) + "\n")
        # Weights last: an interrupted export has none, so it isn't mistaken for a checkpoint.
        files.write_npz(path, arrays)


def _write_folder(path: Path, arrays: dict, configs: dict[str, dict]) -> None:
    """The folder appears with all its files, or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        for name, content in configs.items():
            (partial / name).write_text(json.dumps(content, indent=2) + "\n")
        files.write_safetensors(partial / WEIGHTS, arrays, {"format": "pt"})
        partial.replace(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_published(description: dict, format: str) -> None:
    """Raises ValueError for options that tensors don't show and that aren't the published ones.

    Readers of such a file assume the published architecture.
    """
    config = described_model(description).config
    published = {"norm_epsilon": 1e-6, "parallel": False}
    published |= {"position": "learned_1d", "position_at": "stem"}
    if format == "official":
        published["mlp"] = "gelu_tanh"
    family = ModelConfig("")
    for name, expected in published.items():
        value = getattr(config, name)
        if value not in (expected, getattr(family, name)):
            raise InputError(
                f"{format} files can't store {name} = {value!r}, and their readers would assume "
                f"{expected!r}: use the format npz"
            )
