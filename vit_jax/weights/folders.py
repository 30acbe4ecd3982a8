"""Finds the weights in a folder as other libraries save it, and says what else is there.

Also takes off the prefixes that wrappers put before every tensor's name.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from vit_jax.config import InputError
from vit_jax.parallel.run_files import as_path
from vit_jax.weights import files

WEIGHTS = "model.safetensors"  # in folders of timm and Hugging Face
INDEX = "model.safetensors.index.json"  # of weights in several files
# First parts of names that transformers' models and layers have themselves.
_OWN = re.compile(
    r"(?:vit|deit|dinov2(?:_with_registers)?|ijepa|vision_model)\.(?:embeddings|encoder)\."
    r"|(?:blocks|layers?)\.\d+\."
)
# Name of a file or folder -> what it is, and what would do.
_OTHERS = (
    (r"adapter_(model|config)\..*", "a LoRA adapter: merge it into its base model and save that"),
    (r"saved_model\.pb", "a TensorFlow SavedModel: export its arrays with numpy.savez"),
    (r".*\.(keras|h5)", "Keras weights: export their arrays with numpy.savez"),
    (r".*\.msgpack", "Flax weights: save them as safetensors, or with numpy.savez"),
    (
        r"checkpoint|.*\.index|.*\.data-\d+-of-\d+",
        "a TensorFlow checkpoint: export its arrays with numpy.savez",
    ),
    (
        r".*\.(onnx|tflite|gguf|pt2|pte|engine|mlpackage)",
        "a network compiled or quantised for inference: take the weights that it was made from",
    ),
    (
        r".*\.(bin|pth?|ckpt|pkl|pickle)|pytorch_model\.bin\.index\.json",
        "a pickle of PyTorch, which can run code and is never read: save model.safetensors",
    ),
    (
        r"_METADATA|_CHECKPOINT_METADATA|manifest\.ocdbt|_sharding",
        "an Orbax checkpoint of another program: save its parameters with numpy.savez",
    ),
)
LOCAL_NAME = re.compile(r"(?:huggingface\.co/)?([\w.-]+/[\w.-]+(?:@[\w.-]+)?)")


def holds_weights(folder: Path) -> bool:
    """Whether a folder holds safetensors under a usual name, in one or in several files."""
    return (folder / WEIGHTS).is_file() or (folder / INDEX).is_file()


def explain(path: str | os.PathLike) -> str:
    """Says what is at a path where a model was expected, and what would do."""
    folder, text = as_path(path), os.fspath(path)
    expected = (
        "expected a run's workdir (it holds `checkpoints/`), one checkpoint's folder (`params/`), "
        f"an exported one ({WEIGHTS}) or a .npz file"
    )
    if not folder.exists():
        name = None if text.startswith(".") else LOCAL_NAME.fullmatch(text)
        hint = f"; for the repository on the hub give hf:{name[1]}" if name else ""
        return f"no checkpoint at {text}: there is nothing; {expected}{hint}"
    names = sorted(child.name for child in folder.iterdir()) if folder.is_dir() else [folder.name]
    for pattern, what in _OTHERS:
        if found := [name for name in names if re.fullmatch(pattern, name)]:
            return f"no checkpoint at {text}: {found[0]} is {what}; {expected}"
    tensors = [name for name in names if name.endswith((".safetensors", ".npz"))]
    if tensors:
        return f"no checkpoint at {text}: it holds {', '.join(tensors[:4])}: give the file's path"
    shown = ", ".join(names[:6]) or "nothing"
    return f"no checkpoint at {text}: it holds {shown}; {expected}"


def read_arrays(path: str) -> dict[str, np.ndarray]:
    """Reads a file, or all files that the index beside it names.

    Raises ValueError unless the index and the files hold the same tensors.
    """
    folder, name = _parts(path)
    if name != INDEX:
        try:
            return files.read_arrays(path)
        except FileNotFoundError:
            index = files.read_json(os.path.join(folder, INDEX)) if name == WEIGHTS else None
            if index is None:
                raise
    elif (index := files.read_json(path)) is None:
        raise FileNotFoundError(f"{path}: no such file")
    weight_map = index.get("weight_map")
    where = os.path.join(folder, INDEX)
    if not isinstance(weight_map, Mapping) or not weight_map:
        raise InputError(f"{where}: expected a weight_map of tensors to files")
    shards = sorted({str(file) for file in weight_map.values()})
    if wrong := [file for file in shards if not re.fullmatch(r"[\w.-]+\.safetensors", file)]:
        raise InputError(f"{where}: {wrong[0]!r} is no name of a .safetensors file beside it")
    arrays: dict[str, np.ndarray] = {}
    for shard in shards:
        try:
            found = files.read_arrays(os.path.join(folder, shard))
        except FileNotFoundError as error:
            raise InputError(f"{where} names {shard}, which is not there: fetch it too") from error
        stated = {tensor for tensor, file in weight_map.items() if file == shard}
        if different := sorted(stated ^ found.keys()):
            raise InputError(
                f"{where} and {shard} disagree on {', '.join(different[:3])}: fetch both again"
            )
        arrays |= found
    return arrays


def _parts(path: str) -> tuple[str, str]:
    """Returns the folder of a path, and the file's name: the usual one for hf://owner/name."""
    if path.startswith("hf://") and path.count("/") == 3:
        return path, WEIGHTS
    return os.path.dirname(path), os.path.basename(path)


def without_wrappers(arrays: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], str]:
    """Takes off the prefixes of wrappers that all names have; returns them too.

    `module.` of DataParallel, `_orig_mod.` of torch.compile, `model.`, `backbone.`, ...
    """
    taken = ""
    while True:
        prefix, dot, _ = next(iter(arrays)).partition(".")
        shared = all(name.startswith(prefix + dot) for name in arrays)
        if not dot or not shared or any(_OWN.match(name) for name in arrays):
            return arrays, taken
        arrays = {name.removeprefix(prefix + dot): array for name, array in arrays.items()}
        taken += prefix + dot
