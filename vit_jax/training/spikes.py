"""Skips updates whose gradients are far larger than recent ones.

A spike of the gradients' norm often precedes a spike of the loss, from which a run recovers slowly
or never. PaLM skips such batches (arXiv 2204.02311, section 5.1). QK normalisation (arXiv
2302.05442, section 3.2) and a smaller learning rate treat the cause.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

WINDOW = 128  # steps over whose norms the median is taken
FEWEST = 32  # norms that a median needs
MOST = 12  # updates of a window that may be skipped: 9%


class SpikeState(NamedTuple):
    """`norms` and `left_out` are ring buffers of the last `WINDOW` steps; `skipped` counts all."""

    norms: jax.Array  # float32 [WINDOW]
    left_out: jax.Array  # bool [WINDOW]
    seen: jax.Array  # int32 []: steps
    skipped: jax.Array  # int32 []: updates skipped
    inner: Any


def skip_spikes(inner: optax.GradientTransformation, factor: float) -> optax.GradientTransformation:
    """Wraps `inner` to skip updates with a gradient norm above `factor` times its running median.

    A skipped update doesn't change the state of `inner`. At most `MOST` of `WINDOW` updates are
    skipped, so that a norm that has risen permanently becomes the median.
    """

    def init(params: Any) -> SpikeState:
        norms, left_out = jnp.zeros(WINDOW, jnp.float32), jnp.zeros(WINDOW, bool)
        zero = jnp.zeros((), jnp.int32)
        return SpikeState(norms, left_out, zero, zero, inner.init(params))

    def update(grads: Any, state: SpikeState, params: Any) -> tuple[Any, SpikeState]:
        norm = optax.tree.norm(grads).astype(jnp.float32)
        median = jnp.nanmedian(jnp.where(jnp.arange(WINDOW) < state.seen, state.norms, jnp.nan))
        at = state.seen % WINDOW
        left_out = state.left_out.at[at].set(False)
        is_spike = (state.seen >= FEWEST) & (norm > factor * median) & (left_out.sum() < MOST)

        def leave_out() -> tuple[Any, Any]:
            return jax.tree.map(jnp.zeros_like, grads), state.inner

        updates, inner_state = jax.lax.cond(
            is_spike, leave_out, lambda: inner.update(grads, state.inner, params)
        )
        return updates, SpikeState(
            state.norms.at[at].set(norm),
            left_out.at[at].set(is_spike),
            state.seen + 1,
            state.skipped + is_spike,
            inner_state,
        )

    return optax.GradientTransformation(init, update)


def count_spikes(opt_state: Any) -> list[jax.Array]:
    """Returns updates skipped so far, float32 [], by each `skip_spikes` in an optimizer's state."""
    parts = jax.tree.leaves(opt_state, is_leaf=lambda part: isinstance(part, SpikeState))
    return [p.skipped.astype(jnp.float32) for p in parts if isinstance(p, SpikeState)]
