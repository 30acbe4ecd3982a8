"""Learning-rate schedules, optimizers and the rules that treat parameters differently.

One update, with gradients g, parameters p and the learning rate lr(t) of a `ScheduleConfig`:

    clip         g <- g * min(1, clip_norm / |g|)         |g| over all trainable parameters
    direction    u <- the optimizer's step for g          the only stage that remembers gradients
    decay        u <- u + decay * p                       decoupled: it isn't in the moments
    multiplier   u <- multiplier * u
    rate, sign   p <- p - lr(t) * u                       t counts the updates before this one

With a width rule, its factors multiply gradients before the clip and u before the decay: see
`width_rule`.

A parameter whose multiplier is 0 is frozen: its gradient enters nothing, not even the norm, so the
compiler can drop it, and the optimizer keeps no state for it.
"""

import dataclasses
import difflib
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vit_jax.config import InputError, unknown
from vit_jax.models.names import HIDDEN_KERNELS, KERNELS, block_number, follows_blocks, is_stacked
from vit_jax.parallel.mesh import path_name
from vit_jax.training.muon import muon
from vit_jax.training.spikes import skip_spikes
from vit_jax.training.width_rule import WIDTH_RULES, WidthFactors, scaled

Schedule = Callable[[jax.typing.ArrayLike], jax.Array]
Rules = tuple[tuple[str, float], ...]

DECAYS = ("constant", "linear", "cosine", "rsqrt", "staircase")
OPTIMIZERS = ("adamw", "sgd", "adafactor", "muon")
WEIGHT_DECAY_CONVENTIONS = ("multiplied", "independent")
MOMENTUM_DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """A learning rate that warms up linearly from 0 to `peak`, then decays.

    Before their `cooldown`, constant and rsqrt don't depend on the run's length. So one run's
    checkpoints can be cooled down after any number of steps ("Scaling Vision Transformers",
    arXiv 2106.04560, section 3.5).

    Raises ValueError for an unknown decay or invalid values.
    """

    peak: float  # the highest learning rate
    warmup: int = 10_000  # steps
    decay: str = "cosine"  # constant | linear | cosine | rsqrt | staircase
    end: float = 0.0  # the final learning rate of linear, cosine and cooldown
    timescale: int = 10_000  # steps, of rsqrt
    cooldown: int = 0  # steps, the last ones; of constant and rsqrt
    drops: tuple[float, ...] = ()  # of staircase: shares of the run at which rates fall to a tenth

    def __post_init__(self) -> None:
        if self.decay not in DECAYS:
            raise unknown("decay", self.decay, DECAYS)
        if self.peak <= 0 or not 0 <= self.end <= self.peak:
            raise InputError(f"peak={self.peak}, end={self.end}: expected 0 <= end <= peak > 0")
        if self.warmup < 0 or self.cooldown < 0 or self.timescale <= 0:
            raise InputError(
                f"warmup={self.warmup}, cooldown={self.cooldown}, timescale={self.timescale}: "
                "expected warmup >= 0, cooldown >= 0 and timescale > 0"
            )
        if self.decay not in ("constant", "rsqrt") and self.cooldown:
            raise InputError(
                f"cooldown={self.cooldown} with decay {self.decay!r}, which decays without one: "
                "use constant or rsqrt, or cooldown=0"
            )
        if bool(self.drops) != (self.decay == "staircase") or not all(
            0 < d < 1 for d in self.drops
        ):
            raise InputError(
                f"drops={self.drops} with decay {self.decay!r}: expected shares of the run between "
                "0 and 1 for staircase, none for the others"
            )
        if self.decay not in ("linear", "cosine") and self.end and not self.cooldown:
            raise InputError(
                f"end={self.end}: decay {self.decay!r} doesn't end there: use linear, cosine or a "
                "cooldown"
            )


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Options of `make_optimizer`; each rule is (regex, value), see `match_rules`.

    Both conventions of weight decay are decoupled (Loshchilov & Hutter, arXiv 1711.05101).
    "multiplied", the ViT paper's, is p -= lr(t) * weight_decay * p; "independent", big_vision's, is
    p -= lr(t) / peak * weight_decay * p. So 0.1 multiplied is 1e-4 independent at a peak of 1e-3.
    In both, a learning-rate multiplier scales the decay too (big_vision's doesn't).

    Raises ValueError for unknown names and for values out of range.
    """

    name: str = "adamw"  # | sgd | adafactor | muon: see `muon`
    b1: float = 0.9  # momentum, of every optimizer
    b2: float = 0.999  # of AdamW's second moment; the upper bound of Adafactor's
    eps: float = 1e-8  # AdamW's
    muon_momentum: float = 0.95  # of Muon's matrices; its AdamW uses b1, b2 and eps
    muon_kernels: str = HIDDEN_KERNELS  # regex of Muon's matrices; the rest use AdamW
    momentum_dtype: str | None = None  # of the momentum in memory; None: the parameter's
    weight_decay: float = 0.0  # by `weight_decay_convention`
    weight_decay_convention: str = "multiplied"  # | independent
    weight_decay_rules: Rules = ((KERNELS, 1.0), (".*", 0.0))  # factors of weight_decay
    lr_multipliers: Rules = ((".*", 1.0),)  # 0 freezes
    layer_decay: float = 1.0  # of the rate, from each block to the one below: see `layer_factors`
    clip_norm: float | None = 1.0  # largest norm of all gradients together
    width_rule: str | None = None  # mup: widths share one learning rate, see `width_rule`
    base_width: int | None = None  # of width_rule: the width at which it changes nothing
    base_heads: int | None = None  # attention heads at that width; None: as many as the model's

    def __post_init__(self) -> None:
        if self.name not in OPTIMIZERS:
            raise unknown("optimizer", self.name, OPTIMIZERS)
        if self.weight_decay_convention not in WEIGHT_DECAY_CONVENTIONS:
            raise unknown(
                "weight_decay_convention", self.weight_decay_convention, WEIGHT_DECAY_CONVENTIONS
            )
        if self.momentum_dtype is not None and self.momentum_dtype not in MOMENTUM_DTYPES:
            raise unknown("momentum_dtype", self.momentum_dtype, MOMENTUM_DTYPES)
        if not (0 <= self.b1 < 1 and 0 <= self.b2 < 1 and self.eps > 0):
            raise InputError(
                f"b1={self.b1}, b2={self.b2}, eps={self.eps}: expected 0 <= b1, b2 < 1 and eps > 0"
            )
        if not 0 <= self.muon_momentum < 1:
            raise InputError(f"muon_momentum={self.muon_momentum}: expected a number in [0, 1)")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise InputError(f"clip_norm={self.clip_norm}: expected more than 0, or None")
        if not 0 < self.layer_decay <= 1:
            raise InputError(f"layer_decay={self.layer_decay}: expected a number in (0, 1]")
        if self.width_rule is not None and self.width_rule not in WIDTH_RULES:
            raise unknown("width_rule", self.width_rule, WIDTH_RULES)
        for name in ("base_width", "base_heads"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)}: expected at least 1")
        if (self.width_rule is None) != (self.base_width is None) or (
            self.base_heads and not self.width_rule
        ):
            raise InputError(
                f"width_rule={self.width_rule!r}, base_width={self.base_width}, "
                f"base_heads={self.base_heads}: a rule needs base_width, the width at which it "
                "changes nothing; without a rule set neither"
            )
        values = [self.weight_decay, *(v for _, v in self.weight_decay_rules + self.lr_multipliers)]
        if min(values) < 0:
            raise InputError(f"weight decay or multiplier {min(values)}: expected 0 or more")


def make_schedule(
    config: ScheduleConfig, steps: int, peak: jax.Array | float | None = None
) -> Schedule:
    """Returns the learning-rate schedule: int32 [] step -> float32 [], jit-compatible.

    As in big_vision (utils.py, create_learning_rate_schedule): 0 at step 0, `peak` at step
    `warmup`, `end` at step `steps`, one after the last update. rsqrt is
    peak / sqrt(1 + (t - warmup) / timescale). A cooldown multiplies the part above `end` by a line
    from 1 to 0. staircase is BiT's (arXiv 1912.11370, section 3.3). `peak` replaces the config's
    and may be traced.

    Raises ValueError if warm-up and cooldown don't fit into `steps`.
    """
    peak = config.peak if peak is None else peak
    end, warmup, cooldown = config.end, config.warmup, config.cooldown
    if steps < 1 or warmup + cooldown > steps:
        raise InputError(
            f"warmup={warmup} and cooldown={cooldown} don't fit into {steps} steps: "
            "shorten them or train for longer"
        )

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        decaying = jnp.maximum(step - warmup, 0)
        progress = jnp.minimum(decaying / max(steps - warmup, 1), 1)
        match config.decay:
            case "constant":
                rate = peak
            case "linear":
                rate = end + (peak - end) * (1 - progress)
            case "cosine":
                rate = end + (peak - end) * (1 + jnp.cos(jnp.pi * progress)) / 2
            case "rsqrt":
                rate = peak / jnp.sqrt(1 + decaying / config.timescale)
            case "staircase":
                rate = peak * 0.1 ** sum(step >= round(drop * steps) for drop in config.drops)
        if cooldown:
            rate = end + (rate - end) * jnp.clip((steps - step) / cooldown, 0, 1)
        if warmup:
            rate = rate * jnp.minimum(step / warmup, 1)
        return jnp.asarray(rate, jnp.float32)

    return schedule


def make_optimizer(
    config: OptimizerConfig,
    schedule: Schedule,
    peak: jax.Array | float,
    params: Any,
    spike_factor: float | None = None,
    width: WidthFactors | None = None,
) -> optax.GradientTransformation:
    """The optimizer of the module's docstring, for parameters with the tree of `params`.

    `params` may hold arrays or shapes; only paths and shapes are read. `peak` is the schedule's.
    In the state's paths the moments stand under their parameter's own: ".../mu/head/kernel". They
    have its shape, except Adafactor's second moment of matrices (v_row, v_col lack one axis; v is
    [1]).
    `spike_factor`: leaves out updates, see `spikes.skip_spikes`. `width`: the factors of the
    config's `width_rule`.

    Raises ValueError if every parameter is frozen, and what `match_rules` and `muon` raise.
    """
    multipliers = match_rules(config.lr_multipliers, params)
    trained = jax.tree.map(bool, multipliers)
    if not any(jax.tree.leaves(trained)):
        raise InputError(f"lr_multipliers={config.lr_multipliers} freeze every parameter")

    if (width is None) != (config.width_rule is None):
        raise ValueError(f"width_rule={config.width_rule!r}: `width` must be its `width_factors`")

    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    direction = optax.masked(optax.chain(clip, _direction(config, params)), trained)
    if width is not None:
        before, after = (
            optax.stateless(lambda updates, _, factors=factors: scaled(updates, factors))
            for factors in (width.gradient, width.update)
        )
        direction = optax.chain(before, direction, after)
    parts = (
        direction,
        _add_weight_decay(config, peak, params),
        optax.stateless(lambda updates, _: jax.tree.map(_multiply, updates, multipliers)),
        _decay_layers(config.layer_decay, params),
    )
    if spike_factor is not None:  # the schedule goes on meanwhile
        parts = (skip_spikes(optax.chain(*parts), spike_factor),)
    return optax.chain(*parts, optax.scale_by_learning_rate(schedule))


def match_rules(rules: Rules, params: Any) -> Any:
    """Returns a tree like `params` with the value of the first rule that matches each parameter.

    A rule is (regex, value). The regex must match a parameter's whole path, such as
    "Transformer/encoderblock_0/MlpBlock_0/Dense_0/kernel".

    Raises ValueError for a parameter without a rule, a rule that isn't a regex, and a rule that
    applies to no parameter (mistyped, or after broader rules). Only ".*" may apply to none.
    """
    try:
        regexes = [re.compile(pattern) for pattern, _ in rules]
    except re.error as error:
        raise InputError(f"rule {error.pattern!r} isn't a regular expression: {error}") from error
    leaves, tree = jax.tree_util.tree_flatten_with_path(params)
    paths = [path_name(keys) for keys, _ in leaves]
    deciding = [
        next((i for i, regex in enumerate(regexes) if regex.fullmatch(path)), None)
        for path in paths
    ]
    if None in deciding:
        path = paths[deciding.index(None)]
        raise InputError(f"no rule matches parameter {path!r}: add one, such as ('.*', value)")
    for i, (pattern, _) in enumerate(rules):
        if i in deciding or pattern == ".*":
            continue
        if not any(map(regexes[i].fullmatch, paths)):
            near = ", ".join(difflib.get_close_matches(pattern, paths, n=3, cutoff=0))
            raise InputError(f"rule {pattern!r} matches no parameter's whole path; nearest: {near}")
        raise InputError(f"rule {rules[i]} decides nothing: move it before the broader rules")
    return tree.unflatten(rules[i][1] for i in deciding)


def layer_factors(decay: float, params: Any) -> Any:
    """Returns the learning rate's factors by depth: a tree of numbers, or arrays [L, 1, ...].

    Block l = 0, ..., L - 1 has decay^(L - l), parameters before the blocks decay^(L + 1), those
    after them 1 (Bao et al., arXiv 2106.08254). Scanned blocks are one tensor and have an array.
    Raises ValueError for a model without blocks.
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(params)
    named = [(path_name(keys), leaf) for keys, leaf in leaves]
    looped = [n + 1 for name, _ in named if (n := block_number(name)) is not None]
    scanned = [leaf.shape[0] for name, leaf in named if is_stacked(name)]
    depth = max((*looped, *scanned), default=0)
    if not depth:
        raise InputError("layer_decay: the model has no Transformer or Mixer blocks, leave it at 1")

    def factor(name: str, leaf: jax.Array) -> float | np.ndarray:
        if (number := block_number(name)) is not None:
            return decay ** (depth - number)
        if is_stacked(name):
            rates = decay ** np.arange(depth, depth - leaf.shape[0], -1, dtype=np.float32)
            return rates.reshape(-1, *[1] * (leaf.ndim - 1))
        return 1.0 if follows_blocks(name) else decay ** (depth + 1)

    return tree.unflatten([factor(name, leaf) for name, leaf in named])


def _decay_layers(decay: float, params: Any) -> optax.GradientTransformation:
    if decay == 1:
        return optax.identity()
    factors = layer_factors(decay, params)
    return optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, factors))


def _direction(config: OptimizerConfig, params: Any) -> optax.GradientTransformation:
    adam = optax.scale_by_adam(config.b1, config.b2, config.eps, mu_dtype=config.momentum_dtype)
    match config.name:
        case "adamw":
            return adam
        case "muon":
            return muon(
                config.muon_kernels, config.muon_momentum, config.momentum_dtype, adam, params
            )
        case "sgd":
            return optax.trace(config.b1, accumulator_dtype=config.momentum_dtype)
        case "adafactor":
            return _adafactor(config)


def _adafactor(config: OptimizerConfig) -> optax.GradientTransformation:
    """Adafactor as in "Scaling Vision Transformers", section 3.4, and big_vision's optax.py.

    It keeps the factored second moment of Shazeer & Stern (arXiv 1804.04235) with
    beta2_t = 1 - t^-0.8, bounded by b2. It has no update clipping and no scaling by the parameters'
    size. The momentum averages the directions, without bias correction.
    """

    def b2(count: jax.Array, exponent: float) -> jax.Array:
        return jnp.minimum(config.b2, 1 - (count + 1.0) ** -exponent)

    # Scanning 32 or more layers stacks biases into matrices of this size, which are factored too.
    second_moment = optax.scale_by_factored_rms(min_dim_size_to_factor=32, decay_rate_fn=b2)
    momentum = optax.ema(config.b1, debias=False, accumulator_dtype=config.momentum_dtype)
    return optax.chain(second_moment, momentum)


def _add_weight_decay(
    config: OptimizerConfig, peak: jax.Array | float, params: Any
) -> optax.GradientTransformation:
    if not config.weight_decay:
        return optax.identity()
    factors = match_rules(config.weight_decay_rules, params)
    independent = config.weight_decay_convention == "independent"
    decay = config.weight_decay / (peak if independent else 1)

    def add(u: jax.Array, p: jax.Array, factor: float) -> jax.Array:
        return u + decay * factor * p if factor else u

    return optax.stateless(lambda updates, params: jax.tree.map(add, updates, params, factors))


def _multiply(update: jax.Array, multiplier: float) -> jax.Array:
    # 0 * update would compute a frozen parameter's gradient and propagate its NaN.
    return multiplier * update if multiplier else jnp.zeros_like(update)
