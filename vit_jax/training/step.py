"""The training step: state and batch in, state and metrics out. Pure; no I/O.

Letters in shapes: B global batch, A microbatches, C classes.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax

from vit_jax.losses.classification import (
    LossConfig,
    example_losses,
    make_targets,
    share_targets,
)
from vit_jax.losses.masked_patches import MaskedPatchConfig, masked_patch_losses
from vit_jax.models.variants import Model
from vit_jax.parallel.mesh import constrain_batch
from vit_jax.training.augmentation import AugmentationConfig, augment, draw


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a run needs to go on; the order of the data is a function of `step`."""

    step: jax.Array  # int32 []: updates made
    params: dict
    opt_state: Any
    ema: dict | None  # the parameters' running average (Polyak), or None


class Initial(Protocol):
    """A model, or a `recipe.Training`, whose width rule scales the model's initial parameters."""

    def init(self, key: jax.Array) -> dict: ...


def init_state(
    model: Initial, optimizer: optax.GradientTransformation, key: jax.Array, use_ema: bool
) -> TrainState:
    """A fresh state. Under `jit` with `out_shardings` it is born sharded."""
    return start_state(model.init(key), optimizer, use_ema)


def start_state(params: dict, optimizer: optax.GradientTransformation, use_ema: bool) -> TrainState:
    """Step 0 from given parameters."""
    ema = jax.tree.map(jnp.copy, params) if use_ema else None  # a copy: both are donated
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), ema)


def make_train_step(
    model: Model,
    optimizer: optax.GradientTransformation,
    schedule: Callable[[jax.Array], jax.Array],
    loss: LossConfig,
    *,
    augmentation: AugmentationConfig,
    masked: MaskedPatchConfig,
    seed: int,
    trainable: Any,
    accumulation: int = 1,
    ema_decay: float | None = None,
    ema_warmup: bool = False,
) -> Callable[[TrainState, dict], tuple[TrainState, dict]]:
    """The step for batches {"image": uint8 [B, H, W, 3], "label": int32 [B] or [B, K]}.

    `trainable`, a tree of bools, says of which parameters a gradient is computed at all. With
    `ema_warmup` the decay of step t = 0, 1, ... is at most (1 + t) / (10 + t), as in TensorFlow's
    ExponentialMovingAverage.

    Metrics are float32 scalars: `loss`, `accuracy` (of the training batch, before the update, on
    images as they were augmented but labels as they were before they were mixed),
    `learning_rate`, `grad_norm`, `update_norm` and `param_norm` (after the update: not finite as
    soon as a parameter isn't), and `skipped`, examples that others took the place of, if the batch
    tells.
    """

    def loss_fn(params, batch, keys):
        params = jax.tree.map(
            lambda p, trains: p if trains else jax.lax.stop_gradient(p), params, trainable
        )
        labels = make_targets(batch["label"], model.num_classes)
        images, targets = augment(batch["image"], share_targets(loss, labels), batch["draws"])
        if loss.masks_patches:
            losses, hits = masked_patch_losses(masked, model, params, images, keys, train=True)
        else:
            logits = model.apply(params, images, keys).logits
            losses = example_losses(loss, logits, targets)
            hits = jnp.take_along_axis(labels, logits.argmax(-1)[:, None], axis=1)
        return losses.mean(), hits.mean()

    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)

    def train_step(state: TrainState, batch: dict) -> tuple[TrainState, dict]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        rows = jnp.arange(batch["image"].shape[0])
        keys = constrain_batch(jax.vmap(jax.random.fold_in, (None, 0))(key, rows))
        batch = {**batch, "draws": draw(augmentation, seed, state.step, len(rows))}
        together = 2 if augmentation.mixes else 1
        gradients = _accumulate(grad_fn, accumulation, together, state.params, batch, keys)
        (loss_value, accuracy), grads = gradients

        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema_decay is not None:
            rate = 1.0 - ema_decay
            if ema_warmup:
                rate = jnp.maximum(rate, 9.0 / (10.0 + state.step))
            ema = optax.incremental_update(params, ema, rate)
        metrics = {
            "loss": loss_value,
            "accuracy": accuracy,
            "learning_rate": schedule(state.step),
            "grad_norm": optax.tree.norm(grads),
            # Of what was added, not of `updates`: the compiler then does it all in one pass over
            # parameters, moments and gradients; with both it takes two (ViT-L/16: 9% of a step).
            "update_norm": optax.tree.norm(jax.tree.map(jnp.subtract, params, state.params)),
            "param_norm": optax.tree.norm(params),
        }
        if "skipped" in batch:
            metrics["skipped"] = batch["skipped"].sum()
        return TrainState(state.step + 1, params, opt_state, ema), metrics

    return train_step


def _accumulate(grad_fn, accumulation: int, together: int, params, batch, keys):
    """Means of the loss, accuracy and gradients over microbatches, one after another.

    `together`: so many rows, one after another, stay in one microbatch.
    """
    if accumulation == 1:
        return grad_fn(params, batch, keys)

    def split(x):  # [B, ...] -> [A, B/A, ...], every A-th row or pair: none changes its device
        x = x.reshape(-1, accumulation, together, *x.shape[1:]).swapaxes(0, 1)
        return x.reshape(accumulation, -1, *x.shape[3:])

    microbatches = constrain_batch(jax.tree.map(split, (batch, keys)), axis=1)

    def add(total, microbatch):
        return jax.tree.map(jnp.add, total, grad_fn(params, *microbatch)), None

    shapes = jax.eval_shape(grad_fn, params, *jax.tree.map(lambda x: x[0], microbatches))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    total, _ = jax.lax.scan(add, zeros, microbatches)
    return jax.tree.map(lambda x: x / accumulation, total)
