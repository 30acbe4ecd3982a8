"""(seed, position) -> example: the order of the training stream, in O(1) memory.

One stream without end: epoch after epoch of a dataset, each in its own random order. A mixture
interleaves its parts' streams; each part goes through its own epochs.
"""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate

import grain.experimental
import numpy as np

_BLOCK = 1024  # positions over which a mixture's parts are spread at random
_WEIGHT_BITS = 32  # of a part's share


def epoch_stream(seed: int, positions: Iterable[int], num_examples: int) -> np.ndarray:
    """The examples at these positions of the training stream: int64."""
    return np.fromiter((_example(seed, p, num_examples) for p in positions), np.int64)


def _example(seed: int, position: int, num_examples: int) -> int:
    epoch, place = divmod(position, num_examples)
    return _epoch_order(seed, epoch, num_examples)(place)


@functools.lru_cache(maxsize=64)
def _epoch_order(seed: int, epoch: int, num_examples: int) -> Callable[[int], int]:
    """A random permutation of range(num_examples), as a function."""
    key = np.random.SeedSequence((seed, epoch))
    # Grain permutes at least 2**16 numbers and skips those out of range: milliseconds an index for
    # a small set. A table is quicker there.
    if num_examples <= 1 << 16:
        return np.random.default_rng(key).permutation(num_examples).__getitem__
    # Four rounds, as Grain itself uses, leave neighbours visibly dependent, and eight measurably:
    # over 300,000 seeds the distance of the first two examples isn't uniform. From ten on it is.
    (word,) = key.generate_state(1)
    largest = num_examples - 1
    if _grain_covers(largest):
        return functools.partial(
            grain.experimental.index_shuffle, max_index=largest, seed=int(word), rounds=16
        )
    return functools.partial(_walk, num_examples, int(word))


def _grain_covers(largest: int) -> bool:
    """Whether Grain's shuffle of range(largest + 1) is a permutation.

    It permutes the numbers of ceil(log2(largest)) bits, rounded up to an even number. 4**k needs
    one bit more; so do, from 4**25 on, where the logarithm is rounded, a few numbers above it.
    There two places have the same example, and one example is never seen.
    """
    bits = math.ceil(math.log2(largest))
    return largest < 1 << (bits + bits % 2)


def _walk(num_examples: int, seed: int, place: int) -> int:
    """Permutes a larger range, again until the number is one of range(num_examples)."""
    largest = (1 << num_examples.bit_length()) - 1
    while True:
        place = grain.experimental.index_shuffle(place, max_index=largest, seed=seed, rounds=16)
        if place < num_examples:
            return place


def mixture_stream(
    seed: int, positions: Iterable[int], sizes: Sequence[int], weights: Sequence[float]
) -> np.ndarray:
    """The same for parts that lie behind one another, in proportion to their weights: int64.

    Of 1,024 positions that begin at a multiple of it, each part has its share, rounded, at random
    places. Of each part every example comes once in each of the part's own epochs.
    """
    starts = list(accumulate(sizes, initial=0))
    shares = _shares(tuple(weights))

    def example(position: int) -> int:
        block, place = divmod(position, _BLOCK)
        part, turn = _turn(block * _BLOCK + _places(seed, block)[place], shares)
        return starts[part] + _example(_part_seed(seed, part), turn, sizes[part])

    return np.fromiter(map(example, positions), np.int64)


@functools.lru_cache(maxsize=64)
def _part_seed(seed: int, part: int) -> int:
    return int(np.random.SeedSequence((seed, part, 2)).generate_state(1, np.uint64)[0])


@functools.lru_cache(maxsize=8)
def _places(seed: int, block: int) -> list[int]:
    key = np.random.SeedSequence((seed, block, 1))
    return np.random.default_rng(key).permutation(_BLOCK).tolist()


@functools.lru_cache(maxsize=8)
def _shares(weights: tuple[float, ...]) -> tuple[int, ...]:
    """Of each part but the last: its share of what the parts before it leave, times 2**32."""
    rest = np.cumsum(weights[::-1])[::-1]
    return tuple(
        round(w / r * 2**_WEIGHT_BITS) for w, r in zip(weights[:-1], rest[:-1], strict=True)
    )


def _turn(position: int, shares: Sequence[int]) -> tuple[int, int]:
    """Which part has this position, and how many it had before: whole numbers, so exact."""
    for part, share in enumerate(shares):
        before = (position * share) >> _WEIGHT_BITS
        if ((position + 1) * share) >> _WEIGHT_BITS > before:
            return part, before
        position -= before
    return len(shares), position
