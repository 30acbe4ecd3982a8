"""Reads and writes checkpoints in every supported foreign format.

A description is the JSON in our own checkpoints: {"model": fields of ModelConfig, "num_classes":
int, "image_size": [height, width]} and, if known, "class_names".
"""

import contextlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from absl import logging

from vit_jax.config import InputError
from vit_jax.models.variants import ModelConfig, build_model, described_model
from vit_jax.parallel.run_files import as_path, written_locally
from vit_jax.weights import (
    bit,
    files,
    folders,
    hub,
    hugging_face,
    official,
    onnx,
    published,
    pytorch,
    timm,
)
from vit_jax.weights.adapt import flatten, unflatten, unstack, with_image_size
from vit_jax.weights.describe import describe
from vit_jax.weights.published import BUCKET
from vit_jax.weights.timm_architectures import architecture

WEIGHTS = folders.WEIGHTS
_SIDECAR = ".json"  # suffix of the description beside a plain .npz
_FOLDERS = {"timm": timm.to_timm, "hugging_face": hugging_face.to_hugging_face}
_FILES = {"official": official.to_official, "bit": bit.to_bit, "npz": dict}
FORMATS = (*_FILES, *_FOLDERS, "onnx")


# Scalars and texts about training that some files hold beside the weights.
_NOT_WEIGHTS = re.compile(r"config|step|epoch|global_step|iteration|metadata|version")


def is_foreign(path: str) -> bool:
    """Whether an address is for `read`, and not of one of our Orbax folders."""
    if _is_file_elsewhere(path):
        return True
    return as_path(path).is_file() or folders.holds_weights(as_path(path))


def _is_file_elsewhere(path: str) -> bool:
    """Whether an address is downloaded: its site isn't asked what is there."""
    named = path.endswith((".npz", ".safetensors"))
    return path.startswith(("hf://", "https://")) or ("://" in path and named)


def read(
    path: str | os.PathLike,
    image_size: tuple[int, int] | None = None,
    variant: str | None = None,
) -> tuple[dict, dict]:
    """Reads a checkpoint of any format except our Orbax folders.

    Args:
      path: a `.npz` file (google-research/vision_transformer, big_vision, BiT, MLP-Mixer, or ours),
        a `.safetensors` file beside its `config.json` (timm, Hugging Face) or the folder of both;
        local, `gs://`, `hf://` or `https://`.
      image_size: (height, width) in pixels; by default the file's. Learned positions are resized as
        the file's library does, except those of a .npz that have as many patches: there it tells
        the grid, if it isn't square. ResNets have any size (default 224 x 224).
      variant: the architecture, for safetensors without a config.json: our name or timm's.

    Returns:
      Parameters as a nested dict of float32 arrays with unrolled layers, and the description; its
      "notes" say what was passed over or assumed.

    Raises:
      ValueError: a damaged file, an unknown architecture, or missing or unknown tensors.
      FileNotFoundError: there is no such file.
    """
    address = path = os.fspath(path)
    if not _is_file_elsewhere(path) and as_path(path).is_dir():
        if not folders.holds_weights(as_path(path)):
            raise FileNotFoundError(folders.explain(path))
        path = os.path.join(path, WEIGHTS)
    arrays = folders.read_arrays(path)
    try:
        if any("." in name for name in arrays):  # PyTorch's names
            params, description = _read_pytorch(path, arrays, image_size, variant)
        else:
            if variant is not None:
                raise InputError(f"variant = {variant!r}: its tensors say what the model is")
            params, description = _read_npz(path, arrays, image_size)
        if image_size is not None:
            params, description = with_image_size(params, description, image_size)
        params, _ = pytorch.checked(params, description)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error
    notes = list(description.get("notes", ()))
    if text := published.licence(address):
        notes.append(f"{hub.LICENCE}{text}")
    elif address.startswith("hf://"):
        page = "/".join(address.partition("@")[0].split("/")[2:4])
        notes.append(f"https://huggingface.co/{page} says its licence")
    description = {**description, "notes": notes} if notes else description
    for note in notes:
        logging.info("%s: %s", path, note)
    return unflatten(params), description


def _read_npz(path: str, arrays: dict, image_size: tuple[int, int] | None) -> tuple[dict, dict]:
    extra = [n for n in arrays if _NOT_WEIGHTS.fullmatch(n.rpartition("/")[2])]
    arrays = {name: array for name, array in arrays.items() if name not in extra}
    if not arrays:
        raise InputError(f"no weights: only {', '.join(extra)}")
    renamed = bit.from_bit(arrays) if "resnet/group_norm/gamma" in arrays else None
    params = unstack(renamed or official.from_official(arrays))
    ours = not path.startswith(BUCKET)  # a description is beside none of the published files
    described = (ours and files.read_json(path.removesuffix(".npz") + _SIDECAR)) or {}
    if "model" not in described:
        described = _described(params, image_size)
        if described["model"].get("position") == "sincos_2d" and "cls" in params:
            raise InputError(
                "no position embeddings: fixed ones (sincos_2d) are known without a class token "
                "alone; for this model put the .json of its export beside the file"
            )
    notes = {"notes": [f"passed over {', '.join(extra)}"]} if extra else {}
    return params, {**described, **notes}


def _described(params: dict, image_size: tuple[int, int] | None) -> dict[str, Any]:
    """Describes weights of images of a size, or of a square grid of patches if that doesn't fit."""
    try:
        return describe(params, image_size)
    except InputError:
        if image_size is not None:
            with contextlib.suppress(InputError):  # the grid isn't square: the size doesn't fit
                return describe(params)
        raise


def _read_pytorch(
    path: str, arrays: dict, image_size: tuple[int, int] | None, variant: str | None
) -> tuple[dict, dict]:
    folder = path if path.count("/") == 3 and path.startswith("hf://") else os.path.dirname(path)
    configs = {}
    for name in ("config.json", "preprocessor_config.json"):
        of_timm = "architecture" in configs.get("config.json", {})  # which has no second file
        if not of_timm and (content := files.read_json(os.path.join(folder, name))) is not None:
            configs[name] = content
    arrays, prefix = folders.without_wrappers(arrays)
    notes = [f"took {prefix!r} off the names of all tensors"] if prefix else []
    if "config.json" not in configs:
        configs["config.json"] = _assumed_config(arrays, image_size, variant)
        notes.append(f"no config.json: built {variant}")
    elif variant is not None:
        raise InputError(f"variant = {variant!r}: config.json says what the model is, leave it out")
    of_timm = "architecture" in configs["config.json"]
    reader = timm.from_timm if of_timm else hugging_face.from_hugging_face
    params, description = reader(arrays, configs, image_size)
    stated = {"mean", "image_mean"} & {
        *configs["config.json"],
        *(configs["config.json"].get("pretrained_cfg") or {}),
        *configs.get("preprocessor_config.json", {}),
    }
    if not stated:
        mean = described_model(description).config.mean
        spec = description.get("preprocess", "resize")
        notes.append(f"no preprocessing is stated: assumed {spec} and pixels of mean {mean}")
    notes += description.get("notes", [])
    return params, {**description, **({"notes": notes} if notes else {})}


def _assumed_config(
    arrays: dict, image_size: tuple[int, int] | None, variant: str | None
) -> dict[str, Any]:
    """Returns the config.json of a named architecture; ValueError if it isn't named."""
    if variant is None or image_size is None:
        raise InputError(
            "no config.json beside the weights, which says what model they are of: give the "
            "architecture, --variant=ViT-B/16 or timm's name for it, and --image_size=HEIGHT,WIDTH"
        )
    of_timm = any(name.startswith("blocks.") for name in arrays)
    if architecture(variant) is not None:
        return {"architecture": variant, "input_size": [3, *image_size]}
    config = build_model(ModelConfig(variant), 0, image_size).config
    if config.stages is not None or not variant.startswith("ViT-"):
        raise InputError(f"variant = {variant!r} without a config.json: expected a ViT")
    patch = int(variant.rpartition("/")[2])
    if not of_timm:
        sizes = {"hidden_size": config.width, "num_hidden_layers": config.depth}
        heads = {"num_attention_heads": config.num_heads, "intermediate_size": config.mlp_dim}
        return {**sizes, **heads, "image_size": list(image_size), "patch_size": patch}
    sizes = {"embed_dim": config.width, "depth": config.depth, "num_heads": config.num_heads}
    ratio = config.mlp_dim / config.width
    arguments = {**sizes, "mlp_ratio": ratio, "patch_size": patch, "img_size": list(image_size)}
    return {"architecture": "vit_base_patch16_224", "model_args": arguments}


def check_output(path: str | os.PathLike) -> None:
    """Raises ValueError if `path` exists."""
    if as_path(path).exists():
        raise InputError(f"{path} exists: choose another path, or remove it")


def write(path: str | os.PathLike, params: dict, description: dict, format: str) -> None:
    """Writes a checkpoint in one of `FORMATS`: a file, or a folder for timm and Hugging Face.

    Reading it back gives the same bits, except ONNX, which `read` doesn't support. Raises
    ValueError, and writes nothing, for models that the format can't hold.
    """
    flat = unstack(flatten(params))
    with written_locally(as_path(path)) as local:
        _write(local, flat, description, format)


def _write(path: Path, flat: dict, description: dict, format: str) -> None:
    if format == "onnx":
        onnx.write_onnx(path, unflatten(flat), description)
    elif format in _FOLDERS:
        arrays, configs = _FOLDERS[format](flat, description)
        _write_folder(path, arrays, configs, hub.model_card(description, format))
    else:
        if format != "npz":
            _check_published(description, format)
        arrays = _FILES[format](flat)
        described = {**description, "model": {**description["model"], "scan": False}}
        path.with_suffix(_SIDECAR).write_text(json.dumps(described, indent=2) + "\n")
        # Weights last: an interrupted export has none, so it isn't mistaken for a checkpoint.
        files.write_npz(path, arrays)


def _write_folder(path: Path, arrays: dict, configs: dict[str, dict], card: str) -> None:
    """The folder appears with all its files, or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        for name, content in configs.items():
            (partial / name).write_text(json.dumps(content, indent=2) + "\n")
        (partial / hub.CARD).write_text(card)
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
