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
from vit_jax.losses.distillation import DistillConfig, mix_losses
from vit_jax.losses.masked_patches import MaskedPatchConfig, masked_patch_losses
from vit_jax.models.variants import Model
from vit_jax.parallel.mesh import constrain_batch
from vit_jax.training.augmentation import AugmentationConfig, augment, draw
from vit_jax.training.spikes import count_spikes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a run needs to resume; the order of the data is a function of `step`."""

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
    """Returns the state of step 0 with these parameters."""
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
    distill: DistillConfig | None = None,
    teacher: Callable[[jax.Array], jax.Array] | None = None,
    observe: Callable[[Any, Any, Any], dict] | None = None,
) -> Callable[[TrainState, dict], tuple[TrainState, dict]]:
    """Returns the step for batches {"image": uint8 [B, H, W, 3], "label": int32 [B] or [B, K]}.

    `trainable`, a tree of bools, selects the parameters whose gradients are computed. With
    `ema_warmup` the decay of step t = 0, 1, ... is at most (1 + t) / (10 + t), as in TensorFlow's
    ExponentialMovingAverage. `teacher` returns logits [B, C] for the augmented images; `distill`
    has the options for learning from them.

    Metrics are float32 scalars:
      loss.
      accuracy: of the training batch before the update, with augmented images and unmixed labels.
      learning_rate, grad_norm, update_norm.
      param_norm: after the update; not finite if any parameter isn't.
      skipped: broken examples that others replaced, if the batch has this count.
      spikes: updates skipped so far, if the optimizer skips any.
      And what `observe` returns for the gradients, the updates and the blocks' mean squares.
    """
    measuring = dataclasses.replace(model, measures=observe is not None)
    losses_fn = make_losses(measuring, loss, masked, distill, teacher)

    def loss_fn(params, batch, keys):
        params = jax.tree.map(
            lambda p, trains: p if trains else jax.lax.stop_gradient(p), params, trainable
        )
        losses, hits, squares = losses_fn(params, batch, keys)
        return losses.mean(), (hits.mean(), squares)

    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)

    def train_step(state: TrainState, batch: dict) -> tuple[TrainState, dict]:
        batch, keys = with_draws(augmentation, seed, state.step, batch)
        together = 2 if augmentation.mixes else 1
        gradients = _accumulate(grad_fn, accumulation, together, state.params, batch, keys)
        (loss_value, (accuracy, squares)), grads = gradients

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
            # Takes the norm of the difference, not of `updates`, so that the compiler makes one
            # pass over parameters, moments and gradients instead of two (ViT-L/16: 9% of a step).
            "update_norm": optax.tree.norm(jax.tree.map(jnp.subtract, params, state.params)),
            "param_norm": optax.tree.norm(params),
        }
        if spikes := count_spikes(opt_state):
            metrics["spikes"] = spikes[0]
        if observe:
            changes = jax.tree.map(jnp.subtract, params, state.params)
            metrics |= observe(grads, changes, squares)
        if "skipped" in batch:
            metrics["skipped"] = batch["skipped"].sum()
        return TrainState(state.step + 1, params, opt_state, ema), metrics

    return train_step


def make_losses(
    model: Model,
    loss: LossConfig,
    masked: MaskedPatchConfig,
    distill: DistillConfig | None = None,
    teacher: Callable[[jax.Array], jax.Array] | None = None,
) -> Callable[[dict, dict, jax.Array], tuple[jax.Array, jax.Array, dict | None]]:
    """Returns a function of parameters, and batch and keys as `with_draws` returns them.

    It returns (losses [B], hits, the mean squares of a model that measures them).
    """

    def losses_fn(params, batch, keys):
        labels = make_targets(batch["label"], model.num_classes)
        images, targets = augment(batch["image"], share_targets(loss, labels), batch["draws"])
        if loss.masks_patches:
            return masked_patch_losses(masked, model, params, images, keys, train=True)
        output = model.apply(params, images, keys)
        logits = output.logits
        losses = example_losses(loss, logits, targets)
        if teacher is not None:
            losses = mix_losses(distill, loss, losses, logits, teacher(images))
        hits = jnp.take_along_axis(labels, logits.argmax(-1)[:, None], axis=1)
        return losses, hits, output.squares

    return losses_fn


def with_draws(
    augmentation: AugmentationConfig, seed: int, step: jax.Array, batch: dict
) -> tuple[dict, jax.Array]:
    """Returns the batch with its augmentation's draws at a step, and a key for each row."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    rows = jnp.arange(batch["image"].shape[0])
    keys = constrain_batch(jax.vmap(jax.random.fold_in, (None, 0))(key, rows))
    return {**batch, "draws": draw(augmentation, seed, step, len(rows))}, keys


def _accumulate(grad_fn, accumulation: int, together: int, params, batch, keys):
    """Averages the loss, accuracy and gradients over microbatches, one after another.

    `together` is the number of consecutive rows that stay in one microbatch.
    """
    if accumulation == 1:
        return grad_fn(params, batch, keys)

    def split(x):  # [B, ...] -> [A, B/A, ...], every A-th row or pair: none moves between devices
        x = x.reshape(-1, accumulation, together, *x.shape[1:]).swapaxes(0, 1)
        return x.reshape(accumulation, -1, *x.shape[3:])

    microbatches = constrain_batch(jax.tree.map(split, (batch, keys)), axis=1)

    def add(total, microbatch):
        return jax.tree.map(jnp.add, total, grad_fn(params, *microbatch)), None

    shapes = jax.eval_shape(grad_fn, params, *jax.tree.map(lambda x: x[0], microbatches))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    total, _ = jax.lax.scan(add, zeros, microbatches)
    return jax.tree.map(lambda x: x / accumulation, total)
