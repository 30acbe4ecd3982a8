"""Block sizes of the flash kernel: how heads, tokens and images are divided for VMEM.

A TPU register has 128 lanes, more than most heads have features. `Plan` packs as many heads side by
side in one group of lanes as divide it evenly; otherwise a group is one head. A grid step processes
whole images and whole groups, as many as `MAX_BYTES` allows, and queries in chunks.
"""

import dataclasses
import math

LANES = 128
MAX_TOKENS = 2048
MAX_CHUNK = 320  # queries whose scores are in VMEM at once
MAX_BYTES = 6 * 2**20  # VMEM that the blocks of a grid step may take, unless one is already larger


@dataclasses.dataclass(frozen=True)
class Plan:
    """Block sizes for one shape of attention."""

    queries: int
    tokens: int
    heads: int
    head_dim: int
    scale: float  # multiplies the scores
    itemsize: int  # bytes of an element of query, key and value
    interpret: bool

    @property
    def packed(self) -> int:
        """Heads per group."""
        packed = LANES // self.head_dim
        return 1 if LANES % self.head_dim or self.heads % packed else packed

    @property
    def width(self) -> int:
        """Lanes per group."""
        return self.packed * self.head_dim

    @property
    def groups(self) -> int:
        """Groups of heads in all."""
        return self.heads // self.packed

    @property
    def chunks(self) -> int:
        """Chunks of queries, so that the scores of one chunk fit in VMEM."""
        chunks = 1
        while (size := -(-self.queries // chunks)) > MAX_CHUNK or size * self.tokens > 2**18:
            chunks += 1
        return chunks

    @property
    def chunk(self) -> int:
        """Queries per chunk, a multiple of 16: whole registers."""
        return -(-self.queries // (16 * self.chunks)) * 16

    @property
    def rows(self) -> int:
        """Tokens, rounded up to a multiple of 16: whole registers."""
        return -(-self.tokens // 16) * 16

    @property
    def base_2(self) -> float:
        """The factor in exp(scale s) = 2^(base_2 s)."""
        return self.scale * math.log2(math.e)

    def groups_per_step(self, most: int, arrays: int) -> int:
        """Groups per grid step: at most `most` that fit `MAX_BYTES`, in whole registers, or all.

        `arrays`: the number of arrays like query that a grid step reads and writes.
        """
        whole = math.lcm(self.width, LANES) // self.width
        if self.groups % whole:
            return self.groups
        while most > whole and self.bytes(most, arrays) > MAX_BYTES:
            most -= 1
        return max(n for n in range(whole, max(most, whole) + 1, whole) if self.groups % n == 0)

    def bytes(self, groups: int, arrays: int) -> int:
        """VMEM for one image's blocks in a grid step, double-buffered, in bytes."""
        rows = max(self.rows, self.chunks * self.chunk)
        return 2 * arrays * rows * groups * self.width * self.itemsize

    def images_per_step(self, batch: int, groups: int, arrays: int) -> int:
        """Images per grid step: up to 8 that fit `MAX_BYTES`, a divisor of `batch`."""
        most = max(1, min(8, MAX_BYTES // self.bytes(groups, arrays)))
        return max(n for n in range(1, most + 1) if batch % n == 0)

    @property
    def fits(self) -> bool:
        """Whether the backward pass, with 7 arrays, fits in VMEM at its smallest block."""
        return self.bytes(self.groups_per_step(1, 7), 7) <= 2 * MAX_BYTES
