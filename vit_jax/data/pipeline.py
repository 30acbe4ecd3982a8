"""The input pipeline: (seed, step) -> this process's rows of the global batch.

The training data are one endless stream: epoch after epoch, each in its own random order. Step n
takes positions n * B to (n + 1) * B - 1, whatever the number of processes, workers and threads. The
random numbers that preprocess an example or replace a broken one depend on (seed, position) alone.
So the step is the only state. Grain only runs the function step -> batch ahead and in parallel.

Dimensions: B global batch, b local batch, H W image size, K labels per example.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np
from absl import flags, logging

from vit_jax.config import InputError, setting
from vit_jax.data.augment import Size, parse_preprocess
from vit_jax.data.mixture import Mixture, PartConfig, open_mixture
from vit_jax.data.order import epoch_stream, mixture_stream
from vit_jax.data.sources import Source, open_source, parse_split

_REPLACEMENTS = 16  # examples to try in place of a broken one


@dataclass(frozen=True)
class DataConfig:
    """What to read, and with how many threads and processes.

    Attributes:
      dataset: a name or path, as `sources.open_source` reads it.
      split: as in TFDS: train[:99%], train+validation.
      data_dir: folder of prepared TFDS datasets; None: TFDS's own default.
      mixture: used instead of `dataset`: name -> a dataset with a weight, see `mixture.PartConfig`.
        One epoch is as many examples as all parts have together.
      mixture_labels: `shared` or `concatenated`: see `mixture.open_mixture`.
      preprocess: see `augment.parse_preprocess`.
      num_threads: threads that make batches, each one batch at a time; 0 for none.
      num_workers: worker processes, each with `num_threads` threads; 0 for threads in this process.
        Workers are spawned, so the program must guard its `__main__`. They pass batches through
        /dev/shm, which is small in containers by default.
      prefetch: local batches that each worker makes ahead, at least one per thread.
      cache_gib: GiB of examples, encoded or drawn, that each process or worker keeps in memory:
        those that it reads first.
      skip_broken: broken examples (undecodable, or with a label out of range) that each process
        skips with a warning; one more is an error. In training another example of the same dataset
        replaces each.
    """

    dataset: str = ""
    split: str = "train"
    preprocess: str = "resize"
    data_dir: str | None = setting(None, changes="speed")
    num_threads: int = setting(8, changes="speed")
    num_workers: int = setting(0, changes="speed")
    prefetch: int = setting(4, changes="speed")
    mixture: dict[str, PartConfig] = setting(factory=dict)
    mixture_labels: str = "shared"
    cache_gib: float = setting(0.0, changes="speed")
    skip_broken: int = setting(0, changes="records")

    def __post_init__(self):
        if bool(self.dataset) == bool(self.mixture):
            raise InputError(
                f"dataset = {self.dataset!r} and mixture of {list(self.mixture)}: "
                "set exactly one of them"
            )
        for name in ("num_threads", "num_workers", "prefetch", "cache_gib", "skip_broken"):
            if getattr(self, name) < 0:
                raise InputError(f"data.{name} = {getattr(self, name)}: expected at least 0")


def open_data(data: DataConfig) -> Source:
    """Opens the dataset or the mixture. Raises as `open_source` and `open_mixture`."""
    if data.mixture:
        return open_mixture(data.mixture, data.mixture_labels)
    return open_source(data.dataset, data.split, data.data_dir)


def global_indices(seed: int, step: int, batch_size: int, num_examples: int) -> np.ndarray:
    """Returns a step's examples of one dataset, for all processes together: int64 [B]."""
    return epoch_stream(seed, range(step * batch_size, (step + 1) * batch_size), num_examples)


# Numbers of classes and examples, so that runs can be planned without the data. JFT-300M: arXiv
# 2010.11929; JFT-3B: arXiv 2106.04560 ("nearly 3 billion").
DATASETS: dict[str, tuple[int, dict[str, int]]] = {
    "imagenet2012": (1000, {"train": 1_281_167, "validation": 50_000}),
    "imagenet21k": (21_843, {"full": 14_197_122}),
    "jft300m": (18_291, {"train": 303_000_000}),
    "jft3b": (29_593, {"train": 3_000_000_000}),
}


def dataset_size(
    data: DataConfig, num_classes: int | None = None, num_examples: int | None = None
) -> tuple[int, int]:
    """Returns the numbers of classes and of the split's examples.

    They are those given, else those in `DATASETS`, else those of the opened dataset. Raises as
    `open_data`.
    """
    if num_classes is None or num_examples is None:
        name = data.dataset.partition(":")[0]
        if name in DATASETS:
            classes, sizes = DATASETS[name]
            examples = sum(b - a for _, a, b in parse_split(data.split, sizes, name))
        else:
            try:
                source = open_data(data)
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
    image_size: Size | Mapping[int, Size],
    seed: int,
    start_step: int = 0,
    rows: np.ndarray | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Iterates over this process's batches of steps start_step, start_step + 1, ... without end.

    Close or drop the iterator to stop its threads and processes.

    Args:
      source: the examples.
      data: how to preprocess them, and with how many threads and processes.
      batch_size: B, of all processes together.
      image_size: H, W; or these by the first step that has them, of which one is 0.
      seed: for the order and the random preprocessing, 0 <= seed < 2**64.
      start_step: the first step to yield; not 0 when a run resumes.
      rows: int [b], this process's rows of the global batch; all of them by default.

    Returns:
      Iterator of {"image": uint8 [b, H, W, 3], "label": int32 [b], or for a multi-label source
      [b, K] padded with -1}. With `skip_broken` also "skipped": bool [b], True where another
      example replaces a broken one.

    Raises:
      ValueError: immediately if preprocessing fails on the first example; while iterating if an
        example is broken.
    """
    sizes = image_size if isinstance(image_size, Mapping) else {0: image_size}
    read = _batch_reader(source, data, sizes.values(), seed)
    rows = _checked_rows(batch_size, rows)

    def batch(step: int) -> dict[str, np.ndarray]:
        size = sizes[max(first for first in sizes if first <= step)]
        positions = [step * batch_size + row for row in rows]
        if isinstance(source, Mixture):
            indices = mixture_stream(seed, positions, source.sizes, source.weights)
        else:
            indices = epoch_stream(seed, positions, len(source))
        return read(indices, positions, size)

    return _run_ahead(batch, range(start_step, 1 << 62), data)


def eval_batches(
    source: Source,
    data: DataConfig,
    *,
    batch_size: int,
    image_size: Size,
    rows: np.ndarray | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Iterates over every example exactly once, in order, with equally many batches per process.

    The last global batch is padded with rows whose mask is False, image 0, label -1 and index -1.
    Random preprocessing depends on the index alone.

    Args: as for `train_batches`.

    Returns:
      Iterator of ceil(N / B) dicts as `train_batches` yields them, with "mask": bool [b] and
      "index": int64 [b]. The mask is also False where a broken example was skipped.

    Raises:
      ValueError: as `train_batches`.
    """
    read = _batch_reader(source, data, [image_size], seed=None)
    rows = _checked_rows(batch_size, rows)
    num_batches = -(-len(source) // batch_size)

    def batch(step: int) -> dict[str, np.ndarray]:
        index = np.array(rows, np.int64) + step * batch_size
        index[index >= len(source)] = -1
        found = read(index, index, image_size)
        mask = index >= 0
        if data.skip_broken:
            mask &= ~found["skipped"]
        return found | {"mask": mask, "index": index}

    return _run_ahead(batch, range(num_batches), data)


def _checked_rows(batch_size: int, rows: np.ndarray | None) -> list[int]:
    """Returns this process's rows of the global batch."""
    if batch_size < 1:
        raise InputError(f"batch size {batch_size}: expected at least 1")
    if rows is None:
        return list(range(batch_size))
    if not len(rows) or not 0 <= min(rows) <= max(rows) < batch_size:
        raise InputError(f"rows {rows} of a batch of {batch_size}: expected some, all in the batch")
    return [int(row) for row in rows]


def _batch_reader(
    source: Source, data: DataConfig, sizes: Iterable[Size], seed: int | None
) -> Callable[[Sequence[int], Sequence[int], Size], dict[str, np.ndarray]]:
    """Returns a function (indices, positions, size) -> batch, after trying it on the first example.

    Without a seed, broken examples are left out, not replaced.
    """
    if not len(source):
        raise InputError("the source is empty: expected at least one example")
    if not 0 <= (seed or 0) < 1 << 64:
        raise InputError(f"seed {seed}: expected 0 <= seed < 2**64")
    augments = {size: parse_preprocess(data.preprocess, size) for size in sizes}
    single_label = source.labels_per_example is None
    records = _Cache(source, data.cache_gib) if data.cache_gib else source

    def example(index: int, position: int, size: Size) -> tuple[np.ndarray, np.ndarray]:
        try:
            record = records[index]
            rng = _generator(seed or 0, position)
            image = augments[size](record["image"], rng)
            return image, _valid_labels(record["label"], source)
        except ValueError as error:
            raise InputError(f"{source.describe(index)}: {error}") from error

    def another(broken: int, position: int, size: Size) -> tuple[np.ndarray, np.ndarray]:
        """Returns an example that replaces a broken one."""
        near = source.part_of(broken) if isinstance(source, Mixture) else range(len(source))
        rng = _generator(seed, position, purpose=1)
        for index in rng.integers(near.start, near.stop, size=_REPLACEMENTS):
            try:
                return example(int(index), position, size)
            except ValueError as error:
                found = error
        raise InputError(f"{_REPLACEMENTS} examples to replace it are broken too, such as {found}")

    def read(indices: Sequence[int], positions: Sequence[int], size: Size) -> dict[str, np.ndarray]:
        image = np.empty((len(indices), *size, 3), np.uint8)
        label = np.full((len(indices), source.labels_per_example or 1), -1, np.int32)
        skipped = np.zeros(len(indices), bool)
        for row, (index, position) in enumerate(zip(indices, positions, strict=True)):
            if index < 0:  # padding
                image[row] = 0
                continue
            try:
                pixels, labels = example(int(index), int(position), size)
            except ValueError as error:
                if not data.skip_broken:
                    raise
                logging.warning("skipped: %s", error)
                skipped[row] = True
                if seed is None:
                    image[row] = 0
                    continue
                pixels, labels = another(int(index), int(position), size)
            if pixels.shape != (*size, 3):
                raise InputError(
                    f"{source.describe(int(index))}: preprocessing gives an image of "
                    f"{pixels.shape[0]} x {pixels.shape[1]}, expected {size[0]} x "
                    f"{size[1]}: add `resize` or a crop"
                )
            image[row] = pixels
            label[row, : len(labels)] = labels
        batch = {"image": image, "label": label[:, 0] if single_label else label}
        return batch | ({"skipped": skipped} if data.skip_broken else {})

    for size in augments:
        read([0], [0], size)
    return read


def _generator(seed: int, position: int, purpose: int = 0) -> np.random.Generator:
    """Returns a position's generator; purpose 0: preprocessing, 1: replacing a broken example."""
    key = np.array([seed, position], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=purpose << 192))


class _Cache:
    """A source that keeps the records it reads first in memory, up to a limit in GiB."""

    def __init__(self, source: Source, gib: float):
        self._source, self._left, self._kept = source, gib * 2**30, {}

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        if (record := self._kept.get(index)) is None:
            record = self._source[index]
            self._left -= memoryview(record["image"]).nbytes  # bytes, or an array that is drawn
            if self._left > 0:
                self._kept[index] = record
        return record


def _valid_labels(label, source: Source) -> np.ndarray:
    """Returns one label or several as an array; ValueError if they don't fit the source."""
    single = source.labels_per_example is None
    if single and isinstance(label, (int, np.integer)) and 0 <= label < source.num_classes:
        return np.array([label])  # the usual case, seven times faster
    labels = np.atleast_1d(label)
    if single and len(labels) != 1:
        raise InputError(f"it has {len(labels)} labels: expected one")
    if len(labels) > (source.labels_per_example or 1):
        raise InputError(f"it has {len(labels)} labels: expected up to {source.labels_per_example}")
    if len(labels) and not 0 <= labels.min() <= labels.max() < source.num_classes:
        raise InputError(f"label {label}: expected 0 <= label < {source.num_classes}")
    return labels


def _run_ahead(
    batch: Callable[[int], dict[str, np.ndarray]],
    steps: range,
    data: DataConfig,
) -> Iterator[dict[str, np.ndarray]]:
    """Iterates over batch(step) in order; ValueError when too many examples were skipped."""
    if data.num_workers:
        # What a run that ends leaves in /dev/shm is removed by Python, which would warn of it.
        os.environ["PYTHONWARNINGS"] = "ignore:resource_tracker:UserWarning"
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain's workers read absl flags; notebooks parse none
    threads = grain.ReadOptions(data.num_threads, max(data.prefetch, data.num_threads))
    workers = grain.MultiprocessingOptions(data.num_workers, per_worker_buffer_size=1)
    dataset = grain.MapDataset.source(steps).map(batch).to_iter_dataset(threads)
    batches = iter(dataset.mp_prefetch(workers))
    skipped = 0
    try:
        for found in batches:
            skipped += int(found["skipped"].sum()) if data.skip_broken else 0
            if skipped > data.skip_broken:
                raise InputError(
                    f"{skipped} broken examples, more than skip_broken = {data.skip_broken}: see "
                    "the warnings above, and repair the dataset or raise the limit"
                )
            yield found
    except RuntimeError as error:
        if "Worker process was terminated" not in str(error):
            raise
        raise ChildProcessError(
            f"a worker process of the input was ended from outside ({error}). Most often memory or "
            "/dev/shm was full: lower data.num_workers, data.num_threads or data.prefetch"
        ) from error
    finally:
        batches.close()
