"""Trained models: parameters with everything needed to use, save and load them.

Letters in shapes: B images, H W image size, D features, C classes.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from vit_jax.config import InputError, build, unknown
from vit_jax.data.augment import parse_preprocess
from vit_jax.data.foreign_files import read_file
from vit_jax.models.lora import merge
from vit_jax.models.options import Description, ModelConfig
from vit_jax.models.stacking import flatten
from vit_jax.models.variants import Model, Output, build_model, described_model
from vit_jax.parallel.mesh import (
    MeshConfig,
    batch_parts,
    batch_sharding,
    make_mesh,
    put_tree,
    replicated,
    use_mesh,
)
from vit_jax.parallel.run_files import as_path, check_holds_checkpoints, is_complete, saved_steps
from vit_jax.weights import folders, formats, hub, published
from vit_jax.weights.checksums import check_whole, checksummed
from vit_jax.weights.prediction import Prediction
from vit_jax.weights.pytorch import checked

FORMATS = ("orbax", *formats.FORMATS)
BATCH = 64  # images per batch


@dataclasses.dataclass(frozen=True, repr=False)
class TrainedModel:
    """A network with parameters, class names, preprocessing and calibration.

    Attributes:
      architecture: the network: its config, `init` and `apply`.
      params: nested dict of arrays, named as in big_vision.
      names: class names; empty if unknown.
      preprocessing: converts images to the network's input: see `data.augment.parse_preprocess`.
      temperature: divides the logits to calibrate probabilities.
      origin: the argument of `load`.
      notes: what `load` passed over or assumed, a sentence each.
    """

    architecture: Model
    params: dict
    names: tuple[str, ...] = ()
    preprocessing: str = "resize"
    temperature: float = 1.0
    origin: str = ""
    notes: tuple[str, ...] = ()

    @classmethod
    def from_description(
        cls, params: dict, description: dict[str, Any], origin: str = ""
    ) -> "TrainedModel":
        """Builds a model from parameters and the JSON description in its checkpoint.

        LoRA's adapters are merged.
        """
        params, description = merge(params, description)
        found = Description.read(description)
        read = (found.class_names, found.preprocess, found.temperature, origin, found.notes)
        return cls(described_model(description), params, *read)

    @property
    def description(self) -> dict[str, Any]:
        """The JSON description that `from_description` reads."""
        description = {**self.architecture.description, "preprocess": self.preprocessing}
        if self.names:
            description["class_names"] = list(self.names)
        if self.temperature != 1.0:
            description["temperature"] = self.temperature
        if licences := [note for note in self.notes if note.startswith(hub.LICENCE)]:
            description["notes"] = licences
        return description

    @property
    def config(self) -> ModelConfig:
        """The architecture's options."""
        return self.architecture.config

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images, in pixels."""
        return self.architecture.image_size

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 for a model without a head."""
        return self.architecture.num_classes

    @property
    def class_names(self) -> tuple[str, ...]:
        """The class names, or "class 0", "class 1", ... if unknown."""
        return self.names or tuple(f"class {i}" for i in range(self.num_classes))

    @property
    def num_parameters(self) -> int:
        """The number of scalars in `params`."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.params))

    def __repr__(self) -> str:
        height, width = self.image_size
        origin = f", from {self.origin}" if self.origin else ""
        return (
            f"TrainedModel({self.config.variant}, {height}x{width} pixels, "
            f"{self.num_classes} classes, {self.num_parameters:,} parameters{origin})"
        )

    def apply(self, params: dict, images: jax.Array, keys: jax.Array | None = None) -> Output:
        """Runs the network with any parameters, for use inside `jit` and `grad`.

        `images` [B, H, W, 3] are uint8 or float in [-1, 1]. With PRNG `keys` [B], dropout is on.
        """
        return self.architecture.apply(params, images, keys)

    def logits(self, images: np.ndarray, mesh: Mesh | None = None) -> np.ndarray:
        """Computes logits: uint8 [B, H, W, 3] -> float32 [B, C]. ValueError without a head.

        `mesh`: devices to split batches over; by default all of this process.
        """
        self._check_head()
        return self._outputs(images, mesh)

    def features(self, images: np.ndarray, mesh: Mesh | None = None) -> np.ndarray:
        """Computes the head's input: uint8 [B, H, W, 3] -> float32 [B, D]."""
        return self._outputs(images, mesh, name="features")

    def probabilities(self, images: np.ndarray, mesh: Mesh | None = None) -> np.ndarray:
        """Computes softmax(logits / temperature): uint8 [B, H, W, 3] -> float32 [B, C]."""
        return self._softmax(images, mesh)

    def preprocess(self, image: str | os.PathLike | bytes | np.ndarray) -> np.ndarray:
        """Converts a file, its bytes or pixels uint8 [h, w, 3] to an input uint8 [H, W, 3].

        Raises ValueError for an image that can't be decoded, OSError for one that can't be read.
        """
        if not isinstance(image, bytes | np.ndarray):
            image = read_file(image)
        prepared = parse_preprocess(self.preprocessing, self.image_size)(
            image, np.random.default_rng(0)
        )
        if prepared.shape != (*self.image_size, 3):
            raise InputError(
                f"preprocessing {self.preprocessing!r} gives an image of shape {prepared.shape}, "
                f"expected {(*self.image_size, 3)}: add `resize` or a crop"
            )
        return prepared

    def predict(
        self, images: Sequence[str | os.PathLike], batch_size: int = BATCH
    ) -> list[Prediction]:
        """Classifies image files. An image that can't be read has an `error` in its prediction.

        Raises ValueError for a model without a head.
        """
        return list(self.iterate_predictions(images, batch_size))

    def iterate_predictions(
        self, images: Iterable[str | os.PathLike], batch_size: int = BATCH
    ) -> Iterator[Prediction]:
        """Yields the predictions of `predict` one by one."""
        self._check_head()
        for name, probabilities, error in self._iterate(images, self._softmax, batch_size):
            yield Prediction(name, self.class_names, probabilities, error)

    def iterate_features(
        self, images: Iterable[str | os.PathLike], batch_size: int = BATCH
    ) -> Iterator[tuple[str, np.ndarray | None, str]]:
        """Yields (file, features float32 [D], "") of image files one by one.

        For an image that can't be read: (file, None, the reason).
        """
        features = functools.partial(self._outputs, name="features")
        return self._iterate(images, features, batch_size)

    def _iterate(
        self, images: Iterable[str | os.PathLike], compute: Callable, batch_size: int
    ) -> Iterator[tuple[str, np.ndarray | None, str]]:
        """Yields (file, row of `compute`, "") or (file, None, error); holds one batch at a time."""
        images = list(images)
        batch_size = max(1, min(batch_size, len(images)))

        def read(image: str | os.PathLike) -> np.ndarray | str:
            try:
                return self.preprocess(image)
            except (PermissionError, ValueError) as error:
                return str(error)

        with ThreadPoolExecutor(8) as threads:
            for start in range(0, len(images), batch_size):
                group = images[start : start + batch_size]
                read_images = list(threads.map(read, group))
                good = [image for image in read_images if not isinstance(image, str)]
                rows = iter(compute(np.stack(good), None, batch_size) if good else ())
                for name, image in zip(map(os.fspath, group), read_images, strict=True):
                    failed = isinstance(image, str)
                    yield (name, None, image) if failed else (name, next(rows), "")

    def with_random_weights(self, seed: int = 0) -> "TrainedModel":
        """Returns the same architecture with newly initialised parameters, as a baseline."""
        params = jax.device_get(jax.jit(self.architecture.init)(jax.random.key(seed)))
        return dataclasses.replace(self, params=params, origin=f"random weights of seed {seed}")

    def save(self, path: str | os.PathLike, format: str = "orbax") -> None:
        """Writes the model in one of `FORMATS`; `load` restores the same bits (not from ONNX).

        Raises ValueError and writes nothing if the format can't hold the model or `path` exists.
        """
        if format not in FORMATS:
            raise unknown("format", format, FORMATS)
        formats.check_output(path)
        params, description = merge(self.params, self.description)
        if format == "orbax":
            _write_orbax(check_holds_checkpoints(as_path(path)), params, description)
        else:
            formats.write(path, params, description, format)

    def push_to_hub(self, repository: str, format: str = "timm", **about: Any) -> str:
        """Uploads the model and its card to "owner/name" on Hugging Face's hub: see `hub.push`.

        `about`: license, datasets, metrics, private. Returns the repository's address.
        """
        write = functools.partial(self.save, format=format)
        return hub.push(repository, write, self.description, format, **about)

    def _softmax(
        self, images: np.ndarray, mesh: Mesh | None, batch_size: int | None = None
    ) -> np.ndarray:
        self._check_head()
        logits = self._outputs(images, mesh, batch_size)
        return np.asarray(jax.nn.softmax(logits / self.temperature))

    def _check_head(self) -> None:
        if not self.num_classes:
            raise InputError(
                f"{self.origin or self.config.variant} has no head: transfer it to your classes "
                "first, or take its features"
            )

    def _outputs(
        self, images: np.ndarray, mesh: Mesh | None, size: int | None = None, name: str = "logits"
    ) -> np.ndarray:
        """Computes one field of `Output` in batches of `size`."""
        images = np.asarray(images)
        if images.shape[1:] != (*self.image_size, 3) or images.dtype != np.uint8:
            raise InputError(
                f"images of shape {images.shape} and dtype {images.dtype}: expected uint8 "
                f"[B, {self.image_size[0]}, {self.image_size[1]}, 3], as `preprocess` makes them"
            )
        mesh = mesh or self._local_mesh
        params, sharding = self._placed(mesh), batch_sharding(mesh)
        parts = batch_parts(mesh)
        size = size or max(1, min(BATCH, len(images)))
        size = -(-size // parts) * parts  # the same for all batches: one compilation
        found = []
        with use_mesh(mesh):
            for start in range(0, len(images), size):
                batch = images[start : start + size]
                padding = np.zeros((size - len(batch), *images.shape[1:]), np.uint8)
                padded = jax.device_put(np.concatenate([batch, padding]), sharding)
                outputs = getattr(self._forward(params, padded), name)
                found.append(np.asarray(outputs, np.float32)[: len(batch)])
        if not found:
            one = jax.ShapeDtypeStruct((1, *images.shape[1:]), np.uint8)
            shape = getattr(jax.eval_shape(self._forward, params, one), name).shape
            return np.zeros((0, *shape[1:]), np.float32)
        return np.concatenate(found)

    @functools.cached_property
    def _forward(self) -> Any:
        return jax.jit(self.architecture.apply)

    @functools.cached_property
    def _local_mesh(self) -> Mesh:
        return make_mesh(MeshConfig(), jax.local_devices())

    @functools.cached_property
    def _copies(self) -> dict[Mesh, dict]:
        return {}

    def _placed(self, mesh: Mesh) -> dict:
        """Returns the parameters replicated over the mesh; transfers them only once."""
        if mesh not in self._copies:
            shardings = jax.tree.map(lambda _: replicated(mesh), self.params)
            self._copies[mesh] = put_tree(self.params, shardings)
        return self._copies[mesh]


def create_model(
    variant: str,
    num_classes: int,
    image_size: int | tuple[int, int] = 224,
    seed: int = 0,
    **options: Any,
) -> TrainedModel:
    """Returns a model with random weights, such as `create_model("ViT-B/16", 10)`.

    Args:
      variant: an architecture's name: see `models.variants.ModelConfig`.
      num_classes: number of classes; 0 for a model without a head.
      image_size: the side of square images, or (height, width).
      seed: seed of the initial parameters.
      **options: any other field of `ModelConfig`.

    Raises:
      ValueError: an unknown variant or option, or values that don't fit together.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    config = build(ModelConfig, {"variant": variant, **options}, "model")
    architecture = build_model(config, num_classes, size)
    return TrainedModel(architecture, {}).with_random_weights(seed)


def load(
    path: str | os.PathLike,
    image_size: tuple[int, int] | None = None,
    variant: str | None = None,
) -> TrainedModel:
    """Reads a trained model.

    Args:
      path: a run's workdir (its newest checkpoint); the folder of one checkpoint; a file or folder
        that `formats.read` supports (.npz, safetensors of timm and Hugging Face), local, gs://,
        hf:// or https://; or a published name, see `weights.published`.
      image_size: (height, width) in pixels, if a foreign file doesn't tell.
      variant: the architecture of safetensors without a config.json, such as "ViT-B/16".

    Loads the exponential moving average (EMA) of the parameters if the run kept one.

    Raises:
      FileNotFoundError: nothing at the path, or no complete checkpoint.
      ValueError: a damaged file, or one that isn't a model.
    """
    resolved = published.resolve(path)
    if formats.is_foreign(resolved):
        params, description = formats.read(resolved, image_size, variant)
    elif image_size is not None or variant is not None:
        raise InputError(f"{path} says what its model is: leave out image_size and variant")
    else:
        params, description = _read_orbax(find_checkpoint(resolved))
    return TrainedModel.from_description(params, description, os.fspath(path))


def find_checkpoint(path: str | os.PathLike) -> Path:
    """Returns the folder of one checkpoint: `path` itself, or the newest of a run's workdir."""
    folder = check_holds_checkpoints(as_path(path)).absolute()
    if (folder / "checkpoints").is_dir():
        if not (steps := saved_steps(folder)):
            raise FileNotFoundError(f"{path} holds no complete checkpoint: did its run save one?")
        folder = folder / "checkpoints" / str(max(steps))
    whole = (folder / "model").is_dir() and is_complete(folder)
    if not ((folder / "params").is_dir() and whole):
        raise FileNotFoundError(folders.explain(path))
    return folder


def _read_orbax(folder: Path) -> tuple[dict, dict[str, Any]]:
    name = "ema" if (folder / "ema").is_dir() else "params"
    check_whole(folder, {"ema", name, "model"})
    handler = ocp.PyTreeCheckpointHandler()
    with ocp.Checkpointer(handler) as reader:
        tree = handler.metadata(folder / name).tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        params = reader.restore(folder / name, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
        description = reader.restore(folder / "model", args=ocp.args.JsonRestore())
    checked(flatten(params), description)
    return params, description


def _write_orbax(path: Path, params: dict, description: dict[str, Any]) -> None:
    items = {"params": ocp.args.StandardSave(params), "model": ocp.args.JsonSave(description)}
    handler = ocp.CompositeCheckpointHandler()
    with ocp.Checkpointer(handler, temporary_path_class=written_by(path)) as writer:
        writer.save(path.absolute(), args=ocp.args.Composite(**items))


def written_by(path: Path) -> type:
    """How a checkpoint becomes complete: its folder is renamed; in a bucket it gets a mark."""
    way = "AtomicRename" if isinstance(path, Path) else "CommitFile"
    return checksummed(getattr(ocp.path.atomicity, f"{way}TemporaryPath"))
