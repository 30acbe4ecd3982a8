"""(seed, step) -> this process's share of the global batch; nothing else to restore.

The training data is one infinite stream: epoch after epoch, each in its own random order. Step n
takes positions n * B to (n + 1) * B - 1, whatever the number of processes, workers and threads, and
the random numbers that preprocess an example depend on (seed, position) alone. Grain only runs the
function step -> batch ahead of time and in parallel.

Dimensions: B global batch, b local batch, H W image size, K labels per example.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import grain
import grain.experimental
import numpy as np
from absl import flags

from vit_jax.data.augment import parse_preprocess
from vit_jax.data.decode import decode_image
from vit_jax.data.sources import Source, open_source, parse_split


@dataclass(frozen=True)
class DataConfig:
    """What to read, and how eagerly.

    Attributes:
      dataset, split, data_dir: see `sources.open_source`.
      preprocess: see `augment.parse_preprocess`.
      num_threads: threads that make batches, each one batch at a time; 0 for none.
      num_workers: worker processes, with `num_threads` each; 0 for threads in this process. They
        are spawned, so the program must guard its `__main__`, and hand over batches through
        /dev/shm, which containers keep small by default.
      prefetch: local batches made ahead by each worker, at least one a thread.
    """

    dataset: str
    split: str = "train"
    preprocess: str = "resize"
    data_dir: str | None = None
    num_threads: int = 8
    num_workers: int = 0
    prefetch: int = 4


def global_indices(seed: int, step: int, batch_size: int, num_examples: int) -> np.ndarray:
    """The examples of step `step`, for all processes together: int64 [B]."""
    return _stream(seed, range(step * batch_size, (step + 1) * batch_size), num_examples)


# Classes and examples of sets that are rarely at hand where a run is planned. JFT-300M: arXiv
# 2010.11929.
DATASETS: dict[str, tuple[int, dict[str, int]]] = {
    "imagenet2012": (1000, {"train": 1_281_167, "validation": 50_000}),
    "imagenet21k": (21_843, {"full": 14_197_122}),
    "jft300m": (18_291, {"train": 303_000_000}),
}


def dataset_size(
    data: DataConfig, num_classes: int | None = None, num_examples: int | None = None
) -> tuple[int, int]:
    """Classes, and examples of the split: those given, else as known, else of the opened set.

    Raises ValueError or FileNotFoundError when there is no other way to know them.
    """
    if num_classes is None or num_examples is None:
        name = data.dataset.partition(":")[0]
        if name in DATASETS:
            classes, sizes = DATASETS[name]
            examples = sum(b - a for _, a, b in parse_split(data.split, sizes, name))
        else:
            try:
                source = open_source(data.dataset, data.split, data.data_dir)
            except (ValueError, FileNotFoundError) as error:
                hint = "A plan needs no data: give --num_classes and --num_examples"
                raise type(error)(f"{error}\n{hint}") from error
            classes, examples = source.num_classes, len(source)
        num_classes = num_classes or classes
        num_examples = num_examples or examples
    return num_classes, num_examples


def train_batches(
    source: Source,
    data: DataConfig,
    *,
    batch_size: int,
    image_size: tuple[int, int],
    seed: int,
    start_step: int = 0,
    rows: np.ndarray | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Iterates over this process's batches of steps start_step, start_step + 1, ... without end.

    Close the iterator, or drop it, to stop its threads and processes.

    Args:
      source: the examples.
      data: how to preprocess them, and how eagerly.
      batch_size: B, of all processes together.
      image_size: H, W.
      seed: of the order and of the random preprocessing, 0 <= seed < 2**64.
      start_step: the first step to yield: how to resume.
      rows: int [b], this process's rows of the global batch; all of them by default.

    Returns:
      Iterator of {"image": uint8 [b, H, W, 3], "label": int32 [b], or for a multi-label source
      [b, K] padded with -1}.

    Raises:
      ValueError: at once for a preprocessing that does not work on the first example; while
        iterating for a broken example.
    """
    read = _batch_reader(source, data.preprocess, image_size, seed)
    rows = _checked_rows(batch_size, rows)

    def batch(step: int) -> dict[str, np.ndarray]:
        positions = [step * batch_size + row for row in rows]
        return read(_stream(seed, positions, len(source)), positions)

    return _run_ahead(batch, range(start_step, 1 << 62), data)


def eval_batches(
    source: Source,
    data: DataConfig,
    *,
    batch_size: int,
    image_size: tuple[int, int],
    rows: np.ndarray | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Iterates over every example exactly once, in order; all processes yield as many batches.

    The last global batch is filled up with rows whose mask is False: their image is 0, their label
    and index -1. Random preprocessing depends on the index alone.

    Args: as for `train_batches`.

    Returns:
      Iterator of ceil(N / B) dicts as `train_batches` yields them, with "mask": bool [b] and
      "index": int64 [b].

    Raises:
      ValueError: as `train_batches`.
    """
    read = _batch_reader(source, data.preprocess, image_size, seed=0)
    rows = _checked_rows(batch_size, rows)
    num_batches = -(-len(source) // batch_size)

    def batch(step: int) -> dict[str, np.ndarray]:
        index = np.array(rows, np.int64) + step * batch_size
        index[index >= len(source)] = -1
        return read(index, index) | {"mask": index >= 0, "index": index}

    return _run_ahead(batch, range(num_batches), data)


def _stream(seed: int, positions: Iterable[int], num_examples: int) -> np.ndarray:
    """The examples at these positions of the training stream: int64."""
    order = (
        _epoch_order(seed, p // num_examples, num_examples)(p % num_examples) for p in positions
    )
    return np.fromiter(order, np.int64)


@functools.lru_cache(maxsize=8)
def _epoch_order(seed: int, epoch: int, num_examples: int) -> Callable[[int], int]:
    """A random permutation of range(num_examples), as a function."""
    key = np.random.SeedSequence((seed, epoch))
    # Grain permutes at least 2**16 numbers and skips those out of range: milliseconds an index for
    # a small set. A table is quicker there.
    if num_examples <= 1 << 16:
        return np.random.default_rng(key).permutation(num_examples).__getitem__
    # Four rounds, as Grain itself uses, leave neighbours visibly dependent; eight do not.
    (word,) = key.generate_state(1)
    return functools.partial(
        grain.experimental.index_shuffle, max_index=num_examples - 1, seed=int(word), rounds=8
    )


def _checked_rows(batch_size: int, rows: np.ndarray | None) -> list[int]:
    """This process's rows of the global batch."""
    if batch_size < 1:
        raise ValueError(f"batch size {batch_size}: expected at least 1")
    if rows is None:
        return list(range(batch_size))
    if not len(rows) or not 0 <= min(rows) <= max(rows) < batch_size:
        raise ValueError(f"rows {rows} of a batch of {batch_size}: expected some, each within it")
    return [int(row) for row in rows]


def _batch_reader(source: Source, preprocess: str, image_size: tuple[int, int], seed: int):
    """(indices, positions) -> batch; fails at once if the first example does not pass."""
    if not len(source):
        raise ValueError("the source is empty: expected at least one example")
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed {seed}: expected 0 <= seed < 2**64")
    augment = parse_preprocess(preprocess, image_size)
    single_label = source.labels_per_example is None

    def read(indices, positions) -> dict[str, np.ndarray]:
        image = np.zeros((len(indices), *image_size, 3), np.uint8)
        label = np.full((len(indices), source.labels_per_example or 1), -1, np.int32)
        for row, (index, position) in enumerate(zip(indices, positions, strict=True)):
            if index < 0:
                continue  # padding
            try:
                record = source[int(index)]
                rng = np.random.Generator(np.random.Philox(key=[seed, position]))
                image[row] = _fitting(augment(decode_image(record["image"]), rng), image_size)
                labels = _valid_labels(record["label"], source)
                label[row, : len(labels)] = labels
            except ValueError as error:
                raise ValueError(f"{source.describe(int(index))}: {error}") from error
        return {"image": image, "label": label[:, 0] if single_label else label}

    read([0], [0])
    return read


def _fitting(image: np.ndarray, image_size: tuple[int, int]) -> np.ndarray:
    if image.shape != (*image_size, 3):
        raise ValueError(
            f"preprocessing gives an image of {image.shape[0]} x {image.shape[1]}, expected "
            f"{image_size[0]} x {image_size[1]}: add `resize` or a crop"
        )
    return image


def _valid_labels(label, source: Source) -> np.ndarray:
    """One label or several as an array."""
    labels = np.atleast_1d(label)
    if source.labels_per_example is None and len(labels) != 1:
        raise ValueError(f"it has {len(labels)} labels: expected one")
    if len(labels) > (source.labels_per_example or 1):
        raise ValueError(f"it has {len(labels)} labels: expected up to {source.labels_per_example}")
    if len(labels) and not 0 <= labels.min() <= labels.max() < source.num_classes:
        raise ValueError(f"label {label}: expected 0 <= label < {source.num_classes}")
    return labels


def _run_ahead(
    batch: Callable[[int], dict[str, np.ndarray]],
    steps: range,
    data: DataConfig,
) -> Iterator[dict[str, np.ndarray]]:
    """Iterates over batch(step) for the steps, in order."""
    if data.num_workers and not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain's workers read absl flags; notebooks parse none
    threads = grain.ReadOptions(data.num_threads, max(data.prefetch, data.num_threads))
    workers = grain.MultiprocessingOptions(data.num_workers, per_worker_buffer_size=1)
    dataset = grain.MapDataset.source(steps).map(batch).to_iter_dataset(threads)
    batches = iter(dataset.mp_prefetch(workers))
    try:
        yield from batches
    finally:
        batches.close()
