"""The order of the training stream: (seed, position) -> example, in O(1) memory.

The stream is endless: epoch after epoch of a dataset, each in its own random order. A mixture
interleaves its parts' streams; each part has its own epochs.
"""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate

import grain.experimental
import numpy as np

_BLOCK = 1024  # positions within which a mixture's parts are spread at random
_WEIGHT_BITS = 32  # precision of a part's share


def epoch_stream(seed: int, positions: Iterable[int], num_examples: int) -> np.ndarray:
    """Returns the examples at these positions of the training stream: int64 [positions]."""
    return np.fromiter((_example(seed, p, num_examples) for p in positions), np.int64)


def _example(seed: int, position: int, num_examples: int) -> int:
    epoch, place = divmod(position, num_examples)
    return _epoch_order(seed, epoch, num_examples)(place)


@functools.lru_cache(maxsize=64)
def _epoch_order(seed: int, epoch: int, num_examples: int) -> Callable[[int], int]:
    """Returns a random permutation of range(num_examples), as a function."""
    key = np.random.SeedSequence((seed, epoch))
    # Grain permutes at least 2**16 numbers and skips those out of range, which takes milliseconds
    # per index for a small dataset. A table is faster there.
    if num_examples <= 1 << 16:
        return np.random.default_rng(key).permutation(num_examples).__getitem__
    # With Grain's own 4 rounds neighbours are visibly dependent, with 8 measurably: over 300,000
    # seeds the distance of the first two examples isn't uniform. From 10 rounds on it is.
    (word,) = key.generate_state(1)
    largest = num_examples - 1
    if _grain_covers(largest):
        return functools.partial(
            grain.experimental.index_shuffle, max_index=largest, seed=int(word), rounds=16
        )
    return functools.partial(_walk, num_examples, int(word))


def _grain_covers(largest: int) -> bool:
    """Whether Grain's shuffle of range(largest + 1) is a permutation.

    Grain permutes numbers of ceil(log2(largest)) bits, rounded up to an even number of bits. If
    `largest` is 4**k, one more bit is needed. The same holds for a few larger numbers from 4**25
    on, where the logarithm is rounded. Grain then gives one example twice and another one never.
    """
    bits = math.ceil(math.log2(largest))
    return largest < 1 << (bits + bits % 2)


def _walk(num_examples: int, seed: int, place: int) -> int:
    """Permutes a larger range repeatedly until the number is in range(num_examples)."""
    largest = (1 << num_examples.bit_length()) - 1
    while True:
        place = grain.experimental.index_shuffle(place, max_index=largest, seed=seed, rounds=16)
        if place < num_examples:
            return place


def mixture_stream(
    seed: int, positions: Iterable[int], sizes: Sequence[int], weights: Sequence[float]
) -> np.ndarray:
    """Like `epoch_stream` for concatenated parts, in proportion to their weights: int64.

    In each aligned block of 1,024 positions, each part has its rounded share, at random positions.
    Each of a part's own epochs visits each of its examples once.
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
    """Returns for each part but the last its share of what earlier parts leave, times 2**32."""
    rest = np.cumsum(weights[::-1])[::-1]
    return tuple(
        round(w / r * 2**_WEIGHT_BITS) for w, r in zip(weights[:-1], rest[:-1], strict=True)
    )


def _turn(position: int, shares: Sequence[int]) -> tuple[int, int]:
    """Returns the part at this position and how many it had before; exact, in whole numbers."""
    for part, share in enumerate(shares):
        before = (position * share) >> _WEIGHT_BITS
        if ((position + 1) * share) >> _WEIGHT_BITS > before:
            return part, before
        position -= before
    return len(shares), position
