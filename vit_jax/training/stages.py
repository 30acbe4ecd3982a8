"""A token schedule: a run in stages of other image sizes, patches and shares of tokens.

Early stages with fewer tokens cost fewer FLOPs: progressive resolution (EfficientTrain++, arXiv
2405.08768), larger patches (arXiv 2311.03233) or a random subset of the patches (PatchDropout,
arXiv 2208.07220). All stages train one set of parameters, for the recipe's image size and patch.
Each step of a stage resizes position embeddings and the patch kernel as `weights.adapt` does, by
linear maps that are differentiated. So checkpoints, optimizer state and transfer are independent of
stages.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import jax

from vit_jax.config import InputError
from vit_jax.costs.flops import training_flops
from vit_jax.models.head import Output
from vit_jax.models.positions import ADDED
from vit_jax.models.stacking import flatten, unflatten
from vit_jax.models.variants import Model, build_model
from vit_jax.models.vit import ViT
from vit_jax.weights.adapt import resize


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """A part of a run; None means the recipe's value.

    Raises ValueError for values out of range.
    """

    share: float  # of the run's steps
    image_size: int | None = None  # pixels, the side of a square
    keep: float = 1.0  # share of the patches, a random subset of each image
    patch: int | None = None  # pixels, the side of a patch

    def __post_init__(self):
        for name in ("share", "keep"):
            if not 0 < getattr(self, name) <= 1:
                raise InputError(f"stages: {name} = {getattr(self, name)}: expected over 0, to 1")
        for name in ("image_size", "patch"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InputError(f"stages: {name} = {getattr(self, name)}: expected at least 1")


@dataclasses.dataclass(frozen=True)
class Stage:
    """Updates start, ..., stop - 1 of a run, counted from 0, and the model that they train."""

    start: int
    stop: int
    model: Model

    @property
    def tokens(self) -> int | None:
        """Patches per image that the blocks process; None for models without patches."""
        module = self.model.module
        if not isinstance(module, ViT):
            return None
        rows, columns = module.positions.grid
        return module.kept or rows * columns

    def flops(self, start: int, stop: int) -> int:
        """Model FLOPs of one image in each update start, ..., stop - 1 that is in this stage."""
        return training_flops(self.model) * max(0, min(stop, self.stop) - max(start, self.start))


@dataclasses.dataclass(frozen=True)
class Resized(Model):
    """A model of another size, patch or share of tokens that takes the parameters of `full`."""

    full: Model

    def apply(
        self,
        params: dict,
        images: jax.Array,
        keys: jax.Array | None = None,
        patch_indices: jax.Array | None = None,
    ) -> Output:
        """Resizes the parameters of `full`, and runs the network on images of this model's size."""
        flat = flatten(params)
        for name, shape in _other_shapes(self.full, self).items():
            flat[name] = resize(name, flat[name], shape, self.full.grid, self.grid)
        return super().apply(unflatten(flat), images, keys, patch_indices)


def check_stages(configs: Sequence[StageConfig]) -> None:
    """Raises ValueError unless the shares of the stages, if there are any, add up to 1."""
    total = sum(config.share for config in configs)
    if configs and abs(total - 1) > 1e-6:
        raise InputError(
            f"stages: the shares {', '.join(str(c.share) for c in configs)} add up to {total:g}: "
            "expected 1"
        )


def build_stages(configs: Sequence[StageConfig], model: Model, steps: int) -> tuple[Stage, ...]:
    """Builds the stages of a run of `steps` updates; without configs, one stage of `model`.

    Raises ValueError, with the stage's number, for one that `model` can't have or without a step.
    """
    check_stages(configs)
    stages, share = [], 0.0
    for number, config in enumerate(configs, 1):
        start, share = round(share * steps), share + config.share
        stop = round(share * steps)
        try:
            if start == stop:
                raise InputError(f"share = {config.share} of {steps} steps is 0 steps: raise it")
            stages.append(Stage(start, stop, _resized(model, config)))
        except InputError as error:
            raise InputError(f"stage {number} of {len(configs)}: {error}") from error
    return tuple(stages) or (Stage(0, steps, model),)


def _resized(model: Model, config: StageConfig) -> Model:
    """Returns the model of a stage, or `model` itself if nothing differs."""
    variant, module = model.config.variant, model.module
    if config.patch is not None:
        if not isinstance(module, ViT) or module.stem is not None:
            raise InputError(
                f"patch = {config.patch}: only ViTs can change their patch size, not {variant}"
            )
        variant = re.sub(r"\d+$", str(config.patch), variant)
    size = model.image_size if config.image_size is None else (config.image_size,) * 2
    if (variant, size, config.keep) == (model.config.variant, model.image_size, 1.0):
        return model
    changed = dataclasses.replace(model.config, variant=variant)
    built = build_model(changed, model.num_classes, size).module
    if isinstance(module, ViT):
        built = built.clone(
            positions=dataclasses.replace(built.positions, frame=model.grid),
            kept=_kept(model, built, config.keep),
        )
    elif config.keep < 1:
        raise InputError(f"keep = {config.keep}: only ViTs can drop patches, not {variant}")
    resized = Resized(changed, model.num_classes, size, built, model)
    whole = flatten(_shapes(model))
    for name, shape in _other_shapes(model, resized).items():
        if (
            resize(name, jax.numpy.zeros(whole[name].shape), shape, model.grid, resized.grid)
            is None
        ):
            raise InputError(
                f"{name} {whole[name].shape} can't be resized to {shape}: leave image_size and "
                "patch, or use learned, sincos_2d or rotary positions"
            )
    return resized


def _kept(model: Model, module: ViT, keep: float) -> int | None:
    if keep == 1:
        return None
    positions, (rows, columns) = module.positions, module.positions.grid
    if positions.kind != "none" and (positions.at != "stem" or positions.kind not in ADDED):
        raise InputError(
            f"keep = {keep}: position = {positions.kind!r} at {positions.at!r} needs all patches: "
            f"expected one of {', '.join(ADDED)} at 'stem'"
        )
    if positions.rotary is not None:
        raise InputError(f"keep = {keep}: rotary positions need all patches: leave keep at 1")
    kept = round(keep * rows * columns)
    if not kept:
        raise InputError(f"keep = {keep} of {rows} x {columns} patches leaves none: keep more")
    return kept


def _shapes(model: Model) -> Any:
    return jax.eval_shape(model.init, jax.random.key(0))


def _other_shapes(full: Model, model: Model) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of parameters in `model` that differ from those in `full`."""
    before, after = flatten(_shapes(full)), flatten(_shapes(model))
    return {name: after[name].shape for name in after if after[name].shape != before[name].shape}
