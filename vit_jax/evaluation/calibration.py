"""Does a confidence of 0.8 mean right in 8 of 10?"""

import jax
import jax.numpy as jnp
import numpy as np

BINS = 15  # as in Guo et al., arXiv 1706.04599


def bin_confidences(confidence: jax.Array, correct: jax.Array, mask: jax.Array) -> jax.Array:
    """Sums over equally wide bins, for jit: [B], bool [B], bool [B] -> [3, BINS].

    Of examples, of right ones, of confidences. Bin m has the confidences in (m/BINS, (m+1)/BINS].
    """
    bins = jnp.clip(jnp.ceil(confidence * BINS).astype(jnp.int32) - 1, 0, BINS - 1)
    values = jnp.stack([jnp.ones_like(confidence), correct, confidence]) * mask
    return values @ jax.nn.one_hot(bins, BINS)


def calibration_error(bins: np.ndarray) -> float:
    """Expected calibration error (equation 3 of the paper above) of [3, BINS] sums, in [0, 1]."""
    examples, correct, confidence = bins.astype(np.float64)
    return float(np.abs(correct - confidence).sum() / max(examples.sum(), 1))


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The T > 0 for which softmax(logits / T) has the least cross-entropy: [N, C], [N] -> T.

    Temperature scaling (section 4.2 of the paper above): it changes no prediction. To be fitted on
    a dev split. The loss is convex in 1 / T; T stays in [0.01, 100] where labels are all predicted
    right, or no better than by chance.
    """
    from scipy import optimize, special  # a third of a second, which pretraining need not wait for

    logits = logits.astype(np.float64)
    right = logits[np.arange(len(labels)), labels]

    def loss(log_scale: float) -> float:
        scale = np.exp(log_scale)
        return np.mean(special.logsumexp(scale * logits, axis=1) - scale * right)

    found = optimize.minimize_scalar(
        loss, bounds=(-np.log(100), np.log(100)), method="bounded", options={"xatol": 1e-6}
    )
    return float(np.exp(-found.x))
