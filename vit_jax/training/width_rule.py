"""The width rule "mup": initial scales and learning rates that let widths share one learning rate.

Maximal update parametrisation (Yang et al., "Tensor Programs V", arXiv 2203.03466, Table 8). The
rule compares a model with its base: the same model at another width. At the base's width nothing
changes. A learning rate that is tuned at one width is then near the best one at another.

A parameter has a fan-in and a fan-out; m_in and m_out are their ratios to the base's. Sizes that
don't grow with the width (pixels, classes, a hybrid's stem) have the ratio 1, and so has the fan-in
of biases, norms, positions and tokens. With Table 8's output multiplier folded in, it reads:

    update, Adam and Adafactor    u <- u / m_in
    update, SGD                   u <- u * m_out / m_in
    update, Muon's matrices       u <- u * sqrt(m_out / m_in / m_max), m_max of the longer side
    initial value, hidden         as without the rule: the variance falls with the fan-in already
    initial value, output         w <- w / sqrt(m_in): fan-out ratio 1 (heads, which start at zero)

Muon's form keeps the ratio of an update's spectral norm to sqrt(fan-out / fan-in) (arXiv
2310.17813, condition 1). Muon's own scale grows with the square root of the longer side.

Attention's scale is 1/K instead of 1/sqrt(K) for heads of width K. The model isn't changed for it:
with c = sqrt(K_base / K), the scores of the rule are

    sqrt(K_base) / K * (x W + b) . k = (x W' + b') . k / sqrt(K),    W' = c W, b' = c b

and the model has W' and b' as its query: their initial values and updates are multiplied by
c, SGD's updates by c^2, because its gradient has a factor c, too. With `qk_norm` the query norm's
scale takes the factor instead. A checkpoint therefore holds an ordinary ViT: fine-tuning,
conversion and other programs need to know nothing of the rule.

Gradients are multiplied by the square root of SGD's factor before they are clipped, and SGD's
updates once more afterwards. This makes the norm that is clipped comparable over widths; it is that
of the gradient of w / sqrt(factor). Weight decay has no factor: a step takes lr(t) * decay of a
parameter at any width (arXiv 2405.13698).
"""

import dataclasses
import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vit_jax.config import InputError
from vit_jax.models.names import ATTENTION, KERNELS, PROBE
from vit_jax.models.variants import Model, build_model
from vit_jax.models.vit import ViT
from vit_jax.parallel.mesh import path_name
from vit_jax.training.muon import matrix_shape

WIDTH_RULES = ("mup",)
QUERY, QUERY_NORM = rf"(.*/)?{ATTENTION}/query/.*", rf"(.*/)?{ATTENTION}/query_norm/.*"


class WidthFactors(NamedTuple):
    """Trees of numbers with the structure of the parameters, to multiply by."""

    initial: Any
    gradient: Any  # before the gradients are clipped
    update: Any  # after the optimizer's direction, before weight decay


def scaled(tree: Any, factors: Any) -> Any:
    """Multiplies the leaves of a tree; a factor of 1 leaves no trace in the program."""
    return jax.tree.map(
        lambda x, factor: x if factor == 1 else x * jnp.float32(factor), tree, factors
    )


def width_factors(
    optimizer: str, base_width: int, base_heads: int | None, model: Model, muon_kernels: str = ""
) -> WidthFactors:
    """Returns the rule's factors for a model.

    Args:
      optimizer: a name of `optimizer.OPTIMIZERS`.
      base_width: the width at which the rule changes nothing.
      base_heads: attention heads of the base; None: the model's number, so that heads grow.
      model: a ViT or a hybrid.
      muon_kernels: regex of the matrices that Muon orthogonalises.

    Raises:
      ValueError: the model's family has no form of the rule, or there is no such base.
    """
    base = base_model(model, base_width, base_heads)
    sizes = (jax.eval_shape(m.init, jax.random.key(0)) for m in (model, base))
    (leaves, tree), (bases, _) = map(jax.tree_util.tree_flatten_with_path, sizes)
    head_width, base_head_width = (m.config.width / m.config.num_heads for m in (model, base))
    attention_scale = math.sqrt(base_head_width / head_width)
    rows = []
    for (path, leaf), (_, base_leaf) in zip(leaves, bases, strict=True):
        name = path_name(path)
        fan_in, fan_out, longer = _ratios(name, leaf.shape, base_leaf.shape)
        scales_scores = re.fullmatch(QUERY_NORM if model.config.qk_norm else QUERY, name)
        c = attention_scale if scales_scores else 1.0
        sgd = c * math.sqrt(fan_out / fan_in)
        update = sgd if optimizer == "sgd" else c / fan_in
        if optimizer == "muon" and re.fullmatch(muon_kernels, name):
            update = sgd / math.sqrt(longer)
        rows.append((c * _initial(name, fan_in, fan_out), sgd, update))
    return WidthFactors(*(tree.unflatten(column) for column in zip(*rows, strict=True)))


def base_model(model: Model, width: int, heads: int | None) -> Model:
    """Builds the same model at another width, with its MLP and `pre_logits` in proportion."""
    config = model.config
    if not isinstance(model.module, ViT):
        raise InputError(
            f"width_rule: {config.variant} has no rule, only ViTs and hybrids do: set "
            "optimizer.width_rule=None"
        )
    heads = config.num_heads if heads is None else heads
    if width % heads:
        raise InputError(
            f"optimizer.base_width = {width} does not divide into the base's {heads} heads: use a "
            f"multiple of {heads}, or set optimizer.base_heads to a number that divides it"
        )
    fields = {"width": width, "num_heads": heads, "attention": "auto"}
    fields["mlp_dim"] = max(1, round(config.mlp_dim * width / config.width))
    if config.representation_size == config.width:
        fields["representation_size"] = width
    try:
        base = dataclasses.replace(config, **fields)
        return build_model(base, model.num_classes, model.image_size)
    except InputError as error:
        raise InputError(f"optimizer.base_width = {width} makes no base: {error}") from error


def _ratios(name: str, shape: tuple[int, ...], base: tuple[int, ...]) -> tuple[float, float, float]:
    """Returns the ratios to the base's fan-in, fan-out and longer of the two."""
    if not re.fullmatch(KERNELS, name):
        ratio = math.prod(shape) / math.prod(base)
        return 1.0, ratio, ratio
    (_, *sides), (_, *base_sides) = matrix_shape(name, shape), matrix_shape(name, base)
    fan_in, fan_out = (side / of for side, of in zip(sides, base_sides, strict=True))
    return fan_in, fan_out, max(sides) / max(base_sides)


def _initial(name: str, fan_in: float, fan_out: float) -> float:
    if name == PROBE:  # Xavier's variance falls with the width, a token's must not
        return math.sqrt(fan_out)
    return 1 / math.sqrt(fan_in) if fan_out == 1 else 1.0
