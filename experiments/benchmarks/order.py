"""Tests the randomness of the data order for up to a billion examples, and measures its cost.

python -m experiments.benchmarks.order

Writes `results/order.png` and `results/order.json`: p-values of chi-square tests (uniform in [0, 1]
for a random order), the time per index, and the memory of an epoch's order.
"""

import json
import time
import tracemalloc
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from absl import app
from scipy import stats

from vit_jax.data.pipeline import global_indices

RESULTS = Path(__file__).parent / "results"
EXAMPLES, COUNT, BINS = 1_000_000_000, 60_000, 60
SIZES = (10_000, 1_281_167, EXAMPLES)


def counts(values: np.ndarray, bound: int) -> np.ndarray:
    """Counts the integers of [0, bound) in each bin."""
    return np.bincount(values.astype(np.int64) * BINS // bound, minlength=BINS)


def main(_) -> None:
    """Tests, draws and writes the results."""
    results = {"bins": BINS, "draws": COUNT, "p_values": {}}
    figure, axes = plt.subplots(2, 3, figsize=(12, 6.5), constrained_layout=True)
    for size, (above, below) in zip(SIZES, axes.T, strict=True):
        # The first two examples of many seeds.
        pairs = np.array([global_indices(seed, 0, 2, size) for seed in range(COUNT)])
        landed = counts(pairs[:, 0], size)
        gap = counts((pairs[:, 1] - pairs[:, 0]) % size - 1, size - 1)
        # The first tenth of one epoch, at most COUNT examples.
        stream = global_indices(0, 0, min(COUNT, size // 10), size)
        places = counts(stream, size)
        tests = {"first example": landed, "distance of the second": gap, "one epoch": places}
        results["p_values"][f"{size:,} examples"] = {
            name: float(stats.chisquare(found).pvalue) for name, found in tests.items()
        }
        for name, found in tests.items():
            above.step(np.arange(BINS) / BINS, found / found.mean(), where="post", label=name)
        above.set(title=f"{size:,} examples", ylim=(0.5, 1.5), xlabel="example / examples")
        below.plot(stream[:-1][:4000] / size, stream[1:][:4000] / size, ",k")
        below.set(xlabel="example", ylabel="the next one", aspect="equal")
    axes[0, 0].set_ylabel("share of the expected count")
    axes[0, 0].legend()
    figure.savefig(RESULTS / "order.png", dpi=100)

    tracemalloc.start()
    start = time.process_time()
    global_indices(1, 0, 4096, EXAMPLES)
    results["microseconds_an_index"] = (time.process_time() - start) / 4096 * 1e6
    results["peak_bytes"] = tracemalloc.get_traced_memory()[1]
    (RESULTS / "order.json").write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    app.run(main)
