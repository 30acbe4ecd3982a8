"""Costs read from compiled programs, against formulas: on CPU devices, and from a TPU's text."""

import dataclasses
import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from vit_jax.costs.chips import CHIPS, PEAK_FLOPS
from vit_jax.costs.collectives import Collective
from vit_jax.costs.compiled import (
    Kernel,
    OutOfMemory,
    Program,
    compile_for,
    memory,
    out_of_memory,
)

LAYERS, ROWS, WIDTH = 3, 1024, 512
TPU = Path(__file__).parent / "golden" / "fsdp_step_v5e.txt"


def fsdp_step(devices):
    """Three scanned layers, batch over a mesh of 2 x 2, weights over its second axis."""
    mesh = jax.make_mesh((2, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=devices)

    def loss(weights, x):
        y, _ = jax.lax.scan(lambda h, w: (jax.nn.gelu(h @ w), None), x, weights)
        return jnp.sum(y * y)

    split = NamedSharding(mesh, PartitionSpec(None, None, "fsdp"))
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    weights = jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), jnp.bfloat16, sharding=split)
    x = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.bfloat16, sharding=rows)
    step = jax.jit(lambda w, x: w - jax.grad(loss)(w, x), out_shardings=split, donate_argnums=0)
    return step.lower(weights, x)


# Per device and layer: one matmul forward and two backward, on a quarter of the rows.
STEP_FLOPS = LAYERS * 3 * 2 * (ROWS // 4) * WIDTH * WIDTH


def test_a_tpus_program():
    """Reads libtpu 0.0.42's text for v5e:2x2, in which matmuls are convolutions."""
    program = Program(TPU.read_text())
    assert program.flops == STEP_FLOPS
    whole = WIDTH * WIDTH * 2  # bytes of a layer's weights
    gather = Collective("all-gather", whole, (0, 1), LAYERS)
    assert program.collectives == [
        gather,
        Collective("all-reduce", whole // 2, (0, 2), LAYERS),
        # Again in the backward pass: spread over three fusions, the second of which multiplies.
        dataclasses.replace(gather, beside=5212),
        Collective("reduce-scatter", whole, (0, 1), LAYERS),
    ]
    once = sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', TPU.read_text())))
    assert once < program.cycles < LAYERS * once
    assert program.unknown_loops == 0
    assert STEP_FLOPS / program.cycles < CHIPS["v5e"].flops_per_cycle


def test_what_the_compiler_has_no_estimate_of_is_not_added_up():
    """The compiler then says 2^63 - 1, as for a copy in ViT-G/14's program for TPU7x."""
    text = TPU.read_text()
    first = re.search(r'"estimated_cycles":"(\d+)"', text)
    changed = Program(text.replace(first[0], f'"estimated_cycles":"{2**63 - 1}"', 1))
    assert (Program(text).without_estimate, changed.without_estimate > 0) == (0, True)
    assert Program(text).cycles - changed.cycles == changed.without_estimate * int(first[1])


def test_a_cpus_program():
    compiled = compile_for(fsdp_step(jax.devices()[:4]))
    program = Program(compiled.as_text())
    assert program.flops == STEP_FLOPS
    assert program.cycles == 0  # only TPUs' compiler says
    assert {c.kind for c in program.collectives} >= {"all-gather", "all-reduce"}
    assert all(c.times == LAYERS and len(c.group) == 2 for c in program.collectives)
    weights = LAYERS * WIDTH * WIDTH * 2 // 2
    assert memory(compiled).arguments == weights + ROWS // 4 * WIDTH * 2
    assert memory(compiled).outputs == 0  # donated


def loop(bounds):
    def body(_, x):
        return jnp.sin(x @ x)

    return lambda x: jax.lax.fori_loop(*bounds, body, x)


@pytest.mark.parametrize(("bounds", "trips"), [((0, 5), 5), ((2, 9), 7)])
def test_trips_that_xla_notes(bounds, trips):
    text = jax.jit(loop(bounds)).lower(jnp.ones((8, 8))).compile().as_text()
    assert '"known_trip_count"' in text
    program = Program(text)
    assert (program.flops, program.unknown_loops) == (trips * 2 * 8**3, 0)


LOOP = """
%body (p: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %p = (s32[], f32[8,8]{1,0:T(8,128)}) parameter(0)
  %x = f32[8,8]{1,0:T(8,128)S(1)} get-tuple-element(%p), index=1
  %y = f32[8,8]{1,0:T(8,128)} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %step = s32[]{:T(128)} constant(1)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %next = s32[]{:T(128)} add(%i, %step)
  ROOT %new = (s32[], f32[8,8]{1,0:T(8,128)}) tuple(%next, %y)
}
%cond (p: (s32[], f32[8,8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(9)
  %p = (s32[], f32[8,8]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}
ENTRY %main (x: f32[8,8]) -> (s32[], f32[8,8]) {
  %x = f32[8,8]{1,0:T(8,128)} parameter(0)
  %first = s32[]{:T(128)} constant(2)
  %copy = s32[]{:T(128)} copy(%first)
  %init = (s32[], f32[8,8]{1,0:T(8,128)}) tuple(%copy, %x)
  ROOT %loop = (s32[], f32[8,8]{1,0:T(8,128)}) while(%init), condition=%cond, body=%body
}
"""


@pytest.mark.parametrize(
    ("change", "trips", "unknown"),
    [
        (("", ""), 7, 0),
        (("constant(2)", "constant(0)"), 9, 0),
        (("constant(1)", "constant(3)"), 3, 0),  # unrolled: 2, 5 and 8
        (("add(", "multiply("), 1, 1),
        (("direction=LT", "direction=GT"), 1, 1),
        (("constant(2)", "parameter(1)"), 1, 1),
    ],
)
def test_trips_by_the_loops_condition(change, trips, unknown):
    """Loops as the TPU compiler writes them: from a constant, or its copy, while below a bound."""
    program = Program(LOOP.replace(*change))
    assert (program.flops, program.unknown_loops) == (trips * 2 * 8**3, unknown)


def test_nested_loops_multiply():
    inner = loop((0, 3))
    nested = jax.jit(lambda x: jax.lax.scan(lambda c, _: (inner(c), None), x, length=4)[0])
    assert Program(nested.lower(jnp.ones((8, 8))).compile().as_text()).flops == 12 * 2 * 8**3


def test_a_loop_of_unknown_length_counts_once_and_is_reported():
    run = jax.jit(lambda x: jax.lax.while_loop(lambda c: c.sum() < 9, lambda c: c @ c, x))
    program = Program(run.lower(jnp.ones((8, 8))).compile().as_text())
    assert (program.flops, program.unknown_loops) == (2 * 8**3, 1)


@pytest.mark.parametrize(
    ("options"),
    [
        {"window_strides": (2, 2), "padding": "SAME"},
        {"window_strides": (1, 1), "padding": ((1, 2), (0, 1)), "lhs_dilation": (2, 3)},
        {"window_strides": (1, 2), "padding": "VALID", "rhs_dilation": (2, 1)},
        {"window_strides": (1, 1), "padding": "SAME", "feature_group_count": 2},
    ],
)
def test_convolutions_as_xla_counts_them(options):
    groups = options.get("feature_group_count", 1)
    x, kernel = jnp.ones((2, 9, 11, 4)), jnp.ones((3, 3, 4 // groups, 6))
    conv = partial(
        jax.lax.conv_general_dilated, dimension_numbers=("NHWC", "HWIO", "NHWC"), **options
    )
    compiled = jax.jit(conv).lower(x, kernel).compile()
    assert " convolution(" in compiled.as_text()
    assert Program(compiled.as_text()).flops == compiled.cost_analysis()["flops"]


@pytest.mark.parametrize(
    ("written", "group"),
    [
        ("{{0,2},{1,3}}", (0, 2)),
        ("[2,4]<=[8]", (0, 1, 2, 3)),
        ("[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("mesh['a'=2,'b'=4] {'b'}", (0, 1, 2, 3)),
        ("mesh['a'=2,'b'=4] {'a','b'}", tuple(range(8))),
        ("mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", (0, 2, 4, 6)),
        ("mesh['a'=2,'b'=2], device_ids=(0,2,1,3) {'a'}", (0, 1)),
    ],
)
def test_groups_of_devices(written, group):
    text = (
        "ENTRY %main (p: f32[8,2]) -> f32[8,2] {\n"
        "  %p = f32[8,2]{1,0:T(8,128)(2,1)} parameter(0)\n"
        "  ROOT %r = f32[8,2]{1,0:T(8,128)} all-reduce(%p), channel_id=1, "
        f"replica_groups={written}, use_global_device_ids=true, to_apply=%add\n}}\n"
        "%add (a: f32[], b: f32[]) -> f32[] {\n  ROOT %a = f32[] parameter(0)\n}\n"
    )
    assert Program(text).collectives == [Collective("all-reduce", 64, group)]


def kernel(target, config, name="flash_attention.1"):
    return (
        "ENTRY %m (q: bf16[2,4,256,128]) -> bf16[2,4,256,128] {\n"
        "  %q = bf16[2,4,256,128]{3,2,1,0:T(8,128)(2,1)} parameter(0)\n"
        f"  ROOT %{name} = bf16[2,4,256,128]{{3,2,1,0:T(8,128)(2,1)}} custom-call(%q, %q), "
        f'custom_call_target="{target}", backend_config={config}\n}}\n'
    )


COST = (
    '{"custom_call_config":{"body":"...","cost_estimate":{"flops":"269484032","transcendentals":'
    '"524288","bytes_accessed":"2097152","remote_bytes_transferred":"0"}},"retry_config":{}}'
)


@pytest.mark.parametrize(
    ("target", "config", "expected"),
    [
        (
            "tpu_custom_call",
            COST,
            Kernel("flash_attention", 269484032, 2097152),
        ),  # as libtpu has it
        ("tpu_custom_call", '{"custom_call_config":{}}', Kernel("flash_attention", None, None)),
        ("__cudnn$fmhaSoftmaxBackward", "{}", Kernel("fmhaSoftmaxBackward", None, None)),
        ("__cublas$gemm", "{}", None),
        ("Sharding", "{}", None),
    ],
)
def test_kernels_that_xla_does_not_see_into(target, config, expected):
    program = Program(kernel(target, config))
    assert program.kernels == ([expected] if expected else [])
    assert program.flops == ((expected and expected.flops) or 0)
    assert program.cycles == 0


def test_a_kernels_roofline():
    v5e, v3 = CHIPS["v5e"], CHIPS["v3"]
    assert Kernel("k", 10**12, 10, times=3).seconds(v5e) == pytest.approx(3e12 / v5e.peak_flops)
    assert Kernel("k", 10, 10**9).seconds(v5e) == pytest.approx(1e9 / v5e.hbm_bandwidth)
    # A core has half of its chip's arithmetic and of its memory's bandwidth.
    assert Kernel("k", 10**12, 10).seconds(v3) == pytest.approx(2e12 / v3.peak_flops)
    assert Kernel("k", 10, 10**9).seconds(v3) == pytest.approx(2e9 / v3.hbm_bandwidth)
    assert Kernel("k", None, None).seconds(v5e) is None


def test_what_crosses_between_slices():
    """libtpu 0.0.42 writes one all-reduce as a pair of transfers through the host."""
    host = (
        ", channel_id={}, is_host_transfer=true, frontend_attributes={{_xla_host_transfer_handler_"
        'name="xla_megascale_runtime",_xla_megascale_reduce_operation="SUM",'
        '_xla_megascale_target="{{1,2}}x{{0:3}}",_xla_megascale_transfer_type="ALL_REDUCE"}}\n'
    )
    text = (
        "ENTRY %main (p: bf16[64,8,128]) -> token[] {\n"
        "  %p = bf16[64,8,128]{2,1,0:T(8,128)(2,1)} parameter(0)\n"
        "  %all = token[] after-all()\n"
        "  %send.3 = (bf16[64,8,128]{2,1,0:T(8,128)(2,1)}, u32[], token[]) send(%p, %all)"
        f"{host.format(2)}"
        "  ROOT %recv.3 = (bf16[64,8,128]{2,1,0:T(8,128)(2,1)}, u32[], token[]) recv(%all)"
        f"{host.format(1)}}}\n"
    )
    (found,) = Program(text, slices=(0, 4)).collectives
    assert found == Collective("all-reduce", 64 * 8 * 128 * 2, (0, 4))
    v5e = CHIPS["v5e"]  # each of two slices sends half, and then the other half's sum
    assert found.seconds(v5e, 4) == pytest.approx(found.bytes / v5e.network_bandwidth)


def test_a_collective_that_cannot_be_read_is_an_error():
    text = "ENTRY %m (p: f32[2]) -> f32[2] {\n  %p = f32[2] parameter(0)\n"
    text += "  ROOT %r = f32[2] all-gather(%p), replica_groups=new\n}\n"
    with pytest.raises(ValueError, match="cannot read the devices"):
        _ = Program(text).collectives
    with pytest.raises(ValueError, match="no ENTRY"):
        Program("")


def test_rooflines():
    """An all-reduce of V bytes over n devices sends 2 (n - 1) / n V; a part crosses slices."""
    v5e, v3 = CHIPS["v5e"], CHIPS["v3"]
    reduce = Collective("all-reduce", 10**9, tuple(range(4)), times=2)
    assert reduce.seconds(v5e, 4) == pytest.approx(2 * 1.5e9 / v5e.link_bandwidth)
    half = Collective("all-gather", 10**9, tuple(range(4)), times=2)
    assert half.seconds(v5e, 4) == pytest.approx(reduce.seconds(v5e, 4) / 2)
    # A core has half of its chip's links.
    assert reduce.seconds(v3, 4) == pytest.approx(2 * 1.5e9 / (v3.link_bandwidth / 2))
    # Two slices of two chips: half inside, then half of the bytes once around the network.
    across = 2 * (1e9 / v5e.link_bandwidth + 0.5e9 / v5e.network_bandwidth)
    assert reduce.seconds(v5e, 2) == pytest.approx(across)
    assert reduce.seconds(v3, 2) is None  # v3's slices have no network
    ring = Collective("collective-permute", 10**9, (0, 1))
    assert ring.seconds(v5e, 4) == pytest.approx(1e9 / v5e.link_bandwidth)


@pytest.mark.parametrize(
    ("message", "gib"),
    [
        ("Ran out of memory in memory space hbm. Used 25.90G of 15.75G hbm.", (25.9, 15.75)),
        (
            "Ran out of memory on HBM, the total memory required for HLO temporaries (4.00T) "
            "exceeds available HBM (512.00M).",
            (4096.0, 0.5),
        ),
    ],
)
def test_the_compilers_messages_of_memory(message, gib):
    error = out_of_memory(f"RESOURCE_EXHAUSTED: {message} Exceeded")
    assert isinstance(error, OutOfMemory) and (error.needed, error.capacity) == gib
    assert out_of_memory("INTERNAL: something else") is None


def test_other_errors_of_the_compiler_pass():
    class Lowered:
        def compile(self):
            raise RuntimeError("INTERNAL: something else")

    with pytest.raises(RuntimeError, match="something else"):
        compile_for(Lowered())


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_the_table_of_chips(chip):
    """Checks orders of magnitude and ratios, which catch a wrong digit or a swapped column."""
    assert chip.name in CHIPS and all(kind in PEAK_FLOPS for kind in chip.device_kinds)
    assert 40e12 < chip.peak_flops < 3e15
    assert 50 < chip.peak_flops / chip.hbm_bandwidth < 700  # FLOPs a byte
    assert chip.hbm_bandwidth > 2 * chip.link_bandwidth
    assert chip.network_bandwidth is None or chip.link_bandwidth > 5 * chip.network_bandwidth
    assert 0.7 < chip.device_hbm_gib * chip.devices / chip.hbm_gib < 1.01
    if chip.is_tpu:
        assert 0.6e9 < chip.clock < 2.3e9
        assert chip.flops_per_cycle % (2 * 128 * 128) == 0


def test_published_clocks():
    """Clocks in MHz from Norrie et al. 2021 (v2, v3) and arXiv 2304.01433 (v4) fit the table."""
    clocks = [CHIPS[name].clock / 1e6 for name in ("v2", "v3", "v4")]
    np.testing.assert_allclose(clocks, [700, 940, 1050], rtol=0.025)
