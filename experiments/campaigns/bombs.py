"""Small files that promise much: seconds and memory until they are read or refused."""

import gzip
import io
import json
import struct
import subprocess
import sys
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

MEMORY, SECONDS = 2.0, 20.0  # GiB above an idle process (89 megapixels of 20 bytes), and time
READ = """
import json, re, sys, time
from pathlib import Path
from vit_jax.data.decode import decode_image
from vit_jax.data.sources import open_source
kind, path = sys.argv[1], Path(sys.argv[2])
def kib(name):
    return int(re.search(rf"{name}:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
idle, began = kib("VmRSS"), time.perf_counter()
try:
    if kind == "image":
        outcome = f"read {decode_image(path.read_bytes()).shape}"
    elif kind == "prepared":
        outcome = f"read {len(open_source(path.name, 'train', str(path.parent)))} examples"
    else:
        outcome = f"read {len(open_source(str(path), 'train'))} examples"
except (ValueError, OSError) as error:
    outcome = f"refused: {error}"
peak = (kib("VmHWM") - idle) / 2**20
print(json.dumps({"outcome": outcome, "gib": round(peak, 2),
                  "seconds": round(time.perf_counter() - began, 2)}))
"""


def campaign(count: int, seed: int, folder: Path) -> dict[str, int]:
    """Reads each bomb in a process of its own; `count` and `seed` have no effect."""
    outcomes = Counter()
    for name, kind, path in _make(folder):
        done = subprocess.run(
            [sys.executable, "-c", READ, kind, str(path)],
            check=False,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            result = {"outcome": done.stderr.strip().splitlines()[-1]}
            outcome = "WRONG: no explanation"
        else:
            result = json.loads(done.stdout)
            within = result["gib"] <= MEMORY and result["seconds"] <= SECONDS
            outcome = result["outcome"].split(" ")[0].strip(":") if within else "WRONG: too much"
        print(json.dumps({"bomb": name, "bytes": _size(path), **result}), flush=True)
        outcomes[outcome] += 1
    return dict(outcomes)


def _size(path: Path) -> int:
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())


def _make(folder: Path):
    """Yields (name, kind, path) of every bomb."""
    for side in (9400, 16383):
        for suffix, options in (("webp", {"lossless": True}), ("png", {}), ("jpg", {})):
            path = folder / f"{side}.{suffix}"
            if not path.exists():
                Image.new("RGB", (side, side)).save(path, **options)
            yield f"{side**2 // 10**6} megapixels of one colour, {suffix}", "image", path
    path = folder / "scans.jpg"
    path.write_bytes(_scans(450))
    yield "progressive JPEG of 450 more scans, 16 megapixels", "image", path
    path = folder / "claims.png"
    path.write_bytes(_claimed_png(60000, 60000))
    yield "PNG that claims 3,600 megapixels", "image", path
    idx = folder / "idx"
    idx.mkdir(exist_ok=True)
    _write_idx(idx, 2**20)
    yield "IDX.gz of a GiB of zeros", "dataset", idx
    tfds = folder / "many" / "1.0.0"
    tfds.mkdir(parents=True, exist_ok=True)
    _write_metadata(tfds, classes=10**9, shards=10**6)
    yield "metadata of 10^9 classes and 10^6 shards", "prepared", folder / "many"


def _scans(count: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4000, 4000)).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    at = data.rindex(b"\xff\xda")
    return data[:at] + data[at:-2] * count + data[-2:]


def _claimed_png(width: int, height: int) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + crc

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    start = b"\x89PNG\r\n\x1a\n"
    return start + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def _write_idx(folder: Path, images: int) -> None:
    for part, count in (("train", images), ("t10k", 1024)):
        with gzip.open(folder / f"{part}-images-idx3-ubyte.gz", "wb", 9) as file:
            file.write(struct.pack(">IIII", 0x803, count, 32, 32))
            for _ in range(count >> 10):
                file.write(bytes(1 << 20))
        with gzip.open(folder / f"{part}-labels-idx1-ubyte.gz", "wb", 9) as file:
            file.write(struct.pack(">II", 0x801, count))
            file.write(np.zeros(count, np.uint8).tobytes())


def _write_metadata(folder: Path, classes: int, shards: int) -> None:
    prefix = "tensorflow_datasets.core.features"
    features = {
        "pythonClassName": f"{prefix}.features_dict.FeaturesDict",
        "featuresDict": {
            "features": {
                "image": {
                    "pythonClassName": f"{prefix}.image_feature.Image",
                    "image": {"shape": {"dimensions": ["-1", "-1", "3"]}, "dtype": "uint8"},
                },
                "label": {
                    "pythonClassName": f"{prefix}.class_label_feature.ClassLabel",
                    "classLabel": {"numClasses": str(classes)},
                },
            }
        },
    }
    (folder / "features.json").write_text(json.dumps(features))
    split = {"name": "train", "shardLengths": ["1"] * shards, "numBytes": "1"}
    split["filepathTemplate"] = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    info = {"name": "many", "version": "1.0.0", "fileFormat": "array_record", "splits": [split]}
    (folder / "dataset_info.json").write_text(json.dumps(info))
