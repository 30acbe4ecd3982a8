"""The linear head, and a model's outputs.

Letters in shapes: B images, N tokens, D width, K predictions of a patch.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.models.dense import Dense
from vit_jax.parallel.mesh import constrain_batch


class Output(NamedTuple):
    """The outputs of a classifier, in float32."""

    logits: jax.Array  # [B, classes]
    features: jax.Array  # [B, D]: the head's input, after the tanh layer where there is one
    patches: jax.Array | None = None  # [B, N, K]: the outputs of masked patch prediction
    squares: dict | None = None  # of a model that `measures`: see `measured`


def measured(block: nn.Module, x: jax.Array) -> jax.Array:
    """Returns x, a block's output; notes its mean square, float32 [], for `Model.measures`."""
    if block.is_mutable_collection("squares") and not block.is_initializing():
        square = jnp.square(x.astype(jnp.float32)).mean()
        block.sow("squares", "output", square, init_fn=lambda: None, reduce_fn=lambda _, new: new)
    return x


def classify(features: jax.Array, num_classes: int, bias: float, name: str = "head") -> Output:
    """Applies the linear head of every family, initialised to zero (section 3.2).

    Call it inside a module, which then owns the head. With `num_classes` = 0 it returns the
    features [B, D] as logits.
    """
    features = constrain_batch(features)
    if not num_classes:
        return Output(logits=features, features=features)
    head = Dense(
        (num_classes,),
        to_nonlinearity=True,
        kernel_init=nn.initializers.zeros,
        bias_init=nn.initializers.constant(bias),
        name=name,
    )
    # Without the constraint XLA splits the logits by classes, as FSDP does the head.
    return Output(logits=constrain_batch(head(features)), features=features)
