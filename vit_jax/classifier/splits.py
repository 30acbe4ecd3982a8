"""Finds or cuts a dataset's train, dev and test splits, and keeps them with the run."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vit_jax.classifier.audit import Audit, few_left, look_at
from vit_jax.config import InputError
from vit_jax.data.listing import ImageFiles, Listing, split_named
from vit_jax.data.sources import Source, open_listing, open_source
from vit_jax.data.stratified import stratified_split
from vit_jax.data.tables import write_class_names, write_table
from vit_jax.data.walk import shown
from vit_jax.parallel.run_files import read_json, write_whole

TABLE = "splits.csv"


@dataclasses.dataclass(frozen=True)
class SplitConfig:
    """Names of a dataset's three splits, and the shares to cut if they are missing.

    `train` excludes the dev split. If `dev` is empty, its share is cut from `train`: for image
    files stratified by class, for other datasets its end, as in the paper, so its examples must be
    in random order. `test` is cut likewise, from image files only.

    Attributes:
      train, dev, test: names of splits.
      dev_share, test_share: shares to cut, in (0, 1).
      seed: seed of the cuts.
    """

    train: str = "train"
    dev: str = ""
    test: str = "test"
    dev_share: float = 0.1
    test_share: float = 0.2
    seed: int = 0

    def __post_init__(self):
        for name in ("dev_share", "test_share"):
            if not 0 < getattr(self, name) < 1:
                raise InputError(f"{name} = {getattr(self, name)}: expected a share in (0, 1)")


@dataclasses.dataclass(frozen=True)
class Splits:
    """Arguments of `open_source`: a dataset's name, and the names of its three splits."""

    dataset: str
    train: str
    dev: str
    test: str


def settle_splits(
    dataset: str, config: SplitConfig, data_dir: str | None, folder: Path
) -> tuple[Splits, Audit]:
    """Checks a dataset and cuts missing splits once; later calls read the result from `folder`.

    For image files, writes a table of all three splits to `folder`, which then is the dataset. It
    has no unreadable files, and splits that are cut here never share equal pixels. Raises
    ValueError for data that `audit.look_at` rejects, for splits that can't be cut, and for a
    dataset that has changed.
    """
    listing = open_listing(dataset, data_dir)
    made_of = {"dataset": dataset, **dataclasses.asdict(config), **_contents(listing)}
    file = folder / "audit.json"
    if file.exists():
        remedy = "remove it: it is made again, and equal if the data is"
        kept = read_json(file, remedy, keys=("made_of", "splits", "audit"))
        _check_same(dataset, kept["made_of"], made_of, folder)
        names = tuple(kept["audit"]["class_names"])
        splits = Splits(**kept["splits"])
        if Path(splits.dataset).name == TABLE and (folder / TABLE).exists():
            # The folder may have been moved or copied since.
            splits = dataclasses.replace(splits, dataset=str((folder / TABLE).absolute()))
        return splits, Audit(**{**kept["audit"], "class_names": names})
    folder.mkdir(parents=True, exist_ok=True)
    if all(isinstance(part, ImageFiles) for part in listing.splits.values()):
        splits, audit = _cut_files(dataset, listing, config, folder)
    else:
        splits, audit = _cut_by_name(dataset, listing, config, data_dir)
    content = {
        "made_of": made_of,
        "splits": dataclasses.asdict(splits),
        "audit": dataclasses.asdict(audit),
    }
    write_whole(file, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return splits, audit


def _contents(listing: Listing) -> dict[str, Any]:
    """Returns the classes, the number of images, and a digest of names and labels, not pixels."""
    digest, images = hashlib.blake2b(digest_size=16), 0
    for name, part in listing.splits.items():
        images += len(part)
        files = part.paths if isinstance(part, ImageFiles) else [len(part)]
        labels = part.labels if isinstance(part, ImageFiles) else []
        digest.update(json.dumps([name, list(files), list(labels)]).encode())
    names = list(listing.class_names or ())
    return {"classes": names, "images": images, "files": digest.hexdigest()}


def _check_same(dataset: str, before: dict, now: dict, folder: Path) -> None:
    if before == now:
        return
    what = [
        f"  {k}: {before.get(k)!r} then, {v!r} now" for k, v in now.items() if v != before.get(k)
    ]
    if set(before.get("classes", ())) != set(now.get("classes", ())):
        lost, new = (
            sorted(set(a.get("classes", ())) - set(b.get("classes", ())))
            for a, b in ((before, now), (now, before))
        )
        what = [f"  classes gone: {', '.join(lost) or 'none'}; new: {', '.join(new) or 'none'}"]
    raise InputError(
        f"{dataset} isn't what {folder} was made from:\n" + "\n".join(what) + "\nRestore it, or "
        "start again in another --workdir"
    )


def _cut_by_name(
    dataset: str, listing: Listing, config: SplitConfig, data_dir: str | None
) -> tuple[Splits, Audit]:
    train, dev = config.train, config.dev or "validation"
    if not config.dev and dev not in listing.splits:
        if "[" in train or "+" in train:
            raise InputError(f"split.train = {train!r}: set split.dev, the split to choose on")
        cut = f"{100 - 100 * config.dev_share:.0f}%"
        train, dev = f"{train}[:{cut}]", f"{train}[{cut}:]"
    splits = Splits(dataset, train, dev, config.test)
    parts = {name: getattr(splits, name) for name in ("train", "dev", "test")}
    sources = {name: open_source(dataset, part, data_dir) for name, part in parts.items()}
    audit = look_at(sources)
    if audit.broken:
        raise InputError(
            f"{dataset} has examples that can't be read: {audit.broken[:3]}. Prepare it again"
        )
    return splits, audit


def _cut_files(
    dataset: str, listing: Listing, config: SplitConfig, folder: Path
) -> tuple[Splits, Audit]:
    given = {
        "train": _split_of(listing, config.train),
        "dev": _split_of(listing, config.dev or "validation"),
        "test": _split_of(listing, config.test),
    }
    records = {name: listing.splits[part] for name, part in given.items() if part in listing.splits}
    if unused := listing.splits.keys() - given.values():
        raise InputError(
            f"{dataset} has the splits {', '.join(listing.splits)}; unused: "
            f"{', '.join(sorted(unused))}. Name the splits in split.train, split.dev, split.test"
        )
    if "train" not in records:
        raise InputError(f"{dataset} has the splits {', '.join(listing.splits)}: expected train")
    sources = {
        name: Source(part, listing.num_classes, listing.class_names, listing.labels_per_example)
        for name, part in records.items()
    }
    audit = look_at(sources)
    broken = {(image["split"], image["index"]) for image in audit.broken}
    rows = [  # (file, label, part)
        (os.path.abspath(os.path.join(part.folder, file)), label, name)
        for name, part in records.items()
        for index, (file, label) in enumerate(zip(part.paths, part.labels, strict=True))
        if (name, index) not in broken
    ]
    missing = [name for name in ("dev", "test") if name not in records]
    if missing:
        shares = {name: getattr(config, f"{name}_share") for name in missing}
        shares = {"train": 1 - sum(shares.values()), **shares}
        _check_enough(audit, shares)
        same = {
            os.path.abspath(os.path.join(records["train"].folder, image["file"])): group[0]["file"]
            for group in audit.duplicates
            for image in group
            if image["split"] == "train"
        }
        rows = _cut_rows(rows, same, shares, config.seed)
    names = audit.class_names
    write_class_names(folder, names)
    table = folder / TABLE
    write_table(table, ((file, names[label], part) for file, label, part in rows))
    counts = {name: [0] * len(names) for name in given}
    for _, label, part in rows:
        counts[part][label] += 1
    if empty := [name for name in given if not sum(counts[name])]:
        raise InputError(f"{dataset} leaves {', '.join(empty)} without an image: add images")
    splits = Splits(str(table.absolute()), "train", "dev", "test")
    findings = [*audit.findings, *few_left(names, counts["train"], audit.counts["train"])]
    for reason, files in listing.left_out.items():
        findings.append(f"{reason}, {len(files)}: {shown(files, most=10)}")
    return splits, dataclasses.replace(audit, counts=counts, findings=findings)


def _split_of(listing: Listing, name: str) -> str:
    """Returns the split of this name, or the only one with a synonym: val for validation."""
    same = [s for s in listing.splits if split_named(s) == split_named(name) is not None]
    return same[0] if name not in listing.splits and len(same) == 1 else name


def _check_enough(audit: Audit, shares: Mapping[str, float]) -> None:
    counts = dict(zip(audit.class_names, audit.counts["train"], strict=True))
    if alone := [name for name, count in counts.items() if count < len(shares)]:
        raise InputError(
            f"{', '.join(f'{name} has {counts[name]}' for name in alone[:10])} images: expected at "
            f"least {len(shares)}, one each for {', '.join(shares)}. Add images, join or remove "
            "these classes, or give the missing splits yourself: train/class/name.jpg, "
            "validation/..., test/..."
        )


def _cut_rows(
    rows: list[tuple], same: Mapping[str, str], shares: Mapping[str, float], seed: int
) -> list[tuple]:
    """Distributes the rows of `train` over the splits; files with equal pixels stay together."""
    whole = [i for i, (_, _, part) in enumerate(rows) if part == "train"]
    leaders: dict[str, int] = {}  # the first row of each group with equal pixels
    for i in whole:
        leaders.setdefault(same.get(rows[i][0], rows[i][0]), i)
    chosen = list(leaders.values())
    parts = stratified_split(np.array([rows[i][1] for i in chosen]), shares, seed)
    part_of = {chosen[i]: name for name, indices in parts.items() for i in indices}
    cut = list(rows)
    for i in whole:
        file, label, _ = rows[i]
        cut[i] = (file, label, part_of[leaders[same.get(file, file)]])
    return cut
