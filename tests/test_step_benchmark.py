"""What the step's benchmark reads from a kernel's schedule."""

from experiments.benchmarks.bundles import kernel_bundles
from experiments.benchmarks.step_table import PLAIN, table

LISTING = """
     0   :  { %s1 = smov 0 }
   0x1 LB: > { %s2 = sphi 0 }
   0x2   :  {}
   0x3 LB: >> { %v1 = vadd.f32 %v0, %v0 }
   0x4   : >> { %p2 = scmp.ge.s32.totalorder %s7, 4 /* loop exit test */ }
   0x5 PF: > { %p1 = scmp.ge.s32.totalorder %s3, 10 /* loop exit test */ }
   0x6   :  { %s9 = smov 1 }
"""


def test_bundles_are_multiplied_by_the_trips_of_their_loops():
    assert kernel_bundles(LISTING) == 2 + 10 * (3 + 4 * 2)


def report(what, cycles):
    """Makes a report like experiments.benchmarks.step's, with the fields that the table reads."""
    compiled = {"temporary_gib": 1.0, "peak_gib": 2.0, "compile_seconds": 9.0, "collectives": []}
    place = {"model": "ViT-B/16", "topology": "v5e:4x4", "per_chip": 64, "image_size": 224}
    return {
        **place,
        "what": what,
        "options": {},
        "mesh": {},
        "from_depths": [],
        "implied_mfu": 0.5,
        "cycles": {"compiler": cycles - 10_000_000, "kernels": 10_000_000, "step": cycles},
        "compiled": [compiled],
        "versions": {"jax": "1"},
        "date": "2026-01-01",
    }


def test_the_table_shows_a_step_beside_the_yardstick_in_the_same_place():
    reports = [report("vit_jax", 60_000_000), report(PLAIN, 80_000_000)]
    elsewhere = {**report("vit_jax", 50_000_000), "topology": "v5e:16x16"}
    text = table(dict(enumerate([*reports, elsewhere])))
    ours, yardstick, alone = (
        next(line.split(" | ") for line in text.splitlines() if sums in line)
        for sums in ("| 60.0 |", "| 80.0 |", "| 50.0 |")
    )
    assert ours[4:8] == ["50.0", "10.0", "60.0", "0.75"]
    assert yardstick[7] == "1.00" and not alone[7].strip()
