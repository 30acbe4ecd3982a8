"""Exports models to ONNX, for runtimes without JAX.

jax2onnx translates, onnx checks, and onnxruntime must reproduce our outputs. Export only.
"""

import contextlib
import io
import json
import logging
import os
from pathlib import Path
from tempfile import TemporaryDirectory

import jax
import numpy as np

from vit_jax.config import InputError
from vit_jax.models.variants import Model, described_model
from vit_jax.weights import files

TOLERANCE = 1e-4  # of onnxruntime's outputs, relative to max(1, largest value)
LARGEST = 2**31 - 2**20  # bytes of parameters in one file: protobuf's limit minus the graph
PIXELS = "RGB pixels, 0 to 255, resized and not normalised: the graph maps them to [-1, 1]"


def write_onnx(path: str | os.PathLike, params: dict, description: dict) -> None:
    """Writes a model to `path`; weights of 2 GiB and more go to `path`.data.

    The input `images` is uint8 RGB [B, H, W, 3], B free; the graph normalises it. The outputs are
    float32: `logits` [B, classes] (absent without classes) and `features` [B, D]. Computes in
    float32. The metadata entry `description` holds the description as JSON.

    Args:
      path: a local path; an existing file is replaced after all checks.
      params: nested dict of arrays, with unrolled layers.
      description: as in `formats.py`.

    Raises:
      ValueError: jax2onnx isn't installed or can't translate the model, or onnxruntime's outputs
        differ from ours. Nothing is written.
    """
    fields = {"dtype": "float32", "scan": False, "remat": "none"}
    model = described_model({**description, "model": {**description["model"], **fields}})
    # onnxruntime reads it when it is imported, and else keeps a device's identifier in ~/.cache.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import jax2onnx
        import onnx
    except ImportError as error:
        raise InputError(
            f"{path}: ONNX needs a package that is not installed ({error}): "
            "pip install jax2onnx onnx onnxruntime"
        ) from error
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), params)
    names = ("logits", "features") if model.num_classes else ("features",)

    def run(images):
        output = model.apply(params, images)
        return [getattr(output, name) for name in names]

    for chatty in ("jax2onnx", "onnx_ir"):  # they warn about plugins of unused packages
        logging.getLogger(chatty).setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints debugging output
        proto = jax2onnx.to_onnx(
            run,
            [jax.ShapeDtypeStruct(("B", *model.image_size, 3), np.uint8)],
            model_name=model.config.variant,
            input_names=["images"],
            output_names=names,
        )
    proto.graph.input[0].doc_string = PIXELS
    onnx.helper.set_model_props(proto, {"description": json.dumps(description)})

    large = sum(leaf.nbytes for leaf in jax.tree.leaves(params)) > LARGEST
    location = f"{Path(path).name}.data" if large else None
    with files.atomic(path, ".onnx") as partial, TemporaryDirectory(dir=partial.parent) as folder:
        written = Path(folder) / partial.name
        onnx.save(proto, written, save_as_external_data=large, location=location)
        del proto  # frees memory: it is as large as the model
        onnx.checker.check_model(written, full_check=True)
        _compare(written, model, params, names)
        if large:
            data = written.with_name(location)
            data.chmod(written.stat().st_mode)  # onnx makes it readable by its owner only
            data.replace(partial.with_name(location))
        written.replace(partial)


def _compare(path: Path, model: Model, params: dict, names: tuple[str, ...]) -> None:
    """Raises ValueError unless onnxruntime's outputs match ours on two noise images."""
    import onnxruntime  # jax2onnx needs it

    images = np.random.default_rng(0).integers(0, 256, (2, *model.image_size, 3), np.uint8)
    with jax.default_matmul_precision("float32"):
        expected = jax.jit(model.apply)(params, images)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for name, found in zip(names, session.run(names, {"images": images}), strict=True):
        ours = np.asarray(getattr(expected, name))
        difference = np.abs(found - ours).max() / max(1.0, np.abs(ours).max())
        if not difference <= TOLERANCE:  # also False for NaN
            raise InputError(
                f"{model.config.variant} can't be written as ONNX: the {name} that onnxruntime "
                f"computes differ from ours by {difference:.1e}, more than {TOLERANCE:.0e}: "
                "jax2onnx translated it wrongly; use another format, npz"
            )
