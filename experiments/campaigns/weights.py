"""Mutates files of weights of every format and family: the exact arrays, or a ValueError.

Bases are the folders in tests/golden, as timm and transformers wrote them, and our own exports.
"""

import copy
import json
import resource
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import load_file, save_file

from experiments.campaigns.files import mutate
from vit_jax.models.stacking import flatten, unflatten
from vit_jax.models.variants import ModelConfig, build_model
from vit_jax.weights.folders import INDEX, WEIGHTS
from vit_jax.weights.trained import TrainedModel, load

GOLDEN = Path(__file__).parents[2] / "tests" / "golden"
_SMALL = {"width": 16, "depth": 2, "num_heads": 2, "mlp_dim": 24}
_ROPE = {"position": "none", "mlp": "gelu"}
_OURS = {  # beside the golden files
    "vit": {},
    "mae": {"mlp": "gelu", "pool": "gap", "class_token": True, "final_norm": "pooled"},
    "deit3": {"mlp": "gelu", "layer_scale": 0.1},
    "rope": {**_ROPE, "rotary": "axial", "rotary_reference": 4},
    "mixed": {**_ROPE, "rotary": "mixed"},
    "map": {"pool": "map"},
}
_JUNK = (
    *(None, "", "x", "12", 0, 1, -1, 3, 3.5, 1e308, True, False, [], [[]], [0, 0, 0], [0.5]),
    *(["a"] * 3, [1, 2], {}, {"a": 1}, {"height": "x"}, [None], 10**30, 65535, [65535, 65535]),
)
MEMORY = 64 << 10  # KiB by which reading one file may raise the peak of memory
SECONDS = 10  # of one file


def _model(config: ModelConfig, classes: int) -> TrainedModel:
    """Returns a model with random values in every tensor; compiles nothing."""
    architecture, rng = build_model(config, classes, (16, 16)), np.random.default_rng(0)
    shapes = flatten(jax.eval_shape(lambda: architecture.init(jax.random.key(0))))
    params = {name: rng.normal(size=s.shape).astype(np.float32) for name, s in shapes.items()}
    return TrainedModel(architecture, unflatten(params))


def _ours(name: str) -> TrainedModel:
    return _model(ModelConfig("ViT-nano/4", **_SMALL, **_OURS[name]), 5)


def _golden(folder: Path, name: str) -> Path:
    """Unpacks a folder of a home library."""
    place = folder / name
    place.mkdir(parents=True)
    with np.load(GOLDEN / f"family_{name}.npz") as arrays:
        for file in arrays.files:
            if "." in file:
                (place / file).write_bytes(arrays[file].tobytes())
    return place


def _exports(folder: Path, format: str, names: Iterable[str]) -> list[Path]:
    for name in names:
        suffix = "" if format in ("timm", "hugging_face", "orbax") else ".npz"
        _ours(name).save(folder / f"{name}{suffix}", format)
    return [path for path in sorted(folder.iterdir()) if path.suffix in ("", ".npz")]


def _npz(folder: Path) -> list[Path]:
    _exports(folder, "npz", _OURS)
    _ours("vit").save(folder / "official.npz", "official")
    (folder / "official.json").unlink()  # published ones have none
    resnet = ModelConfig("R26x1", stages=(1,), stem_width=32, zero_padded_pool=True)
    _model(resnet, 3).save(folder / "bit.npz", "bit")
    return sorted(folder.glob("*.npz"))


def _timm(folder: Path) -> list[Path]:
    golden = [_golden(folder, name) for name in ("deit_distilled", "timm_dinov3")]
    return [*golden, *_exports(folder / "ours", "timm", _OURS)]


def _hugging_face(folder: Path) -> list[Path]:
    names = sorted(path.stem.removeprefix("family_") for path in GOLDEN.glob("family_*.npz"))
    ours = [n for n in names if n not in ("deit_distilled", "timm_dinov3")]
    return [
        *(_golden(folder, n) for n in ours),
        *_exports(folder / "ours", "hugging_face", ["vit"]),
    ]


def _shards(folder: Path) -> list[Path]:
    """All of the two above in two files each, and an index."""
    folders = [*_timm(folder / "timm"), *_hugging_face(folder / "hf")]
    for place in folders:
        arrays = load_file(place / WEIGHTS)
        (place / WEIGHTS).unlink()
        index = {}
        for i in range(2):
            part = dict(list(arrays.items())[i::2])
            save_file(part, place / f"model-{i + 1}.safetensors", {"format": "pt"})
            index |= dict.fromkeys(part, f"model-{i + 1}.safetensors")
        (place / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}, indent=1))
    return folders


def _orbax(folder: Path) -> list[Path]:
    return _exports(folder, "orbax", _OURS)


# Format -> how to make its bases, and which of their files are mutated.
FORMATS: dict[str, tuple[Callable[[Path], list[Path]], str]] = {
    "npz": (_npz, r"*.npz"),
    "safetensors": (lambda folder: [*_timm(folder / "a"), *_hugging_face(folder / "b")], WEIGHTS),
    "shards": (_shards, "model*"),
    "timm": (_timm, "config.json"),
    "hugging_face": (_hugging_face, "config.json"),
    "preprocessor": (_hugging_face, "preprocessor_config.json"),
    "orbax": (_orbax, "**/*"),
}


def altered(content: Any, rng: np.random.Generator) -> Any:
    """Replaces, removes or adds one to three values of a JSON object, at any depth."""
    content = copy.deepcopy(content)
    for _ in range(rng.integers(1, 4)):
        node = content
        while node:
            key = str(rng.choice(sorted(node)))
            if isinstance(node[key], dict) and node[key] and rng.random() < 0.8:
                node = node[key]
                continue
            match rng.integers(6):
                case 0:
                    del node[key]
                case 1 if isinstance(node[key], int | float):
                    node[key] *= int(rng.integers(2, 5))
                case _:
                    node[key] = copy.deepcopy(_JUNK[rng.integers(len(_JUNK))])
            break
    return content


def altered_tensors(arrays: dict[str, np.ndarray], rng: np.random.Generator) -> dict:
    """Leaves out, adds, renames or reshapes tensors, as an incomplete or foreign file has them."""
    names = sorted(arrays)
    name = str(rng.choice(names))
    array, rest = arrays[name], {n: a for n, a in arrays.items() if n != name}
    match rng.integers(8):
        case 0:
            return rest
        case 1:  # half of the blocks
            last = [n for n in names if ".1." in n or "_1/" in n]
            return {n: a for n, a in arrays.items() if n not in last} if last else rest
        case 2:
            return {**arrays, f"{name}_{rng.integers(9)}": array}
        case 3:
            return {**rest, f"x.{name}": array}
        case 4:  # as quantised
            return {**rest, name: array.view(np.int32)}
        case 5 if array.ndim:
            return {**rest, name: array[: len(array) // 2]}
        case 6 if array.ndim > 1 and len(set(array.shape)) > 1:
            return {**rest, name: np.ascontiguousarray(array.T)}
        case _:
            return {**rest, name: np.repeat(array, 2, axis=-1) if array.ndim else rest}


def _harm(path: Path, rng: np.random.Generator) -> str:
    """Mutates one file in place; returns the kind of mutation."""
    whole = path.read_bytes()
    way = rng.random()
    if path.suffix == ".json" and way < 0.7:
        path.write_text(json.dumps(altered(json.loads(whole), rng)))
        return "values"
    if path.suffix in (".safetensors", ".npz") and way < 0.4:
        if path.suffix == ".npz":
            with np.load(path) as file:
                np.savez(path, **altered_tensors(dict(file), rng))
        else:
            save_file(altered_tensors(load_file(path), rng), path)
        return "tensors"
    header = 300 + int.from_bytes(whole[:8], "little") if path.suffix == ".safetensors" else 4000
    path.write_bytes(mutate(whole, rng, header, faults=1))
    return "bytes"


def weights(
    count: int, seed: int, folder: Path, formats: Iterable[str] = FORMATS
) -> dict[str, int]:
    """Counts, for `count` mutated files of each format, which were read exactly, and refused.

    "stated otherwise": the exact numbers, with options that the mutated text states. A safetensors
    file has no checksum, so a fault among its numbers is read as it stands: "other numbers".
    """
    outcomes: Counter = Counter()
    for name in formats:
        make, pattern = FORMATS[name]
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).mkdir(parents=True)
        rng, bases = np.random.default_rng(seed), make(folder / name)
        models = [load(base) for base in bases]
        for i in range(count):
            base, model = bases[i % len(bases)], models[i % len(bases)]
            outcomes[f"{name}: {_one(base, model, pattern, rng, i)}"] += 1
    return dict(outcomes)


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB


def _one(base: Path, model: TrainedModel, pattern: str, rng: np.random.Generator, i: int) -> str:
    inside = base.glob(pattern) if base.is_dir() else (base, base.with_suffix(".json"))
    files = [path for path in sorted(inside) if path.is_file()]
    path = files[rng.integers(len(files))]
    whole = path.read_bytes()
    began, memory = time.process_time(), _peak()
    try:
        kind = _harm(path, rng)
        outcome, message = read(base, model)
        mutated = path.read_bytes()
    finally:
        path.write_bytes(whole)
    if outcome == "other numbers" and (path.suffix != ".safetensors" or kind != "bytes"):
        outcome = "WRONG: other numbers"
    if time.process_time() - began > SECONDS:
        outcome = f"WRONG: more than {SECONDS} s"
    if (grown := _peak() - memory) > MEMORY:
        outcome = f"WRONG: {grown >> 10} MiB more memory"
    if outcome.startswith("WRONG"):
        kept = base.parent / f"{i}-{path.name}"
        kept.write_bytes(mutated)
        print(
            json.dumps(
                {"base": str(base), "file": str(kept), "outcome": outcome, "message": message}
            )
        )
    return outcome


def read(path: Path, model: TrainedModel) -> tuple[str, str]:
    """Compares what is read with the model of the whole file; returns outcome and message."""
    try:
        found = load(path)
    except (ValueError, OSError) as error:
        return "refused", str(error)
    except Exception as error:  # counted as wrong
        return f"WRONG: {type(error).__name__}", str(error)
    arrays, expected = (
        {n: np.asarray(a) for n, a in flatten(m.params).items()} for m in (found, model)
    )
    if arrays.keys() != expected.keys():
        difference = sorted(arrays.keys() ^ expected.keys())
        return "WRONG: another set of tensors", ", ".join(difference[:4])
    if all(np.array_equal(arrays[n], expected[n]) for n in expected):
        same = found.description == model.description
        return ("read" if same else "stated otherwise"), ""
    sizes = {n: a.size for n, a in arrays.items()} == {n: a.size for n, a in expected.items()}
    numbers = (np.sort(np.concatenate([a.ravel() for a in m.values()])) for m in (arrays, expected))
    if sizes and np.array_equal(*numbers):
        return "stated otherwise", ""  # another number of heads, or order of rotated features
    return "other numbers", ""
