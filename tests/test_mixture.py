import itertools

import numpy as np
import pytest

from vit_jax.config import build
from vit_jax.data.mixture import Mixture, PartConfig, open_mixture
from vit_jax.data.order import mixture_stream
from vit_jax.data.pipeline import DataConfig, eval_batches, open_data, train_batches

BILLIONS = 3_000_000_000


def part_of(stream, sizes):
    return np.searchsorted(np.cumsum(sizes), stream, side="right")


@pytest.mark.parametrize(
    ("sizes", "weights"),
    [((50, 7), (0.7, 0.3)), ((10, 2000, 3), (1, 5, 2)), ((4, 5, 6, 7), (0.1, 1e-3, 3, 1 / 3))],
)
def test_parts_come_in_proportion_and_each_goes_through_its_own_epochs(sizes, weights):
    blocks = 6
    stream = mixture_stream(3, range(1024 * blocks), sizes, weights)
    assert stream.dtype == np.int64
    parts = part_of(stream, sizes)
    share = np.array(weights) / np.sum(weights)
    for block in parts.reshape(blocks, 1024):
        counts = np.bincount(block, minlength=len(sizes))
        assert np.abs(counts - 1024 * share).max() <= 2
    starts = np.cumsum([0, *sizes])
    for part, size in enumerate(sizes):
        seen = np.bincount(stream[parts == part] - starts[part], minlength=size)
        assert len(seen) == size
        # Whole blocks hold a contiguous piece of the part's stream: all of its epochs but the
        # last are complete.
        assert seen.max() - seen.min() <= 1


def test_parts_are_spread_at_random():
    """Not in turns: then the rows that mixup pairs, or a process holds, would be of one part."""
    parts = part_of(mixture_stream(0, range(4096), (100, 100), (0.5, 0.5)), (100, 100))
    assert np.mean(parts[1:] == parts[:-1]) == pytest.approx(0.5, abs=0.05)
    assert np.mean(parts[::-1] == parts) == pytest.approx(0.5, abs=0.05)
    assert not np.array_equal(parts[:1024], parts[1024:2048])


def test_the_stream_is_a_function_of_seed_and_position():
    sizes, weights = (BILLIONS, 70_000, 5), (2, 1, 1)
    positions = np.random.default_rng(0).integers(10**15, size=40).tolist()
    together = mixture_stream(7, positions, sizes, weights)
    alone = [mixture_stream(7, [p], sizes, weights)[0] for p in reversed(positions)]
    np.testing.assert_array_equal(together, alone[::-1])
    assert not np.array_equal(together, mixture_stream(8, positions, sizes, weights))
    # Equally large datasets with equal weights have different orders.
    stream = mixture_stream(1, range(2048), (64, 64), (1, 1))
    first, second = (stream[part_of(stream, (64, 64)) == part][:64] % 64 for part in (0, 1))
    assert not np.array_equal(first, second)


def test_the_stream_is_pinned():
    """A change here reorders the data of every run that is resumed: say so in the changelog."""
    found = mixture_stream(0, range(8), (10, 1_281_167), (1, 3))
    assert found.tolist() == [1106541, 173989, 885558, 306110, 3, 905818, 93312, 722747]
    assert mixture_stream(2**64 - 1, [10**12], (10, 1_281_167), (1, 3)).tolist() == [1197114]


def config(**values):
    mixture = {
        "b": {"dataset": "strokes/7", "split": "train[:30]", "weight": 3.0},
        "a": {"dataset": "strokes/7", "split": "validation[:10]"},
    }
    return build(DataConfig, {"mixture": mixture, "num_threads": 1, **values}, "config.data")


def test_a_mixture_is_a_recipes_data():
    source = open_data(config())
    assert isinstance(source, Mixture)
    assert (len(source), source.num_classes) == (40, 7)
    assert source.sizes == (10, 30)  # in the order of the names
    assert source.weights == (1.0, 3.0)
    assert source.describe(12) == "example 12 (part 1: example 2)"
    assert (source.part_of(9), source.part_of(10)) == (range(10), range(10, 40))
    options = {"batch_size": 64, "image_size": (32, 32)}
    data = config()
    batches = train_batches(source, data, seed=0, **options)
    (batch,) = itertools.islice(batches, 1)
    batches.close()
    index = mixture_stream(0, range(64), source.sizes, source.weights)
    np.testing.assert_array_equal(batch["label"], [source[i]["label"] for i in index])
    np.testing.assert_array_equal(batch["image"], [source[i]["image"] for i in index])
    seen = np.concatenate([b["index"][b["mask"]] for b in eval_batches(source, data, **options)])
    np.testing.assert_array_equal(seen, np.arange(40))


def test_label_spaces():
    digits = PartConfig("digits", "train[:20]")
    strokes = PartConfig("strokes/10", "train[:20]")
    shared = open_mixture({"digits": digits, "strokes": strokes}, "shared")  # one has no names
    assert shared.num_classes == 10
    assert {shared[i]["label"] for i in range(40)} == set(range(10))
    apart = open_mixture({"digits": digits, "strokes": strokes}, "concatenated")
    assert apart.num_classes == 20
    assert {apart[i]["label"] for i in range(20)} == set(range(10))
    assert {apart[i]["label"] for i in range(20, 40)} == set(range(10, 20))
    assert apart.class_names is None
    twice = open_mixture({"new": digits, "old": digits}, "concatenated")
    assert twice.class_names[:2] == ("new/0", "new/1")
    assert len(set(twice.class_names)) == 20


@pytest.mark.parametrize(
    ("parts", "labels", "message"),
    [
        (
            {"x": PartConfig("digits"), "y": PartConfig("strokes/9")},
            "shared",
            "x has 10 classes, 0, 1, 2, ..., and y has 9, without names: expected the same",
        ),
        ({"x": PartConfig("digits", weight=0.0)}, "shared", "weight 0.0 of x: expected a positive"),
        ({"x": PartConfig("digits")}, "share", "did you mean 'shared'"),
    ],
)
def test_what_does_not_fit(parts, labels, message):
    with pytest.raises(ValueError) as error:
        open_mixture(parts, labels)
    assert message in str(error.value)


@pytest.mark.parametrize("values", [{}, {"dataset": "digits", "mixture": {"a": PartConfig("b")}}])
def test_either_a_dataset_or_a_mixture(values):
    with pytest.raises(ValueError, match="set exactly one of them"):
        DataConfig(**values)
