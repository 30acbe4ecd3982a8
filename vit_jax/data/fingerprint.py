"""Fingerprints of datasets (sizes, names, digests of examples), to detect changes."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from vit_jax.data.mixture import Mixture
from vit_jax.data.slices import listed
from vit_jax.data.sources import Source

SAMPLE = 32  # examples per source whose images are digested


def fingerprint(source: Source) -> dict[str, Any]:
    """Describes a source in JSON types; the same on every host and in every folder.

    `listing` is a digest of what is known of all examples without reading them, such as file names
    and labels. `sample` is a digest of the images and labels of some evenly spaced examples.
    """
    known = {
        "examples": len(source),
        "classes": source.num_classes,
        "class_names": list(source.class_names) if source.class_names else None,
    }
    if isinstance(source, Mixture):
        return {**known, "parts": [fingerprint(part) for part in source.records.sources]}
    count = min(SAMPLE, len(source))
    indices = [round(i * (len(source) - 1) / max(count - 1, 1)) for i in range(count)]
    return {
        **known,
        "listing": _digest(listed(source.records, 0, len(source))),
        "sample": _digest(part for index in indices for part in _example(source, index)),
    }


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Describes how two fingerprints differ in the fields that both have; [] if they don't."""
    found = []
    for name in before.keys() & now.keys():
        old, new = before[name], now[name]
        if old == new:
            continue
        if name == "class_names" and not (old and new):
            found.append("classes had names, now have none" if old else "classes had no names")
        elif name == "class_names":
            gone, added = (sorted({*a} - {*b}) for a, b in ((old, new), (new, old)))
            shown = [
                f"{kind}: {', '.join(names[:10])}"
                for kind, names in (("gone", gone), ("new", added))
                if names
            ]
            found.append(f"classes {'; '.join(shown) or 'are in another order'}")
        elif name == "parts":
            if len(old) != len(new):
                found.append(f"{len(old)} parts then, {len(new)} now")
            found += [
                f"part {i}: {text}"
                for i, pair in enumerate(zip(old, new, strict=False))
                for text in differences(*pair)
            ]
        elif name in ("listing", "sample"):
            what = "the list of files or labels" if name == "listing" else "images or labels"
            found.append(f"{what} changed")
        elif name == "weights":
            found.append("its weights changed")
        else:
            found.append(f"{old:,} {name} then, {new:,} now")
    return sorted(found)


def _digest(parts: Iterator[bytes]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def _example(source: Source, index: int) -> Iterator[bytes]:
    try:
        record = source[index]
    except ValueError:  # unreadable; the pipeline reports it when it needs the example
        yield b"broken"
        return
    image = record["image"]
    if isinstance(image, np.ndarray):
        yield json.dumps(image.shape).encode()
    yield image.tobytes() if isinstance(image, np.ndarray) else bytes(image)
    yield json.dumps(np.asarray(record["label"]).tolist()).encode()
