"""The plan of a dataset to write: the order of its examples, and its shards."""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from vit_jax.config import InputError
from vit_jax.data.listing import Listing

SHARD_BYTES = 128 << 20  # approximate size by default


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file to write: order[start:stop] of a split."""

    split: str
    file: str
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to write.

    Attributes:
      record: everything that determines the bytes, for the journal and the manifest.
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
            raise InputError(f"split {split!r}: expected letters, digits and underscores")
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
    """Describes the fields in which two plans differ."""
    return "; ".join(
        f"{key} {before.get(key)} there, {now.get(key)} here"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    )
