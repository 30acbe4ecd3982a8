"""Linear probe: logistic regression on frozen features with L-BFGS.

The protocol of CLIP (Radford et al., arXiv 2103.00020, appendix A.3): chooses the penalty on dev
from a logarithmic grid, then fits train and dev together with it. Features are standardised by the
mean and deviation of the training examples.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from scipy import optimize

from vit_jax.config import InputError
from vit_jax.data.stratified import stratified_split
from vit_jax.evaluation.features import extract_split, open_single_label
from vit_jax.evaluation.registry import EvaluatorConfig, Objective
from vit_jax.models.variants import Model

ITERATIONS = 1000  # at most, as in CLIP
L2 = tuple(10.0**k for k in range(-6, 3))


@dataclasses.dataclass(frozen=True)
class Config(EvaluatorConfig):
    """Fits `split` and measures accuracy on all of `test_split`.

    Without a `dev_split`, a tenth of each class of `split`, drawn with `seed`, is the dev part.
    """

    protocol: str = "linear"
    test_split: str = "test"
    dev_split: str | None = None
    l2: tuple[float, ...] = L2
    seed: int = 0

    def __post_init__(self):
        if not self.l2 or not min(self.l2) > 0:
            raise InputError(f"l2 = {self.l2}: expected numbers greater than 0")


def fit_logistic(
    features: np.ndarray, labels: np.ndarray, l2: float, start: np.ndarray
) -> np.ndarray:
    """Minimises mean cross-entropy + l2 / 2 |W|^2 over W.

    Gradients are float32 on the default device; scipy's L-BFGS runs in float64.

    Args:
      features: [N, D].
      labels: [N], 0 to C - 1.
      l2: penalty of all rows of W but the last, the bias.
      start: initial W, [D + 1, C].

    Returns:
      W, [D + 1, C].
    """
    x, y, shape = jnp.asarray(features, jnp.float32), jnp.asarray(labels), start.shape

    def value_and_grad(w: np.ndarray) -> tuple[float, np.ndarray]:
        value, grad = _objective(jnp.asarray(w.reshape(shape), jnp.float32), x, y, l2)
        return float(value), np.asarray(grad, np.float64).ravel()

    options = {"maxiter": ITERATIONS, "maxcor": 20, "gtol": 1e-6, "ftol": 1e-10}
    found = optimize.minimize(
        value_and_grad, start.ravel(), jac=True, method="L-BFGS-B", options=options
    )
    return found.x.reshape(shape)


@jax.jit
@jax.value_and_grad
def _objective(w: jax.Array, x: jax.Array, y: jax.Array, l2: float) -> jax.Array:
    logits = jnp.matmul(x, w[:-1], precision=jax.lax.Precision.HIGHEST) + w[-1]
    losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], axis=1)
    return losses.mean() + l2 / 2 * jnp.sum(w[:-1] ** 2)


def linear_probe(
    train: tuple[np.ndarray, np.ndarray],
    dev: tuple[np.ndarray, np.ndarray],
    test_features: np.ndarray,
    l2: tuple[float, ...],
) -> tuple[np.ndarray, float, float]:
    """Chooses l2 on dev, fits train and dev with it, and predicts the test labels.

    Tries the strongest penalty first and starts each from the previous solution. Ties choose the
    stronger penalty.

    Args:
      train: features [N, D] and labels [N].
      dev: features [N, D] and labels [N].
      test_features: [M, D].
      l2: penalties to try.

    Returns:
      The labels [M], the chosen l2, and its accuracy on dev.
    """
    chosen, best, kept = choose_l2(train, dev, l2)
    both = [np.concatenate([a, b]) for a, b in zip(train, dev, strict=True)]
    _, predict = _fitter(*both, np.unique(both[1]))(chosen, kept)
    return predict(test_features), chosen, best


def accuracy(labels: np.ndarray, predicted: np.ndarray) -> float:
    """The share of predictions that are the labels: [N], [N] -> in [0, 1]."""
    return float(np.mean(predicted == labels))


def choose_l2(
    train: tuple[np.ndarray, np.ndarray],
    dev: tuple[np.ndarray, np.ndarray],
    l2: tuple[float, ...],
    metric: Callable[[np.ndarray, np.ndarray], float] = accuracy,
) -> tuple[float, float, np.ndarray]:
    """Returns the best penalty on dev, its `metric`(labels, predicted) there, and W [D + 1, C].

    Tries and ties are those of `linear_probe`. ValueError for a penalty that isn't
    positive, and for no images.
    """
    if not l2 or min(l2) <= 0:
        raise InputError(f"l2 = {l2}: expected numbers greater than 0")
    if not len(train[1]) or not len(dev[1]):
        raise InputError(
            f"{len(train[1])} images to fit a probe and {len(dev[1])} to choose its l2 on: "
            "expected some of both. Take more images a class, or name a dev_split"
        )
    classes = np.unique(np.concatenate([train[1], dev[1]]))
    best, chosen, kept = -1.0, 0.0, None
    w = np.zeros((train[0].shape[1] + 1, len(classes)))
    fit = _fitter(*train, classes)
    for penalty in sorted(l2, reverse=True):
        w, predict = fit(penalty, w)
        if (found := metric(dev[1], predict(dev[0]))) > best:
            best, chosen, kept = found, penalty, w
    return chosen, best, kept


def _fitter(features: np.ndarray, labels: np.ndarray, classes: np.ndarray) -> Callable:
    """Returns (l2, start) -> (W, predict); standardises all features by the statistics of these."""
    mean, std = features.mean(axis=0), features.std(axis=0) + 1e-5
    x, y = (features - mean) / std, np.searchsorted(classes, labels)

    def fit(l2: float, start: np.ndarray) -> tuple[np.ndarray, Callable]:
        w = fit_logistic(x, y, l2, start)
        return w, lambda f: classes[((f - mean) / std @ w[:-1] + w[-1]).argmax(axis=1)]

    return fit


def probe_head(
    features: np.ndarray, labels: np.ndarray, num_classes: int, l2: tuple[float, ...], seed: int = 0
) -> tuple[np.ndarray, np.ndarray, float]:
    """Fits a head to start fine-tuning with; returns kernel [D, C], bias [C] and the chosen l2.

    Fine-tuning from a random or zero head distorts the features; linear probing first avoids this
    (Kumar et al., arXiv 2202.10054). l2 is chosen on a tenth of each class.
    """
    parts = stratified_split(labels, {"train": 0.9, "dev": 0.1}, seed)
    train, dev = ((features[parts[n]], labels[parts[n]]) for n in ("train", "dev"))
    chosen, _, _ = choose_l2(train, dev, l2)
    return *fit_head(features, labels, num_classes, chosen), chosen


def fit_head(
    features: np.ndarray, labels: np.ndarray, num_classes: int, l2: float
) -> tuple[np.ndarray, np.ndarray]:
    """Fits a head for features as they are, not standardised: kernel [D, C] and bias [C]."""
    mean, std = features.mean(axis=0), features.std(axis=0) + 1e-5
    start = np.zeros((features.shape[1] + 1, num_classes))
    w = fit_logistic((features - mean) / std, labels, l2, start)
    kernel = w[:-1] / std[:, None]
    return kernel.astype(np.float32), (w[-1] - mean @ kernel).astype(np.float32)


def make(
    config: Config, model: Model, mesh: Mesh, objective: Objective | None = None
) -> Callable[[dict], dict[str, float]]:
    """Returns params -> {"accuracy": in [0, 1], "l2": chosen, "dev_accuracy", "examples"}."""
    names = {"train": config.data.split, "test": config.test_split}
    if config.dev_split:
        names["dev"] = config.dev_split
    sources = {
        name: open_single_label(dataclasses.replace(config.data, split=split))
        for name, split in names.items()
    }
    extract = extract_split(sources, config.data, model, mesh, config.batch_size)

    def evaluate(params: dict) -> dict[str, float]:
        train = extract(params, "train")
        if config.dev_split:
            dev = extract(params, "dev")
        else:
            parts = stratified_split(train[1], {"train": 0.9, "dev": 0.1}, config.seed)
            train, dev = (tuple(x[parts[name]] for x in train) for name in ("train", "dev"))
        test_features, test_labels = extract(params, "test")
        predicted, l2, dev_accuracy = linear_probe(train, dev, test_features, config.l2)
        return {
            "accuracy": float(np.mean(predicted == test_labels)),
            "l2": l2,
            "dev_accuracy": dev_accuracy,
            "examples": len(test_labels),
        }

    return evaluate
