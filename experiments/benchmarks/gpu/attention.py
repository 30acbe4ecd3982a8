"""Measures implementations of attention by number of tokens, forward and backward.

- xla: plain attention, as the models compute it: the scores are in memory.
- cudnn: NVIDIA's kernel as the models use it, with odd lengths padded by a masked token.
- unpadded: the same for odd lengths, without jax's check (jax 0.10 to 0.11), which is meant for
  attention with a bias and refuses them without one, too: what the padding costs.
- triton: the Pallas kernel that jax ships for GPUs, with lengths padded to its blocks.
- mosaic: jax's newer Pallas kernel for Hopper, which has no mask: whole blocks only. Its backward
  pass accepts only float16 (jax 0.11.2).

Each is compared with plain attention in float32. The models can use the first two; the others
say what could be gained.
"""

import math
import statistics
import time
from collections.abc import Callable
from unittest import mock

import jax
import jax.numpy as jnp

from experiments.benchmarks.gpu.bench import Bench
from vit_jax.models.attention import attention_weights, even_attention
from vit_jax.parallel.mesh import platform

SELF = "experiments.benchmarks.gpu.attention:Attention"
BLOCK = 64  # of the Pallas kernels
# Images, tokens, heads, features of a head: B/16 with and without a class token, at 224, 256, 384
# and 512 pixels; H/14 and g/14.
SHAPES = (
    *((256, tokens, 12, 64) for tokens in (196, 197, 256)),
    *((64, tokens, 12, 64) for tokens in (577, 1025)),
    *((128, 257, 16, features) for features in (80, 88)),
)
REHEARSAL = ((2, 5, 2, 8), (2, 64, 2, 8))
SECONDS = 4  # of one measurement


def plain(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Computes attention as `models.transformer` does with attention = "xla"; all [B, N, H, K]."""
    weights, total = attention_weights(query, key)
    y = jnp.einsum("bhnm,bmhk->bhnk", weights.astype(value.dtype), value) / total
    return y.astype(value.dtype).swapaxes(1, 2)


def cudnn(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """As `models.attention.flash_attention` with "cudnn"."""
    return even_attention(query, key, value, "cudnn")


def unpadded(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """As `cudnn`, for any number of tokens."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    with mock.patch.object(fused, "check_is_flash_attention", lambda *_, **__: None):
        return jax.nn.dot_product_attention(query, key, value, implementation="cudnn")


def triton(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Runs jax's Triton kernel; padding is a segment of its own."""
    from jax.experimental.pallas.ops.gpu.attention import BlockSizes, mha

    batch, tokens, _, features = query.shape
    padding = -tokens % BLOCK
    padded = (jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) for x in (query, key, value))
    segments = jnp.broadcast_to(jnp.arange(tokens + padding) >= tokens, (batch, tokens + padding))
    blocks = BlockSizes(BLOCK, BLOCK, *[BLOCK // 2] * 4)
    interpret = platform() == "cpu"
    y = mha(
        *padded,
        segments.astype(jnp.int32) if padding else None,
        sm_scale=features**-0.5,
        block_sizes=blocks,
        interpret=interpret,
    )
    return y[:, :tokens]


def mosaic(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Runs jax's Mosaic GPU kernel, which takes scaled queries."""
    from jax.experimental.pallas.ops.gpu.attention_mgpu import TuningConfig, attention

    config = TuningConfig(BLOCK, BLOCK, 2, True, False, 1, *[BLOCK] * 4)
    return attention(query * query.shape[-1] ** -0.5, key, value, config)


IMPLEMENTATIONS = {
    "xla": plain,
    "cudnn": cudnn,
    "unpadded": unpadded,
    "triton": triton,
    "mosaic": mosaic,
}


def serves(implementation: str, tokens: int, features: int) -> bool:
    """Whether an implementation is worth measuring for this shape."""
    if implementation == "unpadded":
        return tokens % 2 == 1
    return implementation != "mosaic" or not (tokens % BLOCK or features % BLOCK)


class Attention:
    """Times implementations on random arrays of 16 bits."""

    def time(
        self, implementation: str, shape: tuple[int, int, int, int], seconds: float
    ) -> dict[str, float]:
        """Times the forward pass alone, and with the backward pass.

        Args:
          implementation: of `IMPLEMENTATIONS`.
          shape: [B, N, H, K].
          seconds: of each timing.

        Returns seconds a call; TFLOP/s of 2 products forward and 5 backward; the relative error of
        the output and of the gradients: norm of the difference over the norm.
        """
        function = IMPLEMENTATIONS[implementation]
        keys = jax.random.split(jax.random.key(0), 4)
        dtype = jnp.float16 if implementation == "mosaic" else jnp.bfloat16
        arrays = [jax.random.normal(key, shape, dtype) for key in keys]
        forward, both = jax.jit(function), jax.jit(with_gradients(function))
        found = {"forward_seconds": time_calls(forward, arrays[:3], seconds)}
        found["both_seconds"] = time_calls(both, arrays, seconds)
        batch, tokens, heads, features = shape
        product = 2 * batch * heads * tokens**2 * features
        found["forward_tflops"] = 2 * product / found["forward_seconds"] / 1e12
        found["both_tflops"] = 7 * product / found["both_seconds"] / 1e12
        few = [array[:2].astype(jnp.float32) for array in arrays]
        with jax.default_matmul_precision("highest"):
            exact = jax.jit(with_gradients(plain))(*few)
        ours = both(*arrays)
        for name, ours_, exact_ in zip(("error", "gradients_error"), ours, exact, strict=True):
            found[name] = _difference(ours_, exact_)
        return found


def with_gradients(function: Callable) -> Callable:
    """Returns a function (query, key, value, dy) -> (y, gradients of the three)."""

    def both(query, key, value, dy):
        y, backward = jax.vjp(function, query, key, value)
        return y, backward(dy)

    return both


def time_calls(function: Callable, arrays: list[jax.Array], seconds: float) -> float:
    """Returns the median of windows of calls, in seconds a call."""
    jax.block_until_ready(function(*arrays))
    began = time.perf_counter()
    jax.block_until_ready(function(*arrays))
    calls = max(3, math.ceil(seconds / 5 / (time.perf_counter() - began)))
    windows = []
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(calls):
            last = function(*arrays)
        jax.block_until_ready(last)
        windows.append((time.perf_counter() - began) / calls)
    return statistics.median(windows)


def _difference(found, exact) -> float:
    """Relative difference of trees of arrays, of which `exact` has the first rows."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True)
    pairs = [(a[: len(b)].astype(jnp.float32), b) for a, b in pairs]
    return float(max(jnp.linalg.norm(a - b) / jnp.linalg.norm(b) for a, b in pairs))


def name(implementation: str, shape: tuple[int, int, int, int]) -> str:
    """The key in the results."""
    return f"attention {implementation} {shape[1]} tokens {shape[3]} features"


def measure(bench: Bench) -> None:
    """Measures all implementations at all shapes."""
    shapes = REHEARSAL if bench.rehearsal else SHAPES
    cases = [
        (way, shape)
        for shape in shapes
        for way in IMPLEMENTATIONS
        if serves(way, shape[1], shape[3])
    ]
    if all(bench.has(name(*case)) for case in cases):
        return
    with bench.worker(SELF) as worker:

        def time_one(way: str, shape: tuple[int, int, int, int]) -> dict:
            worker.start(bench.patience(30))  # again, if the last one ended it
            case = {"implementation": way, "shape": shape}
            seconds = 0.01 if bench.rehearsal else 0.3
            found = worker.call(bench.patience(5 * SECONDS), "time", seconds=seconds, **case)
            return {**case, **found}

        for case in cases:
            bench.measure(name(*case), lambda case=case: time_one(*case), SECONDS)
