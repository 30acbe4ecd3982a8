"""Calibration: how well confidences match accuracies, and the temperature that corrects them."""

import jax
import jax.numpy as jnp
import numpy as np

BINS = 15  # as in Guo et al., arXiv 1706.04599


def bin_index(confidence: np.ndarray | jax.Array) -> np.ndarray | jax.Array:
    """Returns each confidence's bin, int [B]: bin m holds (m/BINS, (m+1)/BINS]."""
    xp = jnp if isinstance(confidence, jax.Array) else np
    return xp.clip(xp.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)


def bin_confidences(confidence: jax.Array, correct: jax.Array, mask: jax.Array) -> jax.Array:
    """Sums examples, correct ones and confidences per bin: [B], bool [B], bool [B] -> [3, BINS].

    Usable inside `jit`; rows where `mask` is False don't count.
    """
    values = jnp.stack([jnp.ones_like(confidence), correct, confidence]) * mask
    return values @ jax.nn.one_hot(bin_index(confidence), BINS)


def bin_predictions(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Sums like `bin_confidences`, on the host in float64: [N, C], [N] -> [3, BINS]."""
    confidence = probabilities.max(axis=1)
    values = (np.ones_like(confidence), probabilities.argmax(axis=1) == labels, confidence)
    return np.stack([np.bincount(bin_index(confidence), v, minlength=BINS) for v in values])


def calibration_error(bins: np.ndarray) -> float:
    """Returns the expected calibration error of [3, BINS] sums, in [0, 1].

    Equation 3 of Guo et al., arXiv 1706.04599.
    """
    examples, correct, confidence = bins.astype(np.float64)
    return float(np.abs(correct - confidence).sum() / max(examples.sum(), 1))


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """Returns the T > 0 that minimises the cross-entropy of softmax(logits / T): [N, C], [N] -> T.

    Temperature scaling (Guo et al., section 4.2) doesn't change predictions. Fit it on a dev split.
    The loss is convex in 1 / T. T is limited to [0.01, 100]; it reaches a limit if all predictions
    are correct, or no better than chance.
    """
    from scipy import optimize, special  # takes a third of a second; pretraining doesn't need it

    logits = logits.astype(np.float64)
    right = logits[np.arange(len(labels)), labels]

    def loss(log_scale: float) -> float:
        scale = np.exp(log_scale)
        return np.mean(special.logsumexp(scale * logits, axis=1) - scale * right)

    found = optimize.minimize_scalar(
        loss, bounds=(-np.log(100), np.log(100)), method="bounded", options={"xatol": 1e-6}
    )
    return float(np.exp(-found.x))
