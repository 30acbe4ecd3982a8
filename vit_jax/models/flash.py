"""Attention as one TPU kernel a pass, for sequences of images: nothing of size N x N leaves VMEM.

A step of the grid computes some images and some heads whole. A vector register has 128 lanes, more
than most heads have features, so `packed` heads lie side by side in a group of lanes as the
projections leave them, and a head's share of a product is had by zeroing the others' lanes in one
of its factors, which costs the matrix units nothing: they are 128 wide anyhow. Multiplied with the
weights, lanes of ones in the place of the others' values give the softmax's denominator.
Heads that fill no register, as ViT-H's 80 features, are groups of one, moved to a register's lanes
by the load; they are padded, which sends them through HBM, where VMEM can't hold all of an image's.

Forward keeps log2 of the softmax's denominator (`lse`); backward computes weights from it again,
transposed, [M, N]: what belongs to a query then lies along the lanes, and sums over keys run over
whole registers. The formulas are FlashAttention's (arXiv 2205.14135), its loop over keys is not
needed: all of them fit. Queries are cut into chunks where their scores would be large.

Letters in shapes: B images, N queries, M keys, mostly the same tokens, H heads, K head's width.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
MAX_TOKENS = 2048
MAX_CHUNK = 320  # queries whose scores are in VMEM at once
MAX_BYTES = 6 * 2**20  # of VMEM, for what a step of the grid reads and writes, if it has a choice
_NEVER = -1e30  # a score; minus infinity would make nan of rows that are masked as a whole


@dataclasses.dataclass(frozen=True)
class _Plan:
    """How the work is cut: queries into `chunks` of `chunk`. `rows` are M, filled up."""

    queries: int
    tokens: int
    heads: int
    head_dim: int
    scale: float
    itemsize: int
    masked: bool
    interpret: bool

    @property
    def packed(self) -> int:
        packed = LANES // self.head_dim
        return 1 if LANES % self.head_dim or self.heads % packed else packed

    @property
    def width(self) -> int:
        """Lanes of a group."""
        return self.packed * self.head_dim

    @property
    def groups(self) -> int:
        return self.heads // self.packed

    @property
    def chunks(self) -> int:
        chunks = 1
        while (size := -(-self.queries // chunks)) > MAX_CHUNK or size * self.tokens > 2**18:
            chunks += 1
        return chunks

    @property
    def chunk(self) -> int:
        return -(-self.queries // (16 * self.chunks)) * 16

    @property
    def rows(self) -> int:
        return -(-self.tokens // 16) * 16

    @property
    def base_2(self) -> float:  # softmax's e^(scale s) is 2^(base_2 s)
        return self.scale * math.log2(math.e)

    def at_once(self, most: int, arrays: int) -> int:
        """Groups of heads in a step of the grid: about `most`, and whole registers or all."""
        whole = math.lcm(self.width, LANES) // self.width
        if self.groups % whole:
            return self.groups
        while most > whole and self.bytes(most, arrays) > MAX_BYTES:
            most -= 1
        return max(n for n in range(whole, max(most, whole) + 1, whole) if self.groups % n == 0)

    def bytes(self, groups: int, arrays: int) -> int:
        """Of VMEM, double-buffered, for an image's `arrays` like query in a step of the grid."""
        rows = max(self.rows, self.chunks * self.chunk)
        return 2 * arrays * rows * groups * self.width * self.itemsize

    def images(self, batch: int, groups: int, arrays: int) -> int:
        """Images in a step of the grid."""
        most = max(1, min(8, MAX_BYTES // self.bytes(groups, arrays)))
        return max(n for n in range(1, most + 1) if batch % n == 0)

    def own_lanes(self, j: int) -> jax.Array:
        """[1, 128]: the lanes of head `j` of a group."""
        lane = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
        return (lane >= j * self.head_dim) & (lane < (j + 1) * self.head_dim)

    def select(self, parts: list[jax.Array], shift: int = 0) -> jax.Array:
        """Of [..., 128] a head, each head's own lanes, or those of the head `shift` after it."""
        whole = parts[0]
        for j in range(1, self.packed):
            whole = jnp.where(self.own_lanes((j + shift) % self.packed), parts[j], whole)
        return whole

    def only(self, j: int, x: jax.Array) -> jax.Array:
        """x [rows, 128], zero but for the lanes of head `j`."""
        if self.packed == 1:
            return x
        keep = jnp.where(self.own_lanes(j), -1, 0)  # bits: not every chip selects among bfloat16
        return pltpu.bitcast(pltpu.bitcast(x, jnp.int32) & keep, x.dtype)


def flash_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    biases: Sequence[jax.Array] | None = None,
    mask: jax.Array | None = None,
    *,
    head_dim: int,
    interpret: bool = False,
) -> jax.Array:
    """softmax(q k / sqrt(K)) v: [B, N, H K], [B, M, H K] twice -> [B, N, H K].

    `biases`, float32 [B, 1, H K] thrice, are added to query, key and value first: their gradients
    are sums over tokens, which the kernel has at hand. `mask` [B, M] is False for tokens that
    nothing attends to. `interpret` runs the kernel without a TPU, slowly. Sums are in float32, as
    is the softmax; the matrix units get the arguments' dtype.
    """
    batch, queries, features = query.shape
    tokens, heads = key.shape[1], features // head_dim
    query = jnp.pad(query, ((0, 0), (0, max(0, 16 - queries)), (0, 0)))  # to whole registers
    plan = _Plan(
        queries=query.shape[1],
        tokens=tokens,
        heads=heads,
        head_dim=head_dim,
        scale=head_dim**-0.5,
        itemsize=query.dtype.itemsize,
        masked=mask is not None,
        interpret=interpret,
    )
    if plan.bytes(plan.at_once(1, 7), 7) > 2 * MAX_BYTES:
        plan = dataclasses.replace(plan, head_dim=LANES)

    def widen(x):  # [B, ..., H K] -> [B, ..., H 128]
        x = x.reshape(*x.shape[:2], heads, head_dim)
        x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, plan.head_dim - head_dim)))
        return x.reshape(*x.shape[:2], -1)

    if biases is None:
        biases = [jnp.zeros((batch, 1, features), jnp.float32)] * 3
    if mask is not None:
        mask = jnp.pad(mask, ((0, 0), (0, plan.rows - tokens)))
        mask = jnp.where(mask, 0.0, _NEVER).astype(jnp.float32)[:, None]
    y = _attention(plan, *map(widen, (query, key, value)), tuple(map(widen, biases)), mask)
    y = y.reshape(batch, -1, heads, plan.head_dim)[:, :queries, :, :head_dim]
    return y.reshape(batch, queries, features)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(plan, query, key, value, biases, mask):
    return _attention_forward(plan, query, key, value, biases, mask)[0]


def _attention_forward(plan, query, key, value, biases, mask):
    # Outside the kernel: XLA adds while it multiplies. Named for `jax.checkpoint`, to be kept.
    qkv = [
        checkpoint_name(x + b.astype(x.dtype), "qkv")
        for x, b in zip((query, key, value), biases, strict=True)
    ]
    y, lse = _forward(plan, *qkv, mask)
    return y, (*qkv, mask, lse)


def _attention_backward(plan, residuals, dy):
    mask = residuals[3]
    dq, dk, dv, *biases = _backward(plan, *residuals, dy)
    return dq, dk, dv, tuple(biases), None if mask is None else jnp.zeros_like(mask)


_attention.defvjp(_attention_forward, _attention_backward)


def _forward(plan: _Plan, query, key, value, mask):
    """(output like query, lse [B, H, chunks, chunk])."""
    call = _Call(plan, query, most=8, arrays=4)
    inputs = [call.queries, call.tokens, call.tokens] + [call.mask] * plan.masked
    scratch = [pltpu.VMEM((plan.chunk, LANES), jnp.float32)] * 2
    return call(_forward_kernel, 2, inputs, [call.queries, call.lse], scratch)(
        *(query, key, value, mask)[: len(inputs)]
    )


def _backward(plan: _Plan, query, key, value, mask, lse, dy):
    """Gradients of query, key and value, and their sums over tokens, [B, 1, H K]."""
    call = _Call(plan, query, most=4, arrays=7)
    qkv = [call.queries, call.tokens, call.tokens]
    inputs = [*qkv, call.queries, call.lse] + [call.mask] * plan.masked
    return call(_backward_kernel, 5, inputs, qkv + [call.sums] * 3)(
        *(query, key, value, dy, lse, mask)[: len(inputs)]
    )


class _Call:
    """The grid over images and groups of heads, and what a step of it sees of each array."""

    def __init__(self, plan: _Plan, query: jax.Array, most: int, arrays: int):
        batch, _, features = query.shape
        groups = plan.at_once(most, arrays)
        images, lse = plan.images(batch, groups, arrays), (plan.chunks, plan.chunk)
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
        self.sums, self.mask = (
            (
                pl.BlockSpec((images, 1, block), lambda i, g, at=at: (i, 0, g * at)),
                jax.ShapeDtypeStruct((batch, 1, lanes), jnp.float32),
            )
            for block, lanes, at in ((groups * plan.width, features, 1), (plan.rows, plan.rows, 0))
        )

    def __call__(
        self, kernel: Callable, products: int, inputs: list, outputs: list, scratch=()
    ) -> Callable:
        """The kernel, which makes `products` matrix products of N x M x K for every head."""

        def step(*refs):
            # Straight on for a few groups: the compiler hides one's latencies behind the others.
            straight = (12 if products == 2 else 4) // self.groups
            for_each(self.images, lambda i: kernel(self.plan, self.groups, i, *refs), straight)

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


def for_each(count: int, body: Callable[[Any], None], straight: int = 1) -> None:
    """body(0), ..., body(count - 1): a loop, of which a turn is at most `straight` of them."""
    straight = max(n for n in range(1, max(straight, 1) + 1) if count % n == 0)

    def turn(i, _):
        for j in range(straight):
            body(i * straight + j)

    if count == straight:
        turn(0, None)
    else:
        jax.lax.fori_loop(0, count // straight, turn, None)


def _zero_from(start: int | jax.Array, x: jax.Array, least: int = 0) -> jax.Array:
    """x [rows, ...], zero from row `start` on, which isn't below `least`."""
    least = min(least // 16 * 16, x.shape[0])  # no work for rows that stay
    rest = x[least:]
    if not rest.shape[0] or (isinstance(start, int) and start >= x.shape[0]):
        return x
    row = least + jax.lax.broadcasted_iota(jnp.int32, (rest.shape[0], 1), 0)
    rest = jnp.where(row < start, rest, jnp.zeros_like(rest))
    return jnp.concatenate([x[:least], rest], axis=0) if least else rest


def _multiply(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def _forward_kernel(plan: _Plan, groups: int, image, q_ref, k_ref, v_ref, *rest):
    *mask_ref, y_ref, lse_ref, top_ref, sum_ref = rest
    attended = jax.lax.broadcasted_iota(jnp.int32, (1, plan.rows), 1) < plan.tokens  # [1, M]
    if plan.masked:
        attended &= mask_ref[0][image] == 0

    def chunk(c):
        queries = pl.ds(c * plan.chunk, plan.chunk)
        lane_of = {}  # top_ref and sum_ref have a lane a head
        for g in range(groups):
            lanes = slice(g * plan.width, (g + 1) * plan.width)
            q, k = q_ref[image, queries, lanes], k_ref[image, :, lanes]
            # Past the tokens anything may lie, and nan times 0 is nan.
            v = _zero_from(plan.tokens, v_ref[image, :, lanes], plan.tokens)
            products = []
            for j in range(plan.packed):
                own = plan.own_lanes(j)
                scores = _multiply(plan.only(j, q), k, (1, 1))  # [N, M]
                scores = jnp.where(attended, scores * plan.base_2, _NEVER)
                top = scores.max(axis=1, keepdims=True)
                weights = jnp.exp2(scores - top).astype(v.dtype)
                with_ones = v if plan.packed == 1 else jnp.where(own, v, 1)
                products.append(_multiply(weights, with_ones, (1, 0)))  # [N, K, and the sum]
                # The sum is in the other heads' lanes alone.
                at = (j + 1) % plan.packed * plan.head_dim + g
                lane_of[g * plan.packed + j] = at
                if plan.packed > 1:
                    total = products[j][:, at : at + 1]
                else:
                    total = weights.astype(jnp.float32).sum(axis=1, keepdims=True)
                top_ref[:, at : at + 1], sum_ref[:, at : at + 1] = top, total
            if plan.packed > 1:  # the head before each has its sum in those lanes
                total = pltpu.roll(plan.select(products, 1), LANES - plan.head_dim, 1)
            inverse = pl.reciprocal(total, approx=y_ref.dtype == jnp.bfloat16)
            inverse *= 2.0 - total * inverse  # Newton's step
            y_ref[image, queries, lanes] = (plan.select(products) * inverse).astype(y_ref.dtype)
        lse = (top_ref[...] + jnp.log2(sum_ref[...])).T
        for head, at in lane_of.items():
            lse_ref[image, head, pl.ds(c, 1), :] = lse[at : at + 1]

    for_each(plan.chunks, chunk)


def _backward_kernel(plan: _Plan, groups: int, image, q_ref, k_ref, v_ref, dy_ref, lse_ref, *rest):
    *mask_ref, dq_ref, dk_ref, dv_ref, dq_sum_ref, dk_sum_ref, dv_sum_ref = rest
    if plan.masked:
        row = jnp.broadcast_to(mask_ref[0][image], (LANES, plan.rows))
        attended = row.T[:, :1] == 0  # [M, 1]

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
                scores = _multiply(plan.only(j, k), q, (1, 1)) * plan.base_2  # [M, N]
                weights = jnp.exp2(scores - lse)
                if plan.masked:
                    weights = jnp.where(attended, weights, 0.0)
                weights = _zero_from(plan.tokens, weights, plan.tokens)
                d_weights = _multiply(plan.only(j, v), dy, (1, 1))
                dv.append(_multiply(weights.astype(dy.dtype), dy, (1, 0)))
                d_sum = (weights * d_weights).sum(axis=0, keepdims=True)
                d_scores = (weights * (d_weights - d_sum)).astype(q.dtype)
                dk.append(_multiply(d_scores, q, (1, 0)))
                dq.append(_multiply(d_scores, k, (0, 0)))
            dq = plan.select(dq) * plan.scale
            dq_ref[image, queries, lanes] = dq.astype(dq_ref.dtype)
            return dq.sum(axis=0, keepdims=True), plan.select(dk), plan.select(dv)

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
