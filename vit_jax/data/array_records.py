"""Reads datasets in ArrayRecord format, as written by TFDS or `vit_jax.prepare`."""

import os
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from itertools import accumulate
from typing import Any

from google.protobuf.json_format import ParseError
from google.protobuf.message import DecodeError

from vit_jax.config import InputError, unknown
from vit_jax.data.foreign_files import check_regular, open_files_limit, system_error
from vit_jax.data.listing import Listing
from vit_jax.data.tfds_metadata import METADATA, check_metadata
from vit_jax.data.walk import check_mounted
from vit_jax.parallel.run_files import as_path

LABEL_FEATURES = ("label", "labels", "real_label")  # the last is imagenet2012_real's
MAX_LABELS = 32  # per example of a multi-label dataset
# Packages that building datasets with TFDS needs. It imports the last two without declaring them.
INSTALL = "pip install tensorflow-cpu apache-beam mlcroissant"


# What TFDS and protobuf raise for malformed metadata or records.
_MALFORMED = (DecodeError, ParseError, AttributeError, IndexError, KeyError, TypeError)


@dataclass(frozen=True)
class ArrayRecords(Sequence):
    """The examples of a split.

    Attributes:
      decode: serialized record -> features; images stay encoded.
      shards: paths of the split's files.
      starts: index of each shard's first example, then the number of examples.
      label: name of the label feature, or a function that derives the label from a record.
    """

    decode: Callable[[bytes], Mapping[str, Any]]
    shards: tuple[str, ...]
    starts: tuple[int, ...]
    label: str | Callable[[Mapping[str, Any]], int]

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self._record(index)
        label = self.label(record) if callable(self.label) else record[self.label]
        return {"image": record["image"], "label": label}

    def _record(self, index: int) -> Mapping[str, Any]:
        shard, position = self._place(index)
        try:
            return self.decode(_readers()(self.shards[shard]).read([position])[0])
        except RuntimeError as error:  # from the C++ reader, which verifies checksums
            if fault := system_error(error):
                raise fault from error
            raise InputError(f"cannot read it: {error}") from error
        except _MALFORMED as error:
            raise InputError(f"cannot read it: {type(error).__name__}: {error}") from error

    def _place(self, index: int) -> tuple[int, int]:
        shard = bisect_right(self.starts, index) - 1
        return shard, index - self.starts[shard]

    def name(self, index: int) -> str:
        shard, position = self._place(index)
        place = f"record {position} of {os.path.basename(self.shards[shard])}"
        try:
            file = self._record(index).get("file_name")
        except (ValueError, OSError):  # the record itself cannot be read
            file = None
        return f"{place}, {file.decode(errors='replace')}" if file else place

    def listed(self, start: int, stop: int) -> Iterator[bytes]:
        """Yields the name and index range of each shard that holds some of the examples."""
        for shard, first, end in zip(self.shards, self.starts, self.starts[1:], strict=False):
            if first < stop and end > start:
                yield f"{os.path.basename(shard)} {first} {end}".encode()

    def check(self) -> None:
        """Opens every shard.

        Raises FileNotFoundError if shards are missing. Raises ValueError if one is truncated, or if
        its number of records differs from the dataset's metadata.
        """
        from array_record.python.array_record_module import ArrayRecordReader
        from etils import epath

        def count(path: str) -> int | str | None:
            if not epath.Path(path).exists():
                return None
            if os.path.exists(path):  # it may be in a bucket
                check_regular(path)
            try:
                reader = ArrayRecordReader(path)
                found = reader.num_records()
                reader.close()
            except RuntimeError as error:
                if fault := system_error(error):
                    raise fault from error
                return str(error)
            return found

        with ThreadPoolExecutor(32) as pool:  # mounted buckets answer slowly
            counts = dict(zip(self.shards, pool.map(count, self.shards), strict=True))
        missing = [path for path, found in counts.items() if found is None]
        if missing:
            raise FileNotFoundError(
                f"{len(missing)} of {len(self.shards)} shards are missing, such as {missing[0]}"
            )
        for i, (path, found) in enumerate(counts.items()):
            if isinstance(found, str):
                raise InputError(f"shard {path} is truncated or damaged: {found}")
            if found != self.starts[i + 1] - self.starts[i]:
                raise InputError(
                    f"shard {path} holds {found} records, its dataset_info.json says "
                    f"{self.starts[i + 1] - self.starts[i]}"
                )


@cache
def _readers() -> Callable[[str], Any]:
    """Returns a function path -> reader that keeps the most recently used readers open."""
    return lru_cache(maxsize=max(16, min(4096, open_files_limit() // 4)))(_open_reader)


def _open_reader(path: str) -> Any:
    from array_record.python.array_record_module import ArrayRecordReader

    options = "readahead_buffer_size:0"  # for random access to single records
    return ArrayRecordReader(path, options=options, file_reader_buffer_size=1 << 15)


_VERSION = r"(\d+|\*)(\.(\d+|\*)){0,2}(/.*)?|experimental_latest"


def open_array_records(
    name: str,
    data_dir: str | None,
    known: Sequence[str] = (),
    *,
    label: Callable[[Mapping[str, Any]], int] | None = None,
    num_classes: int | None = None,
) -> Listing:
    """Opens a prepared dataset.

    Args:
      name: its name, or the path of the folder that holds its files.
      data_dir: see `sources.open_source`.
      known: other dataset names, suggested in the error for an unknown dataset.
      label: derives a record's label, one of `num_classes`, for datasets without a label feature.

    Raises:
      ValueError: an unknown dataset, or features other than those of image classification.
      FileNotFoundError: the dataset is not prepared, or not as ArrayRecord.
    """
    check_mounted(os.environ.get("TFDS_DATA_DIR", ""))  # whose import would wait for minutes
    import tensorflow_datasets as tfds  # takes half a second; embedded datasets don't need it

    builder = _builder(name, data_dir, known)
    features = builder.info.features
    label_feature = next((f for f in LABEL_FEATURES if f in features), None)
    if label and "image" in features:
        return Listing("TFDS dataset", _splits(builder, features, label), num_classes)
    if "image" not in features or label_feature is None:
        raise InputError(
            f"{name} has the features {', '.join(sorted(features))}: "
            f"expected `image` and one of {', '.join(LABEL_FEATURES)}"
        )
    classes, labels_per_example = features[label_feature], None
    if isinstance(classes, tfds.features.Sequence):
        classes = classes.feature
        labels_per_example = MAX_LABELS
    if not isinstance(classes, tfds.features.ClassLabel):
        raise InputError(
            f"{name}'s feature `{label_feature}` is {classes}: expected a ClassLabel or a Sequence "
            "of ClassLabel, which states the number of classes"
        )
    splits = _splits(builder, features, label_feature)
    return Listing(
        "TFDS dataset", splits, classes.num_classes, tuple(classes.names), labels_per_example
    )


def _splits(builder: Any, features: Mapping[str, Any], label: Any) -> dict[str, ArrayRecords]:
    import tensorflow_datasets as tfds

    _readers().cache_clear()  # files may have changed since they were opened
    # TFDS doesn't decode images: the pipeline does, in parallel, and only those it uses.
    images = [f for f, feature in features.items() if isinstance(feature, tfds.features.Image)]
    decoders = {f: tfds.decode.SkipDecoding() for f in images}
    splits = {}
    for split in builder.info.splits:
        dataset = builder.as_data_source(split=split).dataset_info  # has the chosen file format
        info = dataset.splits[split]
        starts = tuple(accumulate(info.shard_lengths, initial=0))
        shards = tuple(map(os.fspath, info.filepaths))
        decode = partial(dataset.features.deserialize_example_np, decoders=decoders)
        splits[split] = ArrayRecords(decode, shards, starts, label)
    return splits


def _builder(name: str, data_dir: str | None, known: Sequence[str]):
    """Returns the TFDS builder of a dataset that is prepared in ArrayRecord format."""
    import tensorflow_datasets as tfds
    from etils import epath

    folder = os.path.expanduser(name)
    is_folder = bool(folder) and (as_path(folder) / METADATA).exists()
    if is_folder:
        check_metadata(epath.Path(folder))
    else:
        _check_prepared(name, data_dir)
    try:
        if is_folder:
            builder = tfds.builder_from_directory(folder)
        else:
            builder = tfds.builder(name, data_dir=data_dir)
    except tfds.core.registered.DatasetNotFoundError as error:
        root = epath.Path(data_dir or tfds.core.constants.DATA_DIR).expanduser()
        found = [path.name for path in root.iterdir()] if root.exists() else []
        registered = tfds.list_builders(with_community_datasets=False)
        error_with_names = unknown("dataset", name, {*known, *found, *registered})
        if os.path.exists(name):
            raise InputError(f"{error_with_names}. For the path, write ./{name}") from error
        raise error_with_names from error
    except (AssertionError, ValueError, *_MALFORMED) as error:  # or a version it cannot build
        raise InputError(f"cannot open {name}: {error} ({type(error).__name__})") from error
    folder = builder.data_dir
    if not builder.info.splits:
        command = f"tfds build {name} --file_format=array_record"
        command += f" --data_dir={data_dir}" if data_dir else ""
        manual = builder.MANUAL_DOWNLOAD_INSTRUCTIONS
        if manual:
            command += (
                f" --manual_dir=DIR\nPut the files that must be fetched by hand into DIR: {manual}"
            )
        if name.partition(":")[0] == "imagenet2012":
            command += "\nor, without TensorFlow, python -m vit_jax.prepare --input=DIR --output="
            command += f"{data_dir or 'DATA_DIR'} --name=imagenet2012"
        raise FileNotFoundError(
            f"{name} is not prepared: {folder} holds no dataset. Prepare it with\n"
            f"  {INSTALL}\n  {command}"
        )
    formats = {file_format.value for file_format in builder.info.available_file_formats()}
    if "array_record" not in formats:
        raise FileNotFoundError(
            f"{folder} holds {', '.join(sorted(formats))} files, expected array_record. "
            f"Convert them with\n  {INSTALL}\n"
            f"  tfds convert_format --dataset_version_dir={folder} --out_file_format=array_record"
        )
    return builder


def _check_prepared(name: str, data_dir: str | None) -> None:
    """Checks the metadata of all prepared versions and configs of a dataset.

    Raises ValueError for "huggingface:mnist" and others whose code TFDS would fetch and run.
    """
    from etils import epath
    from tensorflow_datasets.core.utils import file_utils

    namespace, colon, rest = name.partition(":")
    if colon and not re.fullmatch(_VERSION, rest):
        raise InputError(
            f"{name}: expected a dataset of TFDS itself, perhaps with a version, name:1.0.0. "
            f"A dataset of a community, {namespace}:, runs code of its own: store its images in "
            "folders, one a class, and name that folder"
        )
    dataset = re.split("[:/]", name)[0]
    for root in file_utils.list_data_dirs(data_dir):
        folder = epath.Path(root).expanduser() / dataset
        for pattern in (f"*/{METADATA}", f"*/*/{METADATA}"):
            for file in folder.glob(pattern) if folder.exists() else ():
                check_metadata(file.parent)


def build_with_tfds(name: str, data_dir: str) -> str:
    """Downloads and builds a dataset with TFDS, as ArrayRecord; returns its folder.

    Raises ValueError if TFDS doesn't know the dataset, if it must be fetched by hand, or if
    building it needs packages that aren't installed.
    """
    import tensorflow_datasets as tfds

    _check_prepared(name, data_dir)
    try:
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    except tfds.core.registered.DatasetNotFoundError as error:
        raise InputError(
            f"{name}: TFDS knows no such dataset. For a path, write ./{name}"
        ) from error
    if builder.MANUAL_DOWNLOAD_INSTRUCTIONS and not builder.info.splits:
        raise InputError(
            f"{name} must be fetched by hand: {builder.MANUAL_DOWNLOAD_INSTRUCTIONS}\nThen, for "
            f"imagenet2012, --input=DIR --name={name}; for others, tfds build {name} "
            f"--file_format=array_record --data_dir={data_dir} --manual_dir=DIR"
        )
    try:
        builder.download_and_prepare()
    except ImportError as error:
        raise InputError(f"{error}: TFDS needs more packages: {INSTALL}") from error
    return str(builder.data_dir)
