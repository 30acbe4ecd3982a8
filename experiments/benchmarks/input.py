r"""Measures JPEG decoding and cropping: each stage, the whole pipeline, and tf.data.

python -m experiments.benchmarks.input --output=experiments/benchmarks/results/input.json

The JPEGs are 500 x 375 parts of photographs (scikit-learn's, and scikit-image's if installed) of
about 60 KB. If jpegtran is installed, they are also measured with restart markers, as
`prepare --restart_markers` writes them. All stages are timed alternately in one process. `cpu` is
images per second of CPU time, which other load changes little; `wall` is images per second on all
cores. tf.data runs if TensorFlow is installed, on JPEGs without markers:
sample_distorted_bounding_box, decode_and_crop_jpeg, resize, flip. Both decoders use libjpeg's
accurate transform and interpolate chroma.
"""

import importlib.util
import io
import itertools
import json
import multiprocessing
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
from absl import app, flags
from PIL import Image

from experiments.benchmarks.machine import processor, versions
from vit_jax.data import jpeg_markers
from vit_jax.data.augment import parse_preprocess
from vit_jax.data.decode import decode_image, open_image
from vit_jax.data.pipeline import DataConfig, train_batches
from vit_jax.data.sources import Source

ROUNDS = flags.DEFINE_integer("rounds", 7, "Rounds to take medians of.")
IMAGES = flags.DEFINE_integer("images", 1280, "Images per round of a pipeline.")
WIDTH = flags.DEFINE_integer("width", 500, "Width of the JPEGs; the height is 3/4 of it.")
KILOBYTES = flags.DEFINE_integer("kilobytes", 60, "Size of the JPEGs.")
OUTPUT = flags.DEFINE_string("output", "", "JSON file to write.")

SIZE, BATCH = (224, 224), 64
CROP = "inception_crop|flip"
MARKED = ", restart markers"
CORES = os.cpu_count()
PREFETCH = 2 * CORES  # batches
PACKAGES = ("numpy", "pillow", "simplejpeg", "opencv-python-headless", "grain", "jax")
PACKAGES += ("tensorflow", "tensorflow-cpu")


def photographs() -> list[np.ndarray]:
    """Returns photographs, uint8 [H, W, 3]."""
    from sklearn.datasets import load_sample_images

    found = list(load_sample_images().images)
    if importlib.util.find_spec("skimage"):
        from skimage import data

        found += [data.astronaut(), data.chelsea(), data.coffee(), data.rocket()]
    return found


def make_jpegs(count: int, width: int, kilobytes: int) -> list[bytes]:
    """Encodes random 4:3 parts of the photographs as JPEGs of about `kilobytes`."""
    rng = np.random.default_rng(0)
    jpegs = []
    for photo in itertools.islice(itertools.cycle(photographs()), count):
        most_h, most_w = photo.shape[:2]
        w = int(min(most_w, most_h * 4 / 3) * rng.uniform(0.85, 1))
        h = w * 3 // 4
        top, left = rng.integers(most_h - h + 1), rng.integers(most_w - w + 1)
        part = Image.fromarray(photo[top : top + h, left : left + w])
        part = part.resize((width, width * 3 // 4), Image.Resampling.LANCZOS)

        def encode(quality, part=part):
            file = io.BytesIO()
            part.save(file, "JPEG", quality=quality, subsampling="4:2:0")
            return file.getvalue()

        low, high = 20, 100
        while high - low > 1:
            middle = (low + high) // 2
            if len(encode(middle)) < kilobytes * 1000:
                low = middle
            else:
                high = middle
        jpegs.append(encode(low))
    return jpegs


def stages(jpegs: list[bytes]) -> dict[str, Callable[[bytes, int], object]]:
    """Returns functions (JPEG, seed), each of all stages up to the named one."""
    crop = parse_preprocess(CROP, SIZE)
    antialiased = parse_preprocess("inception_crop(method='bilinear_antialias')|flip", SIZE)
    whole = decode_image(jpegs[0])

    def rng(i):
        return np.random.Generator(np.random.Philox(key=np.array([0, i], np.uint64)))

    return {
        "read the header": lambda jpeg, i: open_image(jpeg),
        "decode all of it": lambda jpeg, i: open_image(jpeg).decode(),
        "decode all of it with Pillow": lambda jpeg, i: decode_image(jpeg),
        "draw the crop, resize, flip": lambda jpeg, i: crop(whole, rng(i)),
        "crop: all of these, no row below it": lambda jpeg, i: crop(open_image(jpeg), rng(i)),
        "crop with Pillow, antialiased": lambda jpeg, i: antialiased(decode_image(jpeg), rng(i)),
    }


class Meter:
    """Measures CPU and wall seconds of this process and its children."""

    def __init__(self):
        self.cpu, self.wall = self._cpu(), time.perf_counter()

    def read(self) -> tuple[float, float]:
        return self._cpu() - self.cpu, time.perf_counter() - self.wall

    @staticmethod
    def _cpu() -> float:
        seconds = time.process_time()
        for child in multiprocessing.active_children():
            fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
            seconds += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        return seconds


def raw(jpegs: list[bytes], threads: int) -> Iterator[int]:
    """Runs only the decoder, in threads; yields after every BATCH crops."""
    crop = parse_preprocess(CROP, SIZE)

    def work(step: int) -> int:
        for i in range(step * BATCH, (step + 1) * BATCH):
            rng = np.random.Generator(np.random.Philox(key=np.array([0, i], np.uint64)))
            crop(open_image(jpegs[i % len(jpegs)]), rng)
        return BATCH

    with ThreadPoolExecutor(threads) as pool:
        pending = [pool.submit(work, step) for step in range(PREFETCH)]
        for step in itertools.count(PREFETCH):
            yield pending.pop(0).result()
            pending.append(pool.submit(work, step))


def ours(
    jpegs: list[bytes], threads: int, workers: int = 0, put: bool = False, preprocess: str = CROP
) -> Iterator[int]:
    """Runs our pipeline into host memory, or with `put` into device memory."""
    source = Source([{"image": jpeg, "label": 0} for jpeg in jpegs], 1)
    data = DataConfig(
        "given",
        preprocess=preprocess,
        num_threads=threads,
        num_workers=workers,
        prefetch=PREFETCH // max(workers, 1),
    )
    batches = train_batches(source, data, batch_size=BATCH, image_size=SIZE, seed=0)
    try:
        under_way = None
        for batch in batches:
            if put:
                before, under_way = under_way, jax.device_put(batch)
                jax.block_until_ready(before)
            yield BATCH
    finally:
        batches.close()


def tensorflows(jpegs: list[bytes]) -> Iterator[int]:
    """Runs tf.data's pipeline."""
    import tensorflow as tf

    def crop(jpeg):
        begin, size, _ = tf.image.sample_distorted_bounding_box(
            tf.image.extract_jpeg_shape(jpeg),
            tf.zeros([0, 0, 4]),
            area_range=(0.05, 1.0),
            min_object_covered=0,
            use_image_if_no_bounding_boxes=True,
        )
        window = tf.concat([begin[:2], size[:2]], 0)
        image = tf.image.decode_and_crop_jpeg(jpeg, window, channels=3)
        image = tf.cast(tf.image.resize(image, SIZE), tf.uint8)
        return tf.image.random_flip_left_right(image)

    dataset = tf.data.Dataset.from_tensor_slices(jpegs).repeat()
    dataset = dataset.map(crop, num_parallel_calls=tf.data.AUTOTUNE).batch(BATCH)
    dataset = dataset.prefetch(PREFETCH)
    for _ in dataset.as_numpy_iterator():
        yield BATCH


def measure(start: Callable[[], Iterator[int]], images: int) -> tuple[float, float]:
    """Returns images per second of CPU time and of wall time, after warm-up."""
    batches = start()
    for _ in range(4 * CORES):
        next(batches)
    meter, done = Meter(), 0
    while done < images:
        done += next(batches)
    cpu, wall = meter.read()
    batches.close()
    return done / cpu, done / wall


def quality(jpegs: list[bytes], size: tuple[int, int]) -> dict[str, float]:
    """Returns mean differences, in grey levels, to crops of the fully decoded image."""
    best = parse_preprocess("inception_crop(method='bilinear_antialias')", size)
    quick = parse_preprocess("inception_crop", size)
    found = {"ours": [], "whole, bilinear": []}
    for i, jpeg in enumerate(jpegs):
        expected = best(decode_image(jpeg), np.random.default_rng(i)).astype(float)
        for name, image in (("ours", open_image(jpeg)), ("whole, bilinear", decode_image(jpeg))):
            ours = quick(image, np.random.default_rng(i))
            found[name].append(np.abs(ours - expected).mean())
    return {name: float(np.mean(levels)) for name, levels in found.items()}


def main(_) -> None:
    """Measures, prints and writes the results."""
    jpegs = make_jpegs(96, WIDTH.value, KILOBYTES.value)
    kinds = {"": jpegs}
    if shutil.which("jpegtran"):
        kinds[MARKED] = [jpeg_markers.add_markers(jpeg) for jpeg in jpegs]
    pipelines, parts = {}, {}
    for kind, files in kinds.items():
        pipelines |= {
            f"decoder alone{kind}": lambda files=files: raw(files, CORES),
            f"pipeline{kind}": lambda files=files: ours(files, CORES),
            f"pipeline{kind}, to the device": lambda files=files: ours(files, CORES, put=True),
            f"pipeline{kind}, {CORES} processes": lambda files=files: ours(files, 1, CORES),
            f"pipeline{kind}, RandAugment": lambda files=files: ours(
                files, CORES, preprocess=f"{CROP}|randaugment(2, 15)"
            ),
        }
        parts |= {f"{name}{kind}": (files, stage) for name, stage in stages(files).items()}
    if importlib.util.find_spec("tensorflow"):
        pipelines["tf.data"] = lambda: tensorflows(jpegs)
    times = {name: [] for name in parts}
    rates = {name: [] for name in pipelines}
    for round_ in range(ROUNDS.value):
        for name, (files, stage) in parts.items():
            start = time.thread_time()
            for i, jpeg in enumerate(files):
                stage(jpeg, i + round_ * len(jpegs))
            times[name].append((time.thread_time() - start) / len(jpegs))
        for name, start in pipelines.items():
            rates[name].append(measure(start, IMAGES.value))

    kilobytes = np.mean([len(jpeg) for jpeg in jpegs]) / 1000
    pixels = open_image(jpegs[0]).shape[:2]
    print(f"{len(jpegs)} JPEGs of {pixels} pixels, {kilobytes:.1f} KB; crops of {SIZE}\n")
    growth = sum(map(len, kinds.get(MARKED, jpegs))) / sum(map(len, jpegs))
    print(f"with restart markers {growth:.4f} times as large\n" if MARKED in kinds else "")
    print(f"{'stage, one core':57s} {'ms':>7s} {'img/s/core':>11s}")
    for name, seconds in times.items():
        print(f"{name:57s} {np.median(seconds) * 1e3:7.3f} {1 / np.median(seconds):11,.0f}")
    print(f"\n{f'whole, {CORES} cores':57s} {'img/s/core':>11s} {'img/s':>7s}   (processor; clock)")
    for name, found in rates.items():
        cpu, wall = np.median(found, axis=0)
        print(f"{name:57s} {cpu:11,.0f} {wall:7,.0f}")
    ratios = {}
    for name, found in rates.items():
        for base in (f"decoder alone{MARKED if MARKED in name else ''}", "tf.data"):
            if base not in rates or base == name:
                continue
            paired = np.array(found) / np.array(rates[base])
            ratios[f"{name} / {base}"] = dict(
                zip(("cpu", "wall"), np.median(paired, axis=0).tolist(), strict=True)
            )
    for name, ratio in ratios.items():
        print(f"{name:75s} {ratio['cpu']:.2f} (wall {ratio['wall']:.2f})")
    levels = {str(size): quality(jpegs, size) for size in (SIZE, (96, 96))}
    print("\nMean grey levels from decoding all of it and antialiasing:", levels)
    if OUTPUT.value:
        results = {
            "hardware": {"cpu": processor(), "cores": CORES, "python": platform.python_version()},
            "load_average": os.getloadavg(),
            "versions": versions(PACKAGES),
            "jpeg": {"pixels": pixels, "kilobytes": kilobytes, "growth with markers": growth},
            "stage_milliseconds": {n: float(np.median(s) * 1e3) for n, s in times.items()},
            "images_per_second": {
                name: [{"cpu": cpu, "wall": wall} for cpu, wall in found]
                for name, found in rates.items()
            },
            "median_ratios": ratios,
            "grey_levels_from_antialiased": levels,
        }
        Path(OUTPUT.value).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    app.run(main)
