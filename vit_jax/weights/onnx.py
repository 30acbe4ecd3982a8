"""ONNX: a model and its parameters in one file, for runtimes that know neither JAX nor us.

Written, never read. Translated by jax2onnx, checked by onnx, and compared in onnxruntime.
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

from vit_jax.models.variants import Model, described_model
from vit_jax.weights import files

TOLERANCE = 1e-4  # of onnxruntime's outputs, relative to the largest value where that is over 1
LARGEST = 2**31 - 2**20  # bytes of parameters in one file: protobuf's limit, with room for a graph
PIXELS = "RGB pixels, 0 to 255, resized and not normalised: the graph takes them to [-1, 1]"


def write_onnx(path: str | os.PathLike, params: dict, description: dict) -> None:
    """Writes the model of a description as `path`; from 2 GiB on the weights are in `path`.data.

    Its input is `images` [B, H, W, 3], uint8 RGB as decoders and resizers give them: normalising is
    part of the graph, so nobody can get it wrong. B is free, H and W are the description's. Its
    outputs, float32, are `logits` [B, classes] (unless there are no classes) and `features` [B, D].
    All is computed in float32 whatever the model was trained in. The metadata's `description` is
    the description as JSON.

    Args:
      path: a local path. What is there is replaced, once all is checked.
      params: nested dict of arrays, layers unrolled.
      description: as of `formats.py`.

    Raises:
      ValueError, and nothing is written: jax2onnx is not installed or can't translate the model, or
      onnxruntime computes other numbers than we do.
    """
    fields = {"dtype": "float32", "scan": False, "remat": "none"}
    model = described_model({**description, "model": {**description["model"], **fields}})
    try:
        import jax2onnx
        import onnx
    except ImportError as error:
        raise ValueError(
            f"{path}: ONNX needs a package that is not installed ({error}): "
            "pip install 'vit_jax[onnx]'"
        ) from error
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), params)
    names = ("logits", "features") if model.num_classes else ("features",)

    def run(images):
        output = model.apply(params, images)
        return [getattr(output, name) for name in names]

    for chatty in ("jax2onnx", "onnx_ir"):  # about plugins for packages that we don't use
        logging.getLogger(chatty).setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it is debugging
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
        del proto  # as large as the model
        onnx.checker.check_model(written, full_check=True)
        _compare(written, model, params, names)
        if large:
            data = written.with_name(location)
            data.chmod(written.stat().st_mode)  # onnx lets nobody else read it
            data.replace(partial.with_name(location))
        written.replace(partial)


def _compare(path: Path, model: Model, params: dict, names: tuple[str, ...]) -> None:
    """ValueError unless onnxruntime computes what we do, on two images of noise."""
    import onnxruntime  # jax2onnx needs it

    images = np.random.default_rng(0).integers(0, 256, (2, *model.image_size, 3), np.uint8)
    with jax.default_matmul_precision("float32"):
        expected = jax.jit(model.apply)(params, images)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for name, found in zip(names, session.run(names, {"images": images}), strict=True):
        ours = np.asarray(getattr(expected, name))
        difference = np.abs(found - ours).max() / max(1.0, np.abs(ours).max())
        if not difference <= TOLERANCE:  # NaN isn't
            raise ValueError(
                f"{model.config.variant} can't be written as ONNX: the {name} that onnxruntime "
                f"computes differ from ours by {difference:.1e}, more than {TOLERANCE:.0e}: "
                "jax2onnx translated it wrongly, write another format, npz"
            )
