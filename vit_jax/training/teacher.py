"""The teacher of distillation: a trained model in bfloat16, sharded by the same rules."""

import dataclasses
import hashlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vit_jax.config import InputError
from vit_jax.costs.flops import forward_macs
from vit_jax.losses.distillation import DistillConfig
from vit_jax.models.variants import Model, build_model
from vit_jax.parallel.mesh import MeshConfig, put_tree, state_shardings
from vit_jax.weights.trained import TrainedModel, load


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A model and its parameters on the host: bfloat16 arrays, with shardings for a mesh."""

    model: Model
    params: dict
    shardings: dict
    names: tuple[str, ...]  # of the classes; empty if unknown

    @property
    def shapes(self) -> dict:
        """The parameters as `jax.ShapeDtypeStruct`s with shardings."""
        return jax.tree.map(
            lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at),
            self.params,
            self.shardings,
        )

    @property
    def flops(self) -> int:
        """FLOPs of one image: the forward pass."""
        return 2 * forward_macs(self.model)

    @property
    def fingerprint(self) -> dict[str, str]:
        """Identifies the teacher, to compare it at the next start and on other hosts."""
        digest = hashlib.blake2b(digest_size=16)
        for leaf in jax.tree.leaves(self.params):
            digest.update(leaf.tobytes())
        return {"weights": digest.hexdigest()}

    def place(self) -> dict:
        """Puts the parameters on the mesh."""
        return put_tree(self.params, self.shardings)

    def logits(self, params: dict, images: jax.Array) -> jax.Array:
        """Maps float [B, H, W, 3] in [-1, 1] of any size to logits [B, C], without a gradient."""
        shape = (len(images), *self.model.image_size, 3)
        if images.shape != shape:
            images = jax.image.resize(images, shape, "linear")
        return jax.lax.stop_gradient(self.model.apply(params, images).logits)

    def check_classes(self, names: Sequence[str] | None) -> None:
        """Raises ValueError if the data's class names are known and differ from the teacher's."""
        if not names or not self.names or tuple(names) == self.names:
            return
        number = next(i for i, (a, b) in enumerate(zip(names, self.names, strict=True)) if a != b)
        raise InputError(
            f"distill.teacher: its class {number} is {self.names[number]!r}, the data's is "
            f"{names[number]!r}: expected the same classes in the same order"
        )


@lru_cache(maxsize=1)
def _load(path: str) -> TrainedModel:
    return load(path)


def open_teacher(
    config: DistillConfig, student: Model, mesh: Mesh, placement: MeshConfig
) -> Teacher | None:
    """Loads a student's teacher; None if the config has none.

    Raises ValueError if the numbers of classes or the image sizes differ, and what `vit_jax.load`
    raises.
    """
    if not config.teacher:
        return None
    found = _load(config.teacher)
    if found.num_classes != student.num_classes:
        raise InputError(
            f"distill.teacher: {config.teacher} has {found.num_classes} classes, the data has "
            f"{student.num_classes}: use a teacher that was trained on the same classes"
        )
    if found.image_size != student.image_size:
        there, here = ("x".join(map(str, size)) for size in (found.image_size, student.image_size))
        raise InputError(
            f"distill.teacher: {config.teacher} takes images of {there} pixels, the recipe has "
            f"{here}: set image_size to the teacher's (stages may have less), or use another"
        )
    model_config = dataclasses.replace(found.config, dtype="bfloat16")
    params: Any = jax.tree.map(lambda x: np.asarray(x).astype(jnp.bfloat16), found.params)
    return Teacher(
        model=build_model(model_config, found.num_classes, found.image_size),
        params=params,
        shardings=state_shardings(mesh, placement, {"params": params})["params"],
        names=found.names,
    )
