"""Writes a sharded ArrayRecord dataset that TFDS reads; resumable, with the same bytes each time.

An unfinished dataset lies in `incomplete.VERSION`: the shards and a journal, whose first line is
the plan and each further line a finished shard. A killed run loses only the shard that it was
writing. At the end the folder gets a manifest of its files, then its final name.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import os
import re
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from PIL import Image
from tqdm import tqdm

from vit_jax.config import InputError
from vit_jax.data import jpeg_markers
from vit_jax.data.array_records import MAX_LABELS
from vit_jax.data.decode import decode_image
from vit_jax.data.idx import Pixels
from vit_jax.data.journal import Journal
from vit_jax.data.listing import Listing
from vit_jax.data.manifest import MANIFEST, file_list, file_sha256, progress_bar, read_manifest
from vit_jax.data.write_plan import Plan, Shard, differences, make_plan

NAMED = 100  # the manifest names at most this many images that are in two splits


@dataclasses.dataclass(frozen=True)
class WriteConfig:
    """How to write a dataset.

    Attributes:
      shards: files per split; by default one for each 128 MiB.
      shuffle: whether to write examples in the order of a hash of their names, so that a slice is a
        random sample; otherwise as they are listed.
      max_broken: most images to leave out because they cannot be read or decoded.
      max_overlap: most images to keep that are in two splits, byte for byte.
      restart_markers: whether JPEGs get markers with which a crop decodes less: see
        `jpeg_markers.add_markers`. Their pixels stay the same.
      threads: threads that read and check images; by default as many as there are cores.
    """

    shards: int | None = None
    shuffle: bool = True
    max_broken: int = 0
    max_overlap: int = 0
    restart_markers: bool = False
    threads: int | None = None


def write_dataset(
    listing: Listing, data_dir: Path, name: str, version: str | None, config: WriteConfig
) -> Path:
    """Writes a dataset into DATA_DIR/NAME/VERSION, or resumes a killed run.

    Each image is decoded once to check it. It is written unchanged, or with restart markers; pixels
    are written as PNG. Features are `image`, `label` (or `labels`, a sequence) and `file_name`.

    Args:
      listing: what to write.
      data_dir: TFDS's folder of datasets.
      name, version: of the dataset. By default the version is TFDS's own if TFDS knows a dataset of
        this name (so that `tfds.builder(name)` looks for it), else 1.0.0.
      config: how to write it.

    Returns:
      The dataset's folder.

    Raises:
      ValueError: more broken images, or more images in two splits, than allowed (the message names
        some); a dataset of this name, finished or not, from another input or with other options;
        restart markers without jpegtran.
      OSError: too little disk space, or another process is writing the same dataset.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise InputError(f"name {name!r}: expected lower-case letters, digits and underscores")
    if version and not re.fullmatch(r"\d+\.\d+\.\d+", version):
        raise InputError(f"version {version!r}: expected three numbers, such as 1.0.0")
    features = _features(listing)
    version = version or _default_version(name, features)
    plan = make_plan(listing, name, config.shards, config.shuffle)
    if config.restart_markers:
        jpeg_markers.jpegtran()
        plan.record["restart_markers"] = True
    final, folder = data_dir / name / version, data_dir / name / f"incomplete.{version}"
    if final.exists():
        made = read_manifest(final)["plan"]
        if made != plan.record:
            difference = differences(made, plan.record)
            raise InputError(f"{final} is there already, and differs: {difference}")
        (final / Journal.NAME).unlink(missing_ok=True)  # of a run killed at the very end
        return final

    folder.mkdir(parents=True, exist_ok=True)
    with Journal(folder, plan.record) as journal:
        _write_shards(listing, plan, features, journal, config)
        report = _report(listing, plan, journal.done)
        overlap = sum(entry["images"] for entry in report["overlaps"])
        if overlap > config.max_overlap:
            raise InputError(
                f"{overlap} images are in two splits, such as {report['overlaps'][0]['named'][0]}\n"
                "To keep up to N of them, run this again with --max_overlap=N: it takes seconds, "
                "all shards are written"
            )
        _write_metadata(folder, version, features, plan, journal.done)
        # A killed run may have left a manifest.
        files = file_list(folder, {Journal.NAME, MANIFEST}, journal.done)
        manifest = {"plan": plan.record, **report, "files": files}
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
        folder.rename(final)
    (final / Journal.NAME).unlink()
    return final


def _features(listing: Listing):
    """Returns TFDS's features for the listing."""
    import tensorflow_datasets as tfds

    if (listing.labels_per_example or 1) > MAX_LABELS:
        raise InputError(
            f"an example has {listing.labels_per_example} labels: expected up to {MAX_LABELS}"
        )
    names = listing.class_names
    for label in names or ():
        if not label.isprintable():  # such as undecodable bytes and line breaks
            raise InputError(f"class {label!r}: expected a name that can be printed")
    classes = tfds.features.ClassLabel(
        names=names, num_classes=None if names else listing.num_classes
    )
    several = listing.labels_per_example is not None
    records = next(iter(listing.splits.values()))
    shape = (*records.images.shape[1:], 1) if isinstance(records, Pixels) else None
    return tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=shape),
            "labels" if several else "label": tfds.features.Sequence(classes)
            if several
            else classes,
            "file_name": tfds.features.Text(),
        }
    )


def _default_version(name: str, features) -> str:
    import tensorflow_datasets as tfds

    try:
        known = tfds.builder(name, data_dir="/nowhere").info
    except tfds.core.registered.DatasetNotFoundError:
        return "1.0.0"
    label = "labels" if "labels" in features else "label"
    if (
        not {"image", label} <= known.features.keys() <= features.keys()
        or known.features[label].num_classes != features[label].num_classes
    ):
        raise InputError(
            f"TFDS has a dataset {name} of its own with the features {known.features}: "
            "choose another name"
        )
    return str(known.version)


def _check_room(plan: Plan, todo: Sequence[Shard], folder: Path) -> None:
    needed = 0.0
    for shard in todo:
        split = plan.record["splits"][shard.split]
        needed += split["bytes"] * (shard.stop - shard.start) / split["examples"]
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"{folder} needs {needed / 2**20:,.0f} MiB, {free / 2**20:,.0f} MiB are free there"
        )


def _write_shards(
    listing: Listing, plan: Plan, features, journal: Journal, config: WriteConfig
) -> None:
    """Writes the shards that aren't finished."""
    from tensorflow_datasets.core import example_serializer

    todo = [shard for shard in plan.shards if shard.file not in journal.done]
    _check_room(plan, todo, journal.folder)

    serializer = example_serializer.ExampleSerializer(features.get_serialized_info())
    label = "labels" if "labels" in features else "label"

    def load(item: tuple[str, int]) -> tuple[bytes, bytes] | str:
        """Returns the record and the hash of its original image, or why it is broken."""
        records, index = listing.splits[item[0]], int(item[1])
        try:
            record = records[index]
            pixels = decode_image(record["image"])
        except ValueError as error:
            return str(error)
        image = record["image"] if isinstance(record["image"], bytes) else _png(record["image"])
        digest = hashlib.blake2b(image, digest_size=8).digest()
        if config.restart_markers:
            image = _with_markers(image, pixels)
        example = {
            "image": io.BytesIO(image),
            label: record["label"],
            "file_name": records.name(index).encode(errors="replace").decode(),
        }
        # By default the order of a protocol buffer's map differs between processes.
        proto = serializer.get_tf_example(features.encode_example(example))
        return proto.SerializeToString(deterministic=True), digest

    items = (
        (shard.split, index)
        for shard in todo
        for index in plan.orders[shard.split][shard.start : shard.stop]
    )
    total = sum(map(len, plan.orders.values()))
    left = sum(shard.stop - shard.start for shard in todo)
    threads = config.threads or os.cpu_count()
    num_broken = sum(len(shard["broken"]) for shard in journal.done.values())
    with progress_bar(total, "img", initial=total - left) as bar:
        loaded = _ordered(load, items, threads)
        for shard in todo:
            written = _write_shard(
                shard,
                itertools.islice(loaded, shard.stop - shard.start),
                lambda position, shard=shard: listing.splits[shard.split].name(
                    plan.orders[shard.split][position]
                ),
                journal.folder,
                config.max_broken - num_broken,
                bar,
            )
            num_broken += len(written["broken"])
            if len(listing.splits) == 1:
                written["hashes"] = ""  # no other split to compare with
            journal.add(shard.file, written)
        loaded.close()


def _write_shard(
    shard: Shard,
    loaded: Iterable[tuple[bytes, bytes] | str],
    name: Callable[[int], str],
    folder: Path,
    may_break: int,
    bar: tqdm,
) -> dict[str, Any]:
    from array_record.python.array_record_module import ArrayRecordWriter

    unfinished = folder / f"{shard.file}.unfinished"
    writer = ArrayRecordWriter(str(unfinished), "group_size:1")  # as TFDS and Grain expect
    size, hashes, broken = 0, [], []
    for position, example in enumerate(loaded, shard.start):
        bar.update()
        if isinstance(example, str):
            broken.append({"split": shard.split, "file": name(position), "reason": example})
            if len(broken) > may_break:
                raise InputError(
                    f"broken images in {shard.split}, the last of them "
                    f"{broken[-1]['file']}: {example}\n"
                    "To leave out up to N of them, run this again with --max_broken=N"
                )
            logging.warning("left out %s: %s", broken[-1]["file"], example)
            continue
        with _disk_errors():
            writer.write(example[0])
        size += len(example[0])
        hashes.append(example[1])
    with _disk_errors():
        writer.close()
    with open(unfinished, "rb+") as file:
        os.fsync(file.fileno())
    sha256 = file_sha256(unfinished)
    unfinished.rename(folder / shard.file)
    return {
        "examples": len(hashes),
        "bytes": size,
        "sha256": sha256,
        "broken": broken,
        "hashes": b"".join(hashes).hex(),
    }


@contextlib.contextmanager
def _disk_errors() -> Iterator[None]:
    """Converts the C++ writer's errors, such as a full disk, to OSError."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(str(error)) from error


def _ordered(function: Callable, items: Iterable, threads: int) -> Iterator:
    """Like map(function, items), on threads that run a little ahead."""
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        running = deque()
        try:
            for item in items:
                running.append(pool.submit(function, item))
                if len(running) >= 4 * threads:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _with_markers(image: bytes, pixels: np.ndarray) -> bytes:
    """Returns the image with restart markers; unchanged if that fails or changes its pixels."""
    marked = jpeg_markers.add_markers(image)
    return marked if marked and np.array_equal(decode_image(marked), pixels) else image


def _png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def _report(listing: Listing, plan: Plan, done: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the broken images, and the images that are in two splits."""
    broken = [entry for shard in plan.shards for entry in done[shard.file]["broken"]]
    kept, hashes = {}, {}
    for split, records in listing.splits.items():
        lost = {entry["file"] for entry in broken if entry["split"] == split}
        kept[split] = [i for i in plan.orders[split] if not lost or records.name(i) not in lost]
        if not kept[split]:
            raise InputError(f"no image of {split} can be read: expected at least one")
        own = "".join(done[shard.file]["hashes"] for shard in plan.shards if shard.split == split)
        hashes[split] = np.frombuffer(bytes.fromhex(own), np.uint64)
    overlaps = []
    for a, b in itertools.combinations(listing.splits, 2):
        _, first, second = np.intersect1d(hashes[a], hashes[b], return_indices=True)
        if not len(first):
            continue
        named = [
            {a: listing.splits[a].name(kept[a][i]), b: listing.splits[b].name(kept[b][j])}
            for i, j in zip(first[:NAMED], second[:NAMED], strict=True)
        ]
        logging.warning("%d images are both in %s and in %s: %s", len(first), a, b, named[:3])
        overlaps.append({"splits": [a, b], "images": len(first), "named": named})
    return {"broken": broken, "overlaps": overlaps}


def _write_metadata(
    folder: Path,
    version: str,
    features,
    plan: Plan,
    done: Mapping[str, Mapping[str, Any]],
) -> None:
    import tensorflow_datasets as tfds

    splits = {}
    for shard in plan.shards:
        splits.setdefault(shard.split, []).append(done[shard.file])
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=features,
        version=version,
        split_infos=[
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=[shard["examples"] for shard in own],
                num_bytes=sum(shard["bytes"] for shard in own),
            )
            for split, own in splits.items()
        ],
        check_data=False,
        description=f"Written by vit_jax.prepare. See {MANIFEST}.",
    )
