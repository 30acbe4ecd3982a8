"""Attention as one fused TPU kernel per pass: the N x N scores never leave VMEM.

The formulas are FlashAttention's (arXiv 2205.14135) without its loop over keys: all keys fit in
VMEM. `flash_plan` chooses the blocks. A grid step processes whole images and whole groups of heads;
long sequences are processed in chunks of queries.

- Packing: a register has 128 lanes, so several heads lie side by side in a group, as the
  projections write them. A product for one head zeroes the other heads' lanes in one factor. This
  costs nothing, because the matrix units are 128 wide.
- Denominators: the lanes of the other heads' values are set to one, so the product of weights and
  values also sums the weights.
- Heads that don't pack, such as ViT-H's 80 features, are groups of one. Where VMEM can't hold all
  of an image's heads, they are padded to 128 lanes, which takes a copy in HBM.
- The forward pass keeps log2 of the softmax's denominator (`lse`). The backward pass recomputes the
  weights from it, transposed to [M, N]: values per query lie along the lanes, and sums over keys
  run over whole registers.

Letters in shapes: B images, N queries, M keys (mostly the same tokens), H heads, K features of a
head.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from vit_jax.models.flash_plan import LANES, Plan

_NEVER = -1e30  # the score of padding; finite, because minus infinity could give nan


def flash_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    biases: Sequence[jax.Array] | None = None,
    *,
    head_dim: int,
    interpret: bool = False,
) -> jax.Array:
    """Computes softmax(q k / sqrt(K)) v; sums and softmax are float32.

    Args:
        query: [B, N, H K].
        key: [B, M, H K], M at most `flash_plan.MAX_TOKENS`.
        value: [B, M, H K].
        biases: three float32 [B, 1, H K], added to query, key and value. The kernel computes their
            gradients, which are sums over tokens.
        head_dim: K.
        interpret: runs the kernel in Pallas' interpreter, slowly, for devices other than TPUs.

    Returns:
        [B, N, H K] in the dtype of `query`.
    """
    batch, queries, features = query.shape
    tokens, heads = key.shape[1], features // head_dim
    query = jnp.pad(query, ((0, 0), (0, max(0, 16 - queries)), (0, 0)))  # to whole registers
    plan = Plan(
        queries=query.shape[1],
        tokens=tokens,
        heads=heads,
        head_dim=head_dim,
        scale=head_dim**-0.5,
        itemsize=query.dtype.itemsize,
        interpret=interpret,
    )
    if not plan.fits:
        plan = dataclasses.replace(plan, head_dim=LANES)

    def widen(x):  # [B, ..., H K] -> [B, ..., H 128]
        x = x.reshape(*x.shape[:2], heads, head_dim)
        x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, plan.head_dim - head_dim)))
        return x.reshape(*x.shape[:2], -1)

    if biases is None:
        biases = [jnp.zeros((batch, 1, features), jnp.float32)] * 3
    y = _attention(plan, *map(widen, (query, key, value)), tuple(map(widen, biases)))
    y = y.reshape(batch, -1, heads, plan.head_dim)[:, :queries, :, :head_dim]
    return y.reshape(batch, queries, features)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(plan, query, key, value, biases):
    return _attention_forward(plan, query, key, value, biases)[0]


def _attention_forward(plan, query, key, value, biases):
    # Outside the kernel, because XLA fuses the sum into the projection. Named for `jax.checkpoint`.
    qkv = [
        checkpoint_name(x + b.astype(x.dtype), "qkv")
        for x, b in zip((query, key, value), biases, strict=True)
    ]
    y, lse = _forward(plan, *qkv)
    return y, (*qkv, lse)


def _attention_backward(plan, residuals, dy):
    dq, dk, dv, *biases = _backward(plan, *residuals, dy)
    return dq, dk, dv, tuple(biases)


_attention.defvjp(_attention_forward, _attention_backward)


def _forward(plan: Plan, query, key, value):
    """Returns the output, like query, and lse [B, H, chunks, chunk]."""
    call = _Call(plan, query, most=8, arrays=4)
    inputs = [call.queries, call.tokens, call.tokens]
    scratch = [pltpu.VMEM((plan.chunk, LANES), jnp.float32)] * 2
    kernel = call(_forward_kernel, 2, inputs, [call.queries, call.lse], scratch)
    return kernel(query, key, value)


def _backward(plan: Plan, query, key, value, lse, dy):
    """Returns the gradients of query, key and value, and their sums over tokens, [B, 1, H K]."""
    call = _Call(plan, query, most=4, arrays=7)
    qkv = [call.queries, call.tokens, call.tokens]
    inputs = [*qkv, call.queries, call.lse]
    kernel = call(_backward_kernel, 5, inputs, qkv + [call.sums] * 3)
    return kernel(query, key, value, dy, lse)


class _Call:
    """A `pallas_call` over images and groups of heads, with the block of each array."""

    def __init__(self, plan: Plan, query: jax.Array, most: int, arrays: int):
        batch, _, features = query.shape
        groups = plan.groups_per_step(most, arrays)
        images, lse = plan.images_per_step(batch, groups, arrays), (plan.chunks, plan.chunk)
        self.plan, self.images, self.groups = plan, images, groups
        self.grid = (batch // images, plan.groups // groups)
        self.queries, self.tokens = (
            (
                pl.BlockSpec((images, block, groups * plan.width), lambda i, g: (i, 0, g)),
                jax.ShapeDtypeStruct((batch, rows, features), query.dtype),
            )
            for block, rows in ((plan.chunks * plan.chunk, plan.queries), (plan.rows, plan.tokens))
        )
        self.lse = (
            pl.BlockSpec((images, groups * plan.packed, *lse), lambda i, g: (i, g, 0, 0)),
            jax.ShapeDtypeStruct((batch, plan.heads, *lse), jnp.float32),
        )
        self.sums = (
            pl.BlockSpec((images, 1, groups * plan.width), lambda i, g: (i, 0, g)),
            jax.ShapeDtypeStruct((batch, 1, features), jnp.float32),
        )

    def __call__(
        self, kernel: Callable, products: int, inputs: list, outputs: list, scratch=()
    ) -> Callable:
        """Returns the compiled kernel's function.

        `products`: matrix products of size N x M x K per head, for the cost estimate.
        """

        def step(*refs):
            # Unrolled for a few groups, so that the compiler overlaps their latencies.
            unroll = (12 if products == 2 else 4) // self.groups
            for_each(self.images, lambda i: kernel(self.plan, self.groups, i, *refs), unroll)

        plan = self.plan
        scores = self.images * self.grid[0] * plan.heads * plan.queries * plan.tokens
        cost = pl.CostEstimate(
            flops=2 * products * scores * plan.head_dim,
            bytes_accessed=sum(s.size * s.dtype.itemsize for _, s in inputs + outputs),
            transcendentals=scores,
        )
        return pl.pallas_call(
            step,
            grid=self.grid,
            in_specs=[spec for spec, _ in inputs],
            out_specs=[spec for spec, _ in outputs],
            out_shape=[shape for _, shape in outputs],
            scratch_shapes=scratch,
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
            cost_estimate=cost,
            interpret=plan.interpret,
            name=kernel.__name__.strip("_").replace("kernel", "attention"),
        )


def for_each(count: int, body: Callable[[Any], None], unroll: int = 1) -> None:
    """Runs body(0), ..., body(count - 1) in a loop with up to `unroll` calls per iteration."""
    unroll = max(n for n in range(1, max(unroll, 1) + 1) if count % n == 0)

    def turn(i, _):
        for j in range(unroll):
            body(i * unroll + j)

    if count == unroll:
        turn(0, None)
    else:
        jax.lax.fori_loop(0, count // unroll, turn, None)


def _own_lanes(plan: Plan, j: int) -> jax.Array:
    """Returns a mask [1, 128]: the lanes of head `j` of a group."""
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
    return (lane >= j * plan.head_dim) & (lane < (j + 1) * plan.head_dim)


def _select(plan: Plan, parts: list[jax.Array], shift: int = 0) -> jax.Array:
    """Merges one [..., 128] per head: the lanes of head `j + shift` come from `parts[j]`."""
    whole = parts[0]
    for j in range(1, plan.packed):
        whole = jnp.where(_own_lanes(plan, (j + shift) % plan.packed), parts[j], whole)
    return whole


def _only(plan: Plan, j: int, x: jax.Array) -> jax.Array:
    """Zeroes the lanes of x [rows, 128] outside head `j`."""
    if plan.packed == 1:
        return x
    # A bit mask, because some chips can't select bfloat16 values.
    keep = jnp.where(_own_lanes(plan, j), -1, 0)
    return pltpu.bitcast(pltpu.bitcast(x, jnp.int32) & keep, x.dtype)


def _zero_from(start: int | jax.Array, x: jax.Array, least: int = 0) -> jax.Array:
    """Zeroes the rows of x [rows, ...] from `start` on, where `start` >= `least`."""
    least = min(least // 16 * 16, x.shape[0])  # rows that are certainly kept: no work
    rest = x[least:]
    if not rest.shape[0] or (isinstance(start, int) and start >= x.shape[0]):
        return x
    row = least + jax.lax.broadcasted_iota(jnp.int32, (rest.shape[0], 1), 0)
    rest = jnp.where(row < start, rest, jnp.zeros_like(rest))
    return jnp.concatenate([x[:least], rest], axis=0) if least else rest


def _multiply(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Contracts axis `contract[0]` of a with axis `contract[1]` of b; accumulates in float32."""
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def _forward_kernel(
    plan: Plan, groups: int, image, q_ref, k_ref, v_ref, y_ref, lse_ref, top_ref, sum_ref
):
    attended = jax.lax.broadcasted_iota(jnp.int32, (1, plan.rows), 1) < plan.tokens  # [1, M]

    def chunk(c):
        queries = pl.ds(c * plan.chunk, plan.chunk)
        lane_of = {}  # head -> its lane in top_ref and sum_ref
        for g in range(groups):
            lanes = slice(g * plan.width, (g + 1) * plan.width)
            q, k = q_ref[image, queries, lanes], k_ref[image, :, lanes]
            # Rows past the tokens are undefined, and nan times 0 is nan.
            v = _zero_from(plan.tokens, v_ref[image, :, lanes], plan.tokens)
            products = []
            for j in range(plan.packed):
                own = _own_lanes(plan, j)
                scores = _multiply(_only(plan, j, q), k, (1, 1))  # [N, M]
                scores = jnp.where(attended, scores * plan.base_2, _NEVER)
                top = scores.max(axis=1, keepdims=True)
                weights = jnp.exp2(scores - top).astype(v.dtype)
                with_ones = v if plan.packed == 1 else jnp.where(own, v, 1)
                # [N, 128]: the outputs in the head's own lanes, the sum of weights in the others.
                products.append(_multiply(weights, with_ones, (1, 0)))
                at = (j + 1) % plan.packed * plan.head_dim + g
                lane_of[g * plan.packed + j] = at
                if plan.packed > 1:
                    total = products[j][:, at : at + 1]
                else:
                    total = weights.astype(jnp.float32).sum(axis=1, keepdims=True)
                top_ref[:, at : at + 1], sum_ref[:, at : at + 1] = top, total
            if plan.packed > 1:  # a head's sums are in the next head's lanes
                total = pltpu.roll(_select(plan, products, 1), LANES - plan.head_dim, 1)
            inverse = pl.reciprocal(total, approx=y_ref.dtype == jnp.bfloat16)
            inverse *= 2.0 - total * inverse  # one Newton step
            y_ref[image, queries, lanes] = (_select(plan, products) * inverse).astype(y_ref.dtype)
        lse = (top_ref[...] + jnp.log2(sum_ref[...])).T
        for head, at in lane_of.items():
            lse_ref[image, head, pl.ds(c, 1), :] = lse[at : at + 1]

    for_each(plan.chunks, chunk)


def _backward_kernel(
    plan: Plan, groups: int, image, q_ref, k_ref, v_ref, dy_ref, lse_ref,
    dq_ref, dk_ref, dv_ref, dq_sum_ref, dk_sum_ref, dv_sum_ref,
):  # fmt: skip
    for g in range(groups):
        lanes = slice(g * plan.width, (g + 1) * plan.width)
        k, v = (
            _zero_from(plan.tokens, ref[image, :, lanes], plan.tokens) for ref in (k_ref, v_ref)
        )

        def chunk(c, g=g, lanes=lanes, k=k, v=v):
            queries = pl.ds(c * plan.chunk, plan.chunk)
            left = plan.queries - c * plan.chunk
            least = plan.queries - (plan.chunks - 1) * plan.chunk
            q, dy = (_zero_from(left, ref[image, queries, lanes], least) for ref in (q_ref, dy_ref))
            column = jax.lax.broadcasted_iota(jnp.int32, (1, plan.chunk), 1)
            dq, dk, dv = [], [], []
            for j in range(plan.packed):
                lse = lse_ref[image, g * plan.packed + j, pl.ds(c, 1), :]
                lse = jnp.where(column < left, lse, -_NEVER)
                scores = _multiply(_only(plan, j, k), q, (1, 1)) * plan.base_2  # [M, N]
                weights = jnp.exp2(scores - lse)
                weights = _zero_from(plan.tokens, weights, plan.tokens)
                d_weights = _multiply(_only(plan, j, v), dy, (1, 1))
                dv.append(_multiply(weights.astype(dy.dtype), dy, (1, 0)))
                d_sum = (weights * d_weights).sum(axis=0, keepdims=True)
                d_scores = (weights * (d_weights - d_sum)).astype(q.dtype)
                dk.append(_multiply(d_scores, q, (1, 0)))
                dq.append(_multiply(d_scores, k, (0, 0)))
            dq = _select(plan, dq) * plan.scale
            dq_ref[image, queries, lanes] = dq.astype(dq_ref.dtype)
            return dq.sum(axis=0, keepdims=True), _select(plan, dk), _select(plan, dv)

        if plan.chunks == 1:
            dq_sum, dk, dv = chunk(0)
        else:
            zeros = jnp.zeros((plan.rows, plan.width), jnp.float32)
            dq_sum, dk, dv = jax.lax.fori_loop(
                0,
                plan.chunks,
                lambda c, sums, chunk=chunk: jax.tree.map(jnp.add, sums, chunk(c)),
                (zeros[:1], zeros, zeros),
            )
        dk *= plan.scale
        dq_sum_ref[image, :, lanes] = dq_sum
        dk_sum_ref[image, :, lanes] = dk.sum(axis=0, keepdims=True)
        dv_sum_ref[image, :, lanes] = dv.sum(axis=0, keepdims=True)
        dk_ref[image, :, lanes] = dk.astype(dk_ref.dtype)
        dv_ref[image, :, lanes] = dv.astype(dv_ref.dtype)
