import errno
import gc
import io
import itertools
import multiprocessing
import threading
import time
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from vit_jax.data.mixture import Mixture
from vit_jax.data.pipeline import DataConfig, eval_batches, global_indices, train_batches
from vit_jax.data.sources import Source, open_source

BILLIONS = 3_000_000_000


def source_of(num_examples, num_classes=10):
    """Example i is a 4 x 4 image whose pixels hold i."""
    records = [
        {
            "image": np.full((4, 4), i % 256, np.uint8) + np.uint8(i // 256),
            "label": i % num_classes,
        }
        for i in range(num_examples)
    ]
    return Source(records, num_classes)


class Endless:
    """As long as the largest formula-driven datasets; the label is the index."""

    def __len__(self):
        return BILLIONS

    def __getitem__(self, index):
        return {"image": np.full((4, 4), index % 251, np.uint8), "label": index}


def stream(source, rows=None, start_step=0, batch_size=8, image_size=(4, 4), seed=3, **data):
    data = {"preprocess": "pad_crop(1)|flip", "num_threads": 1, **data}
    return train_batches(
        source,
        DataConfig("given", **data),
        batch_size=batch_size,
        image_size=image_size,
        seed=seed,
        start_step=start_step,
        rows=rows,
    )


def train(source, steps, **options):
    batches = stream(source, **options)
    taken = list(itertools.islice(batches, steps))
    batches.close()
    return taken


def evaluate(source, rows=None, batch_size=8, image_size=(4, 4), **data):
    data = {"preprocess": "resize", "num_threads": 2, **data}
    options = {"batch_size": batch_size, "image_size": image_size, "rows": rows}
    return eval_batches(source, DataConfig("given", **data), **options)


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key].dtype == b[key].dtype
            np.testing.assert_array_equal(a[key], b[key])


# The order.


@pytest.mark.parametrize("num_examples", [1, 2, 10, 1797, 70_000])
def test_each_epoch_visits_every_example_once(num_examples):
    for epoch in (0, 1, 7):
        seen = global_indices(5, epoch, num_examples, num_examples)
        assert seen.dtype == np.int64
        np.testing.assert_array_equal(np.sort(seen), np.arange(num_examples))


def around(powers):
    return [2**k + d for k in powers for d in (-1, 0, 1, 2)]


@pytest.mark.parametrize(
    "num_examples",
    [
        *around([16]),
        *(
            pytest.param(n, marks=pytest.mark.slow)
            for n in (*around([17, 18, 19]), 4**10 + 1, 4**11 + 1)
        ),
    ],
)
def test_each_example_once_around_powers_of_two(num_examples):
    """Grain's own shuffle misses one example of 4**k + 1."""
    seen = global_indices(0, 0, num_examples, num_examples)
    assert (np.bincount(seen, minlength=num_examples) == 1).all()


@pytest.mark.parametrize("k", range(8, 31))
def test_no_two_places_of_a_large_epoch_share_an_example(k):
    """Numbers that exceed the permuted bits would be taken for smaller ones."""
    for extra in (1, 2, 4, 1001):
        first, last = (global_indices(3, place, 1, 4**k + extra) for place in (0, 4**k))
        assert first != last


def test_the_order_is_one_stream_whatever_the_batch_size():
    stream = global_indices(1, 0, 120, 10)
    for batch_size in (1, 3, 8, 40):
        steps = [global_indices(1, n, batch_size, 10) for n in range(120 // batch_size)]
        np.testing.assert_array_equal(np.concatenate(steps), stream)


@pytest.mark.parametrize("num_examples", [10, 1797, 100_000])
def test_epochs_and_seeds_differ(num_examples):
    orders = [
        tuple(global_indices(seed, epoch * num_examples // 10, 10, num_examples))
        for seed in (0, 1, 2**63)
        for epoch in (0, 1, 2, 100_000)
    ]
    assert len(set(orders)) == len(orders)


def test_the_order_is_pinned():
    """A change here reorders the data of every run that is resumed: say so in the changelog."""
    assert global_indices(0, 0, 8, 1000).tolist() == [459, 206, 222, 162, 711, 814, 350, 890]
    assert global_indices(1, 2, 4, 10).tolist() == [6, 3, 7, 2]
    assert global_indices(0, 0, 3, 1_281_167).tolist() == [669381, 75706, 1078274]
    assert global_indices(7, 10**7, 2, BILLIONS).tolist() == [234474702, 1127175966]


def test_billions_of_examples_are_shuffled_without_a_table():
    tracemalloc.start()
    try:
        seen = np.concatenate([global_indices(0, step, 4096, BILLIONS) for step in (0, 1, 500_000)])
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 10_000_000, "a bit an example would be hundreds of megabytes"
    assert len(np.unique(seen)) == len(seen)
    assert 0 <= seen.min() < seen.max() < BILLIONS
    assert seen.mean() == pytest.approx(BILLIONS / 2, rel=0.04)
    # Step 10**7 lies in epoch 13.
    later = global_indices(0, 10**7, 4096, BILLIONS)
    assert len(np.unique(later)) == 4096


def chi_square(counts):
    return ((counts - counts.mean()) ** 2 / counts.mean()).sum()


@pytest.mark.parametrize("num_examples", [5, 1000, 100_000, BILLIONS])
def test_the_order_is_uniform_over_seeds(num_examples):
    """An example's position, and the distance of two neighbours' positions, are uniform."""
    bins, seeds = 5, 2000
    pairs = np.array([global_indices(seed, 0, 2, num_examples) for seed in range(seeds)])
    landed = np.bincount(pairs[:, 0] * bins // num_examples, minlength=bins)
    assert chi_square(landed) < 18.5  # one in a thousand, 4 degrees of freedom
    gap = (pairs[:, 1] - pairs[:, 0]) % num_examples
    bins = min(50, num_examples - 1)
    apart = np.bincount((gap - 1) * bins // (num_examples - 1), minlength=bins)
    assert chi_square(apart) < (18.5 if bins == 4 else 86)  # one in a thousand, 49


# The batches.


def test_a_batch_holds_its_examples():
    source = source_of(100)
    for step, batch in enumerate(train(source, 3, preprocess="resize")):
        index = global_indices(3, step, 8, 100)
        assert batch["image"].shape == (8, 4, 4, 3)
        assert batch["image"].dtype == np.uint8
        assert batch["label"].dtype == np.int32
        np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], index)
        np.testing.assert_array_equal(batch["label"], index % 10)


@pytest.mark.parametrize("num_examples", [3, 100])
def test_processes_share_the_global_batch(num_examples):
    source = source_of(num_examples)
    whole = train(source, 4)
    for count in (2, 4):
        parts = [train(source, 4, rows=rows) for rows in np.split(np.arange(8), count)]
        joined = [
            {key: np.concatenate([part[key] for part in step]) for key in step[0]}
            for step in zip(*parts, strict=True)
        ]
        assert_same(joined, whole)


def test_rows_need_not_be_neighbours():
    """A mesh that follows the network may give a process any rows."""
    whole = train(source_of(100), 2)
    rows = np.array([1, 2, 6])
    expected = [{key: value[rows] for key, value in batch.items()} for batch in whole]
    assert_same(train(source_of(100), 2, rows=rows), expected)


def test_threads_do_not_change_the_batches():
    source = source_of(100)
    for num_threads in (0, 8):
        assert_same(train(source, 12, num_threads=num_threads), train(source, 12))


def jpegs(num_examples, broken=()):
    """Makes JPEGs of noise, one of them in CMYK; broken ones have one byte each."""
    records = []
    for i in range(num_examples):
        pixels = np.random.default_rng(i).integers(256, size=(40 + i, 60, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).convert("CMYK" if i == 3 else "RGB").save(file, "JPEG")
        records.append({"image": b"?" if i in broken else file.getvalue(), "label": i % 10})
    return records


def mixed():
    """Makes a mixture with weights, JPEGs, and broken examples that are replaced."""
    records = jpegs(12, broken=(2, 9))
    return Mixture(records, 10, sizes=(8, 4), weights=(2.0, 1.0))


MIXED = {"preprocess": "inception_crop|randaugment|flip", "image_size": (16, 16), "start_step": 5}
MIXED |= {"skip_broken": 1000, "cache_gib": 1e-5}


def test_worker_processes_do_not_change_the_batches():
    ours = train(mixed(), 7, num_workers=2, num_threads=2, **MIXED)
    assert_same(ours, train(mixed(), 7, **MIXED))
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("num_threads", [0, 3])
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_the_global_batch_depends_on_seed_and_step_alone(processes, num_threads):
    """Compares ids, pixels and replacements for other process counts, threads and start steps."""
    whole = train(mixed(), 6, **MIXED)
    assert sum(batch["skipped"].sum() for batch in whole) > 3
    options = MIXED | {"start_step": 8, "num_threads": num_threads}
    parts = [train(mixed(), 3, rows=r, **options) for r in np.split(np.arange(8), processes)]
    joined = [
        {key: np.concatenate([part[key] for part in step]) for key in step[0]}
        for step in zip(*parts, strict=True)
    ]
    assert_same(joined, whole[3:])


def test_restart_in_the_middle_equals_uninterrupted():
    source = source_of(20)
    whole = train(source, 9)
    for start_step in (1, 4, 8):
        assert_same(train(source, 9 - start_step, start_step=start_step), whole[start_step:])


def test_random_preprocessing_differs_between_epochs_and_examples():
    records = [{"image": np.arange(16, dtype=np.uint8).reshape(4, 4), "label": 0}] * 4
    (batch,) = train(Source(records, 1), 1, batch_size=64)
    assert len({image.tobytes() for image in batch["image"]}) > 10


def test_endless_source_is_read_lazily():
    source = Source(Endless(), BILLIONS)
    (batch,) = train(source, 1, start_step=10**6, preprocess="resize", batch_size=512)
    expected = global_indices(3, 10**6, 512, BILLIONS)
    np.testing.assert_array_equal(batch["label"], expected.astype(np.int32))
    np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], expected % 251)


def test_names_are_looked_up_for_messages_alone():
    """A prepared dataset reads the record once more to know its file's name."""

    class Named(list):
        def name(self, index):
            raise AssertionError(f"the name of {index}")

    source = Source(Named(source_of(8).records), 10)
    assert len(train(source, 2)) == 2
    with pytest.raises(AssertionError, match="the name of"):
        train(source, 1, image_size=(5, 5), preprocess="flip")


def test_multi_label_is_padded_with_minus_one():
    image = np.zeros((4, 4), np.uint8)
    labels = ([2, 0], [], [1], np.array([0, 1, 2]))
    records = [{"image": image, "label": label} for label in labels]
    source = Source(records, 3, labels_per_example=4)
    (batch,) = evaluate(source, batch_size=5)
    assert batch["label"].dtype == np.int32
    expected = [[2, 0, -1, -1], [-1] * 4, [1, -1, -1, -1], [0, 1, 2, -1], [-1] * 4]
    np.testing.assert_array_equal(batch["label"], expected)


@pytest.mark.parametrize("batch_size", [1, 7, 64, 1000])
def test_evaluation_counts_each_example_once(batch_size):
    source = source_of(300)
    for count in (1, 2, 4):
        size = batch_size * count  # a global batch that divides
        processes = [
            list(evaluate(source, rows, batch_size=size))
            for rows in np.split(np.arange(size), count)
        ]
        assert {len(batches) for batches in processes} == {-(-300 // size)}
        whole = {
            key: np.concatenate([p[key] for step in zip(*processes, strict=True) for p in step])
            for key in processes[0][0]
        }
        mask, index = whole["mask"], whole["index"]
        assert mask.dtype == bool
        assert index.dtype == np.int64
        np.testing.assert_array_equal(index[mask], np.arange(300))
        assert (index[~mask] == -1).all()
        assert (whole["label"][~mask] == -1).all()
        np.testing.assert_array_equal(whole["label"][mask], np.arange(300) % 10)
        assert (whole["image"][~mask] == 0).all()
        first = np.stack([source[i]["image"][0, 0] for i in range(300)])
        np.testing.assert_array_equal(whole["image"][mask][:, 0, 0, 0], first)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_evaluation_stops_at_a_broken_example_and_names_it(num_workers):
    records = list(source_of(10).records)
    options = {"batch_size": 4, "preprocess": "pad_crop(1)"}
    expected = list(evaluate(Source(records, 10), **options))
    records[9] = {"image": b"\xff\xd8\xff\xe0", "label": 0}
    batches = evaluate(Source(records, 10), num_workers=num_workers, **options)
    assert_same([next(batches), next(batches)], expected[:2])
    with pytest.raises(ValueError, match="example 9: cannot decode 4 bytes"):
        next(batches)


# Broken examples.


def test_a_broken_example_is_an_error_by_default():
    source = Source(jpegs(12, broken=(2,)), 10)
    with pytest.raises(ValueError, match="example 2: cannot decode 1 bytes"):
        train(source, 12, preprocess="inception_crop", image_size=(8, 8))


def test_another_takes_the_place_of_a_broken_one(caplog):
    records = list(source_of(40).records)
    records[7], records[30] = records[7] | {"label": 10}, records[30] | {"image": b""}
    options = {"preprocess": "resize", "batch_size": 40, "num_threads": 0}
    first, second = train(Source(records, 10), 2, skip_broken=4, **options)
    assert "skipped: example 7: label 10: expected 0 <= label < 10" in caplog.text
    assert "skipped: example 30: cannot decode 0 bytes" in caplog.text
    whole, _ = train(source_of(40), 2, **options)
    for batch in (first, second):
        assert batch["skipped"].sum() == 2
        assert not {7, 30} & set(batch["image"][:, 0, 0, 0].tolist())
        np.testing.assert_array_equal(batch["label"], batch["image"][:, 0, 0, 0] % 10)
    sound = ~first["skipped"]
    np.testing.assert_array_equal(sound, ~np.isin(whole["image"][:, 0, 0, 0], (7, 30)))
    np.testing.assert_array_equal(first["image"][sound], whole["image"][sound])
    with pytest.raises(ValueError, match="4 broken examples, more than skip_broken = 3"):
        train(Source(records, 10), 2, skip_broken=3, **options)


def test_a_mixtures_part_mends_itself():
    records = jpegs(12, broken=(0, 1, 2))
    source = Mixture(records, 10, sizes=(4, 8), weights=(1.0, 1.0))
    (batch,) = train(
        source, 1, batch_size=256, image_size=(8, 8), preprocess="resize", skip_broken=256
    )
    assert set(batch["label"][batch["skipped"]]) == {3}


def test_what_is_all_broken_is_an_error():
    source = Source(jpegs(8, broken=range(1, 8)), 10)
    with pytest.raises(ValueError, match="16 examples to replace it are broken too, such as ex"):
        train(source, 40, image_size=(8, 8), preprocess="resize", skip_broken=10_000)


def test_evaluation_leaves_a_broken_example_out():
    records = list(source_of(10).records)
    records[0], records[9] = records[0] | {"image": b"<html>"}, records[9] | {"label": -1}
    batches = list(evaluate(Source(records, 10), batch_size=4, skip_broken=2))
    mask = np.concatenate([batch["mask"] for batch in batches])
    assert np.flatnonzero(mask).tolist() == list(range(1, 9))
    with pytest.raises(ValueError, match="2 broken examples, more than skip_broken = 1"):
        list(evaluate(Source(records, 10), batch_size=4, skip_broken=1))


def test_the_cache_reads_the_first_examples_once():
    class Counting(list):
        read = 0

        def __getitem__(self, index):
            self.read += 1
            return super().__getitem__(index)

    size = sum(len(record["image"]) for record in jpegs(10))
    options = {"image_size": (8, 8), "preprocess": "inception_crop", "batch_size": 10}
    plain = train(Source(jpegs(10), 10), 4, **options)
    read = []
    for share in (2, 0.5):
        records, limit = Counting(jpegs(10)), share * size / 2**30
        kept = train(Source(records, 10), 4, cache_gib=limit, num_threads=0, **options)
        assert_same(kept, plain)
        read.append(records.read)
    assert read[0] == 10
    assert 20 < read[1] < 40
    drawn = Counting({"image": np.zeros((8, 8, 3), np.uint8), "label": 0} for _ in range(10))
    train(Source(drawn, 10), 4, cache_gib=5.5 * 192 / 2**30, num_threads=0, **options)
    assert drawn.read > 20  # five of ten are kept


# The errors.


@pytest.mark.parametrize("iterate", [evaluate, stream])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": np.arange(0)}, "rows [] of a batch of 8"),
        ({"rows": np.array([3, 8])}, "rows [3 8] of a batch of 8: expected some, all in the batch"),
        ({"batch_size": 0}, "batch size 0"),
        ({"image_size": (8, 8), "preprocess": "flip"}, "image of 4 x 4, expected 8 x 8: add `res"),
        ({"preprocess": "resise"}, "did you mean 'resize'"),
        ({"source": Source((), 10)}, "the source is empty"),
        (
            {"source": Source([{"image": b"GIF?", "label": 0}], 10)},
            "example 0: cannot decode 4 bytes",
        ),
        (
            {"source": Source([{"image": np.zeros((4, 4), np.uint8), "label": -1}], 10)},
            "example 0: label -1: expected 0 <= label < 10",
        ),
        (
            {"source": Source([{"image": np.zeros((4, 4), np.uint8), "label": [1, 2]}], 10)},
            "example 0: it has 2 labels: expected one",
        ),
        (
            {"source": Source([{"image": np.zeros((4, 4), np.uint8), "label": []}], 10)},
            "example 0: it has 0 labels: expected one",
        ),
        (
            {
                "source": Source(
                    [{"image": np.zeros((4, 4), np.uint8), "label": [1, 2, 3]}],
                    10,
                    labels_per_example=2,
                )
            },
            "example 0: it has 3 labels: expected up to 2",
        ),
    ],
)
def test_errors_come_at_once(iterate, change, message):
    options = {"source": source_of(5), "preprocess": "resize"}
    with pytest.raises(ValueError) as error:
        iterate(**(options | change))
    assert message in str(error.value)


def test_seed_out_of_range():
    with pytest.raises(ValueError, match="seed -1: expected"):
        train(source_of(5), 1, seed=-1)


# The resources.


def grain_threads():
    return [t for t in threading.enumerate() if t.name.startswith("grain-prefetch")]


def wait_until(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


@pytest.mark.parametrize("how", ["close", "drop"])
def test_threads_stop(how):
    assert wait_until(lambda: not grain_threads())
    batches = stream(source_of(50), num_threads=3)
    next(batches)
    assert grain_threads()
    if how == "close":
        batches.close()
    del batches
    gc.collect()
    assert wait_until(lambda: not grain_threads())


def test_jpeg_bytes_run_in_many_threads():
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(256, size=(50, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "JPEG")
    source = Source([{"image": file.getvalue(), "label": i % 10} for i in range(40)], 10)
    options = {"preprocess": "inception_crop|flip", "image_size": (16, 16)}
    assert_same(train(source, 10, num_threads=8, **options), train(source, 10, **options))


@pytest.mark.parametrize(
    "fault",
    [OSError(errno.EMFILE, "x"), OSError(errno.EIO, "x"), PermissionError(13, "x"), MemoryError()],
    ids=repr,
)
def test_a_fault_of_the_machine_is_never_skipped(tmp_path, monkeypatch, fault):
    for name in "ab":
        (tmp_path / name).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / name / "0.png")
    source = open_source(str(tmp_path), "train")

    def fail(path, *_, **__):
        raise fault

    batches = evaluate(source, batch_size=1, skip_broken=5, num_threads=0)
    monkeypatch.setattr("vit_jax.data.foreign_files.open", fail, raising=False)
    with pytest.raises((OSError, MemoryError)):
        list(batches)
