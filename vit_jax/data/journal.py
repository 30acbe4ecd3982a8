"""The plan of a dataset that is being written, and which of its shards are finished."""

import dataclasses
import fcntl
import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vit_jax.data.files import Listing

SHARD_BYTES = 128 << 20  # about so many by default


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file to be: order[start:stop] of a split."""

    split: str
    file: str
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """What will be written.

    Attributes:
      record: all that determines the bytes, for the journal and the manifest.
      orders: {split: indices of its examples in the order in which they are written}.
      shards: the files.
    """

    record: dict[str, Any]
    orders: dict[str, np.ndarray]
    shards: list[Shard]


def make_plan(listing: Listing, name: str, num_shards: int | None, shuffle: bool) -> Plan:
    """Orders the examples and cuts them into shards: see `writer.WriteConfig`."""
    plan, orders, shards = {"kind": listing.kind, "shuffle": shuffle, "splits": {}}, {}, []
    plan["classes"] = hashlib.sha256(
        json.dumps([listing.num_classes, listing.class_names]).encode()
    ).hexdigest()
    for split, records in listing.splits.items():
        if not re.fullmatch(r"\w+", split):
            raise ValueError(f"split {split!r}: expected letters, digits and underscores")
        sizes, digest, keys = records.sizes(), hashlib.sha256(), np.empty(len(records), np.uint64)
        for i in range(len(records)):
            key = records.name(i).encode(errors="surrogateescape")
            keys[i] = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big")
            digest.update(b"%b\0%d\0%b\0" % (key, sizes[i], str(records.labels[i]).encode()))
        orders[split] = keys.argsort(kind="stable") if shuffle else np.arange(len(records))
        wanted = num_shards or math.ceil(sizes.sum() / SHARD_BYTES)
        count = max(1, min(wanted, len(records)))
        plan["splits"][split] = {
            "examples": len(records),
            "bytes": int(sizes.sum()),
            "shards": count,
            "input": digest.hexdigest(),
        }
        for i in range(count):
            shards.append(
                Shard(
                    split,
                    f"{name}-{split}.array_record-{i:05d}-of-{count:05d}",
                    i * len(records) // count,
                    (i + 1) * len(records) // count,
                )
            )
    return Plan(plan, orders, shards)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The fields of a plan that differ, in words."""
    return "; ".join(
        f"{key} {before.get(key)} there, {now.get(key)} here"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    )


class Journal:
    """The plan and the finished shards, kept in the folder so that a killed run can go on."""

    NAME = "journal.jsonl"

    def __init__(self, folder: Path, plan: Mapping[str, Any]):
        self.folder = folder
        self.done: dict[str, dict[str, Any]] = {}  # {file: what is to be known about a shard}
        self._file = open(folder / self.NAME, "a+b")  # noqa: SIM115 (closed by __exit__)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OSError(f"another process is writing {folder}: wait for it to end") from error
        self._file.seek(0)
        lines = self._file.read().splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):  # the write that was cut off
            self._file.truncate(sum(map(len, lines[:-1])))
            lines.pop()
        if not lines:
            self._append(plan)
        begun = json.loads(lines[0]) if lines else plan
        if begun != plan:
            raise ValueError(
                f"{folder} was begun from another input or with other options "
                f"({differences(begun, plan)}): remove the folder to begin anew"
            )
        for line in lines[1:]:
            shard = json.loads(line)
            self.done[shard.pop("file")] = shard

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()

    def add(self, file: str, shard: dict[str, Any]) -> None:
        """Notes that a shard is finished and where it should be."""
        self._append({"file": file, **shard})
        self.done[file] = shard

    def _append(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(line, ensure_ascii=False).encode(errors="replace") + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
