"""What the step's benchmark reads from a kernel's schedule."""

from experiments.benchmarks.bundles import kernel_bundles

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
