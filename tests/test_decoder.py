"""The decoder's laws: causality, cached decoding equals the parallel pass, encoder attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.models.decoder import Decoder
from vit_jax.models.transformer import TransformerConfig

TOKENS = np.random.default_rng(0).integers(0, 11, (2, 6))
MEMORY = np.random.default_rng(1).normal(size=(2, 5, 24)).astype(np.float32)


def decoder(depth=1, **options):
    config = TransformerConfig(width=16, depth=depth, num_heads=2, mlp_dim=32, **options)
    model = Decoder(config, vocabulary=11, max_length=8)
    params = jax.jit(model.init, static_argnums=1)(jax.random.key(0), MEMORY.shape[-1])
    rng = np.random.default_rng(2)  # no zeros, behind which an error could hide
    return model, jax.tree.map(lambda p: p + 0.1 * rng.normal(size=p.shape).astype("f"), params)


@pytest.mark.parametrize("depth", [1, 3])
def test_a_later_token_has_no_gradient_to_an_earlier_position(depth):
    """Through one-hot tokens: d logits[t] / d tokens[s] is exactly zero for s > t alone."""
    model, params = decoder(depth)
    table = params["embedding"]["embedding"]

    def logits(nudge):  # [T, D] added to the positions' embeddings, which only shift the tokens'
        position = params["pos_embedding"].at[0, : nudge.shape[0]].add(nudge)
        return model.apply({**params, "pos_embedding": position}, TOKENS[:1], MEMORY[:1])[0]

    jacobian = jax.jit(jax.jacrev(logits))(jnp.zeros((TOKENS.shape[1], table.shape[1])))
    strength = np.abs(jacobian).sum(axis=(1, 3))  # [T of the output, T of the input]
    later = np.triu(np.ones_like(strength), k=1).astype(bool)
    assert (strength[later] == 0).all()
    assert (strength[~later] > 1e-3).all()


@pytest.mark.long
@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("options", [{}, {"qk_norm": True, "mlp": "swiglu"}], ids=["plain", "qk"])
def test_step_by_step_equals_all_at_once(depth, options):
    model, params = decoder(depth, **options)
    expected = model.apply(params, TOKENS, MEMORY)
    cache, step = model.start(params, MEMORY), jax.jit(model.step)
    for i in range(TOKENS.shape[1]):
        logits, cache = step(params, cache, TOKENS[:, i], MEMORY, i)
        np.testing.assert_allclose(logits, expected[:, i], atol=1e-5)


def test_hears_the_encoder_and_each_sequence_its_own():
    model, params = decoder()
    logits = model.apply(params, TOKENS, MEMORY)
    changed = model.apply(params, TOKENS, np.stack([MEMORY[0], MEMORY[1] + 1.0]))
    np.testing.assert_array_equal(logits[0], changed[0])
    assert np.abs(logits[1] - changed[1]).max() > 1e-3


@pytest.mark.long
def test_dropout_depends_on_each_sequences_key_alone():
    model, params = decoder(2, dropout=0.5, attention_dropout=0.5)
    keys = jax.random.split(jax.random.key(0), 2)
    together = model.apply(params, TOKENS, MEMORY, keys)
    apart = model.apply(params, TOKENS[1:], MEMORY[1:], keys[1:])
    np.testing.assert_allclose(together[1:], apart, atol=1e-5)
    assert np.abs(together - model.apply(params, TOKENS, MEMORY)).max() > 0.01


def test_bad_input():
    model, params = decoder()
    with pytest.raises(ValueError, match="9 tokens: expected at most 8"):
        model.apply(params, np.zeros((2, 9), int), MEMORY)
    with pytest.raises(
        ValueError, match="parallel = True: a decoder doesn't support it; leave it at False"
    ):
        decoder(parallel=True)
