"""The benchmark of a GPU, rehearsed without one: what it keeps, skips, and says."""

import json
import re
import sys
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.benchmarks import machine
from experiments.benchmarks.gpu import __main__ as command
from experiments.benchmarks.gpu import attention, bench, correct, input, plan, study, trace, train
from experiments.benchmarks.gpu.bench import Bench, read_results
from experiments.benchmarks.gpu.choose import choices, efficiency, fastest_attention
from experiments.benchmarks.gpu.drawing import draw, encode
from experiments.benchmarks.gpu.page import page
from experiments.benchmarks.gpu.worker import Failed, Worker
from experiments.scaling.runner import Store
from experiments.scaling.study import expand, load_study
from vit_jax.costs import gpu_time, topology
from vit_jax.costs.chips import CHIPS
from vit_jax.costs.compiled import Program
from vit_jax.costs.gpu_time import Efficiency, Kernel, take_apart
from vit_jax.data.decode import open_image
from vit_jax.models import hardware
from vit_jax.parallel.mesh import MeshConfig, make_mesh, replicated, use_mesh

H200 = {
    "gpu": "NVIDIA H200",
    "driver": "580.1",
    "memory_mib": "143771",
    "cpu": "a CPU",
    "cores": 16,
    "memory_gib": 128.0,
    "python": "3.12.3",
    "versions": {"jax": "0.11.2"},
}


def make(folder, seconds=100.0, rehearsal=True, **changes):
    return Bench(folder, folder / "scratch", {**H200, **changes}, rehearsal, seconds)


def failing(message):
    def fail():
        raise Failed(message)

    return fail


def test_a_second_start_measures_what_is_missing(tmp_path):
    first = make(tmp_path)
    assert first.measure("train a", lambda: {"img_per_sec": 1}) == {"img_per_sec": 1}
    assert first.measure("train b", failing("no torch\nmore")) is None
    assert first.measure("train c", failing("RESOURCE_EXHAUSTED: too large")) is None
    assert first.measure("train d", lambda: {"never": 1}, seconds=1000) is None
    kept = json.loads((tmp_path / "gpu.json").read_text())["measurements"]
    assert kept["train a"]["values"] == {"img_per_sec": 1}
    assert kept["train b"]["failed"] == "no torch"
    assert "too large" in kept["train c"]["out_of_memory"]
    assert kept["train d"]["skipped"] == "takes about 1000 s, 100 s were left"
    assert not list(tmp_path.glob("*.partial"))

    again, measured = make(tmp_path), []
    for name in ("train a", "train b", "train c", "train d"):
        again.measure(name, lambda name=name: measured.append(name) or {"by": 2})
    assert measured == ["train b", "train d"]
    assert [again.results["measurements"][f"train {x}"]["start"] for x in "abcd"] == [0, 1, 0, 1]


def test_a_mistake_is_recorded_with_its_traceback_in_the_log(tmp_path):
    here = make(tmp_path)
    here.measure("plan a", lambda: {}["no such key"])
    assert "KeyError" in here.results["measurements"]["plan a"]["failed"]
    assert "Traceback" in (tmp_path / "log.txt").read_text()


def test_a_part_leaves_time_to_the_next(tmp_path):
    here = make(tmp_path, seconds=100)
    here.until(0.3)
    assert 29 < here.left <= 30 and not here.room(["train a", "train b"], 40)
    assert set(here.results["measurements"]) == {"train a", "train b"}
    here.until(1.0)
    assert here.room("train a", 40)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gpu": "NVIDIA A100-SXM4-80GB"}, "gpu = 'NVIDIA H200'.*'NVIDIA A100.*another --output"),
        ({"rehearsal": False}, "rehearsal = True, this start has False"),
    ],
)
def test_results_of_another_machine_are_kept_apart(tmp_path, changes, message):
    make(tmp_path)
    with pytest.raises(ValueError, match=message):
        make(tmp_path, **changes)


@pytest.mark.parametrize(
    "text",
    [
        *("{", "[]", "{}", "\xff", '{"starts": []}', '{"starts": {}, "measurements": {}}'),
        *('{"starts": [], "measurements": []}', '{"starts": [], "measurements": {"a": 1}}'),
    ],
)
def test_a_damaged_file_of_results_is_refused(tmp_path, text):
    (tmp_path / "gpu.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"gpu\.json is damaged .*another --output"):
        make(tmp_path)


def test_what_needs_no_gpu_can_be_added_elsewhere(tmp_path):
    make(tmp_path, rehearsal=False)
    assert make(tmp_path, rehearsal=False, gpu="none").results["gpu"] == "NVIDIA H200"


def test_a_process_that_measures_may_fail_in_any_way(tmp_path):
    log = tmp_path / "log.txt"
    worker = Worker("collections:Counter", log, {})
    worker.start(30, a=2, b=1)
    assert worker.call(30, "most_common", n=1) == [["a", 2]]
    with pytest.raises(Failed, match=r"AttributeError: .*no_such"):
        worker.call(30, "no_such")
    assert worker.call(30, "total") == 3  # it goes on
    worker.close()
    with pytest.raises(Failed, match="has ended"):
        worker.call(30, "total")
    worker.start(30, c=5)  # a new process
    assert worker.call(30, "total") == 5
    worker.close()

    worker = Worker("os:_exit", log, {})
    with pytest.raises(Failed, match="ended with code 3"):
        worker.start(30, status=3)
    worker = Worker("no_such_package:Thing", log, {})
    with pytest.raises(Failed, match="ModuleNotFoundError: No module named 'no_such_package'"):
        worker.start(30)
    worker.close()
    worker = Worker("threading:Event", log, {})
    worker.start(30)
    with pytest.raises(Failed, match="no answer within 0 s"):
        worker.call(0.2, "wait", timeout=600)
    assert "Traceback" in log.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--part=trian"], "part 'trian'.*train"),
        (["--part=choose,train"], "choose measures nothing"),
        (["--minutes=0"], "minutes = 0.0: expected a positive number"),
        (["--minutes=nan"], "minutes = nan"),
        (["--part=train"], "no GPU: nvidia-smi is not on the PATH"),
        (["--part=predict"], "no results of a GPU in"),
    ],
)
def test_bad_input_is_said(tmp_path, monkeypatch, arguments, message):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "argv", ["gpu", f"--output={tmp_path}", *arguments])
    with pytest.raises(ValueError, match=message):
        command.main()


def test_the_gpu_is_what_nvidia_smi_says(tmp_path, monkeypatch):
    script = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    script.write_text("#!/bin/sh\necho 'NVIDIA A10, 470.82.01, 23028'\n")
    script.chmod(0o755)
    found = machine.gpu()
    assert found == {"gpu": "NVIDIA A10", "driver": "470.82.01", "memory_mib": "23028"}
    found |= {"versions": {"jax-cuda12-plugin": "0.10.2", "jax": "0.10.2"}}
    assert machine.shortcomings(found, ("jax", "timm"), 100) == [
        "driver 470.82.01 is too old for jax-cuda12-plugin: install 525 or newer",
        "22 GiB of GPU memory: the sizes are chosen for 100 or more",
        "timm is not installed: pip install timm",
    ]
    script.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed: no driver'; exit 9\n")
    with pytest.raises(ValueError, match="no GPU: nvidia-smi says 'NVIDIA-SMI has failed"):
        machine.gpu()


# One product of cuBLAS, one of Triton in a loop of 3 trips, cuDNN's attention backward, a fusion
# that reads one row of a stack and writes one in place.
STEP = """
%inside (p: f32[64,128], q: f32[128,32]) -> f32[64,32] {
  %p = f32[64,128]{1,0} parameter(0)
  %q = f32[128,32]{1,0} parameter(1)
  ROOT %d = f32[64,32]{1,0} dot(%p, %q), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%sliced (s: f32[10,1000], n: s32[], u: f32[10,1000]) -> f32[10,1000] {
  %s = f32[10,1000]{1,0} parameter(0)
  %n = s32[] parameter(1)
  %u = f32[10,1000]{1,0} parameter(2)
  %row = f32[1,1000]{1,0} dynamic-slice(%s, %n, %n), dynamic_slice_sizes={1,1000}
  ROOT %put = f32[10,1000]{1,0} dynamic-update-slice(%u, %row, %n, %n)
}

%body (t: (s32[], f32[64,128])) -> (s32[], f32[64,128]) {
  %t = (s32[], f32[64,128]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %x = f32[64,128]{1,0} get-tuple-element(%t), index=1
  %w = f32[128,32]{1,0} constant({...})
  %y = f32[64,32]{1,0} fusion(%x, %w), kind=kCustom, calls=%inside
  ROOT %r = (s32[], f32[64,128]{1,0}) tuple(%i, %x)
}

%condition (t: (s32[], f32[64,128])) -> pred[] {
  %t = (s32[], f32[64,128]{1,0}) parameter(0)
  ROOT %true = pred[] constant(true)
}

ENTRY %main (a: bf16[4096,512], b: bf16[512,2048]) -> bf16[4096,2048] {
  %a = bf16[4096,512]{1,0} parameter(0)
  %b = bf16[512,2048]{1,0} parameter(1)
  %l = (s32[], f32[64,128]{1,0}) parameter(2)
  %s = f32[10,1000]{1,0} parameter(3)
  %n = s32[] parameter(4)
  %h = bf16[8,198,12,64]{3,2,1,0} parameter(5)
  %g = (bf16[4096,2048]{1,0}, s8[64]{0}) custom-call(%a, %b), custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"],"lhs_batch_dimensions":[],"rhs_batch_dimensions":[]}}}
  %loop = (s32[], f32[64,128]{1,0}) while(%l), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %f = f32[10,1000]{1,0} fusion(%s, %n, %s), kind=kLoop, calls=%sliced
  %k = (bf16[8,198,12,64]{3,2,1,0}, u8[0]{0}) custom-call(%h, %h, %h), custom_call_target="__cudnn$fmhaSoftmaxBackward"
  ROOT %out = bf16[4096,2048]{1,0} get-tuple-element(%g), index=0
}
"""  # noqa: E501


def test_a_step_for_gpus_is_taken_apart():
    found = take_apart(Program(STEP))
    product = Kernel("product", 512, 2 * 4096 * 512 * 2048, 2 * (4096 + 2048) * 512 + 2**24 + 64)
    inner = Kernel("product", 32, 2 * 64 * 128 * 32, 4 * (64 * 128 + 128 * 32 + 64 * 32))
    flops = 5 * 2 * 8 * 12 * 198**2 * 64
    (fused,) = (kernel for kernel in found if kernel.kind == "attention")
    assert fused.size == 198 and fused.flops == flops
    moved = Kernel("other", 0, 0, 4000 + 4 + 4000)  # a row, its number, and a row
    assert found == Counter({product: 1, inner: 3, fused: 1, moved: 1})


MEASURED = Efficiency(
    "h200", [[64, 0.1], [512, 0.5], [4096, 0.8]], [[198, 0.25]], 0.5, 2e-6, "a day"
)


def test_the_time_is_of_flops_traffic_and_launches():
    h200 = CHIPS["h200"]
    product = Kernel("product", 512, 10**12, 10)
    between = Kernel("product", 2**7 * 2**1, 10**12, 10)
    assert product.seconds(MEASURED, h200) == pytest.approx(1e12 / (0.5 * 989e12))
    assert product.seconds(MEASURED, h200) < between.seconds(MEASURED, h200) < 1e12 / (0.1 * 989e12)
    assert Kernel("other", 0, 0, 10**9).seconds(MEASURED, h200) == pytest.approx(1e9 / 2.4e12)
    assert Kernel("other", 0, 0, 8).seconds(MEASURED, h200) == 2e-6
    steps = Counter({product: 2, Kernel("other", 0, 0, 8): 100})
    whole = MEASURED.seconds(steps, h200)
    assert whole == pytest.approx(2 * product.seconds(MEASURED, h200) + 200e-6)


def test_other_gpus_are_scaled_from_the_measured_one(monkeypatch):
    monkeypatch.setattr(gpu_time, "_measured", lambda: [MEASURED])
    for name in ("a100", "h100", "b200"):
        text = gpu_time.efficiency(CHIPS[name]).describe(CHIPS[name])
        assert "measured on h200 (a day)" in text and f"scaled to {name}'s peaks" in text
    assert "scaled" not in gpu_time.efficiency(CHIPS["h200"]).describe(CHIPS["h200"])
    assert gpu_time.efficiency(CHIPS["v5e"]) is None
    monkeypatch.setattr(gpu_time, "_measured", list)
    assert gpu_time.efficiency(CHIPS["h200"]) is None


def attention_row(way, tokens, seconds, features=64):
    shape = [256, tokens, 12, features]
    found = {"implementation": way, "shape": shape, "both_seconds": seconds, "both_tflops": 98.9}
    found |= {"forward_seconds": seconds / 3, "forward_tflops": 90, "error": 3e-3}
    return {"values": {**found, "gradients_error": 4e-3}, "start": 0}


def results(**measurements):
    start = {"date": "2026-12-01T10:00:00", **H200}
    named = {name.replace("_", " "): found for name, found in measurements.items()}
    return {"gpu": "NVIDIA H200", "starts": [start], "measurements": named}


def test_auto_follows_what_was_measured(monkeypatch):
    times = {"xla": (1.0, 2.0, 9.0), "cudnn": (2.0, 1.0, 3.0), "triton": (3.0, 3.0, 1.0)}
    found = results(
        **{
            f"attention_{way}_{tokens}_tokens": attention_row(way, tokens, seconds)
            for way, row in times.items()
            for tokens, seconds in zip((100, 225, 1024), row, strict=True)
        }
    )
    table = fastest_attention(found)
    assert table == ((150, "xla"), (1024, "cudnn"))
    assert "triton is 3.00 times as fast for 1024 tokens" in choices(found)
    assert '"NVIDIA H200": ((150, "xla"), (1024, "cudnn"),)' in choices(found)

    monkeypatch.setattr(hardware, "platform", lambda: "gpu")
    monkeypatch.setattr(hardware, "device_kind", lambda: "NVIDIA H200")
    monkeypatch.setattr(hardware, "_MEASURED", {"NVIDIA H200": table})
    chosen = [
        hardware.choose_attention("auto", tokens, 64, np.dtype("bfloat16"), plain=False)
        for tokens in (150, 151, 2000)
    ]
    assert chosen == ["xla", "cudnn", "cudnn"]
    assert choices(results()) == "The results say nothing about the defaults yet."


def test_the_shares_of_the_peaks_become_a_row_of_the_costs():
    found = results(
        attention_cudnn_197=attention_row("cudnn", 197, 1e-3),
        plan_product_512={"values": {"side": 512, "tflops": 494.5}},
        plan_bandwidth_2048={"values": {"gb_per_second": 3600}},
    )
    assert efficiency(found) is None  # the launch is missing
    found["measurements"]["plan launch 300"] = {"values": {"microseconds": 2.5}}
    row = Efficiency(**efficiency(found))
    assert (row.products, row.attention) == ([[512, 0.5]], [[197, 0.1]])
    assert (row.bandwidth, row.launch_seconds) == (0.75, 2.5e-6)
    assert row.source == "NVIDIA H200, 2026-12-01, jax 0.11.2"
    assert efficiency({**found, "gpu": "NVIDIA A10"}) is None
    assert page({**found, "gpu": "NVIDIA A10"})  # a GPU whose peaks aren't known
    found["measurements"]["plan ViT-B/16 64 224 px"] = {
        "values": {"batch": 64, "img_per_sec": 640, "seconds_per_step": [0.1], "peak_gib": 10.0}
    }
    kernels = [["other", 0, 0, 36 * 10**9, 10]]  # 10 ms each
    found["measurements"]["predict ViT-B/16 64 224 px"] = {
        "values": {"peak_gib": 10.5, "kernels": kernels}
    }
    text = page(found)
    assert "| ViT-B/16 64 224 px | 10.00 | 10.50 | +5.0% | 100.0 | 100.0 | +0.0% |" in text


def step_row(rate, **more):
    return {"values": {"img_per_sec": rate, "mfu": 0.5, "spread": 0.01, "peak_gib": 9.0, **more}}


def test_the_page_is_made_from_the_results():
    found = results()
    found["measurements"] = {
        "train ViT-B/16 ours 512": step_row(3900),
        "train ViT-B/16 timm 512": step_row(3000),
        "train ViT-S/16 ours 512": step_row(9000),
        "train ViT-S/16 timm 512": {"failed": "ModuleNotFoundError: No module named 'timm'"},
        "trace ViT-B/16 default time": {"skipped": "takes about 50 s, 3 s were left"},
    }
    lines = page(found).splitlines()
    (row,) = (line for line in lines if line.startswith("| ViT-B/16 | 512"))
    assert "| 3,900 | 50.0% | 1.0% | 9.0 | 3,000 |" in row and "| 1.30 | 4,200 |" in row
    assert (
        "| train ViT-S/16 timm 512 | failed | ModuleNotFoundError: No module named 'timm' |"
        in lines
    )
    assert "| trace ViT-B/16 default time | skipped | takes about 50 s, 3 s were left |" in lines
    assert "Not measured yet." in lines


def test_the_committed_page_is_of_the_committed_results():
    folder = Path(plan.__file__).parents[1] / "results"
    assert (folder / "gpu.md").read_text() == page(read_results(folder / "gpu.json"))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_hsh_256x128_64x4_1x2_h_bz_coopA_NTN", "product"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "product"),
        ("gemm_fusion_dot_33_0", "product"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob", "attention"),
        (
            "void cutlass__5x_cudnn::Kernel<cutlass_tensorop_bf16_s16816wgrad_optimized>",
            "convolution",
        ),
        ("loop_convert_fusion_12", "elementwise"),
        ("input_reduce_fusion_3", "reduction"),
        ("input_transpose_fusion", "copy"),
        ("MemcpyD2D", "copy"),
        ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL", "communication"),
        ("triton_poi_fused_gelu_3", "elementwise"),
        ("a new one", "other"),
    ],
)
def test_kernels_have_a_kind(name, kind):
    assert trace.kind(name) == kind


def test_a_trace_is_summed_by_kind():
    events = [("gemm", 0.0, 3.0), ("gemm", 3.0, 3.0), ("loop_fusion", 8.0, 2.0)]
    found = trace.summary(events, steps=2)
    assert found["kinds_ms"] == {"product": 3.0, "elementwise": 1.0}
    assert (found["busy_ms"], found["idle_ms"], found["kernels"]) == (4.0, 1.0, 1.5)
    with pytest.raises(Failed, match="no kernels"):
        trace.summary([], 2)


def test_drawn_jpegs_are_as_large_as_photographs_and_markers_change_no_pixel():
    pixels = draw(3, (375, 500))
    assert pixels.shape == (375, 500, 3) and pixels.std() > 20
    assert np.array_equal(pixels, draw(3, (375, 500)))
    plain, marked = encode(pixels, False), encode(pixels, True)
    assert 40_000 < len(plain) < 90_000 and len(marked) > len(plain)
    assert np.array_equal(open_image(plain).decode(), open_image(marked).decode())
    encode(draw(0, (48, 64)), True)  # the rehearsal's


class Made:
    """A `Worker` with made-up answers: a step of 0.1 s; timm isn't there, S/16 fails in a step."""

    def __init__(self, what, log, environment):
        self.what, self.told, self.variant = what, [], ""

    def tell(self, method, **arguments):
        self.told.append((method, arguments))

    def hear(self, patience):
        method, arguments = self.told[0]
        self.variant = arguments.get("variant", self.variant)
        if self.what.endswith("Timm"):
            raise Failed("ModuleNotFoundError: No module named 'timm'")
        if method == "run" and self.variant == "ViT-S/16":
            raise Failed("RESOURCE_EXHAUSTED: out of memory")
        return self.answer()

    def answer(self):
        method, _ = self.told.pop(0)
        ready = {"device": "NVIDIA H200", "model_flops": 989e12 * 0.05, "compile_seconds": 1.0}
        return {"run": 0.1, "compile": ready, "memory": {"peak_gib": 9.0}}.get(method)

    def call(self, patience, method, **arguments):
        self.tell(method, **arguments)
        return self.hear(patience)

    def close(self, patience=5):
        pass


def test_what_one_contestant_lacks_does_not_cost_the_other(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "Worker", Made)
    two = 20 + 2 * (25 + train.MEASURE_SECONDS)
    here = make(tmp_path, seconds=two + 1, rehearsal=False)
    train.measure(here)
    found = here.results["measurements"]
    assert found["train ViT-B/16 ours 512"]["values"]["mfu"] == pytest.approx(0.5)
    assert found["train ViT-B/16 ours 512"]["values"]["img_per_sec"] == pytest.approx(5120)
    assert "out_of_memory" in found["train ViT-S/16 ours 512"]
    for variant in ("ViT-S/16", "ViT-B/16"):
        assert "No module named 'timm'" in found[f"train {variant} timm 512"]["failed"]
    for name in ("ViT-L/16 ours 256", "ViT-H/14 timm 64", "ViT-g/14 ours 64"):
        assert "were left" in found[f"train {name}"]["skipped"]
    assert "| 5,120 | 50.0% |" in page(here.results)

    before = found["train ViT-B/16 ours 512"]
    monkeypatch.setattr(Made, "hear", lambda self, patience: self.answer())
    again = make(tmp_path, seconds=two + 1, rehearsal=False)
    train.measure(again)  # torch is there now
    found = again.results["measurements"]
    assert found["train ViT-B/16 timm 512"]["values"]["mfu"] == pytest.approx(0.5)
    assert found["train ViT-B/16 ours 512"] == before


class Here:
    """A `Worker` in this process."""

    def __init__(self, what, log, environment):
        module, _, name = what.partition(":")
        self.make = getattr(sys.modules[module], name)
        self.instance, self.told = None, []

    def start(self, patience, **arguments):
        if self.instance is None:
            self.call(patience, "start", **arguments)

    def tell(self, method, **arguments):
        self.told.append((method, json.loads(json.dumps(arguments))))

    def hear(self, patience):
        method, arguments = self.told.pop(0)
        try:
            if method == "start":
                self.instance = self.make(**arguments)
                return None
            return json.loads(json.dumps(getattr(self.instance, method)(**arguments)))
        except Exception as error:  # as in a process of its own
            raise Failed(f"{type(error).__name__}: {error}") from error

    def call(self, patience, method, **arguments):
        self.tell(method, **arguments)
        return self.hear(patience)

    def close(self, patience=5):
        self.instance = None


def test_the_study_goes_on_until_all_runs_have_ended(tmp_path, monkeypatch):
    """Processes that end early leave runs to the next start; a diverged run isn't waited for."""
    began, done = [], 4

    def run_some(arguments, *_):
        began.append(arguments)
        folder, results = (Path(a.partition("=")[2]) for a in arguments[3:5])
        some = Store(folder, results)
        *first, last = expand(load_study("h200:rehearsal"))[:done]
        values = {"steps": 3, "batch_size": 8, "flops_per_image": 1e15, "evaluations": []}
        for run in first:
            some.record(run, {"status": "done", "seconds": 2, **values})
        some.record(last, {"status": "failed", "error": "FloatingPointError: the loss is nan"})
        if done == 4:
            raise Failed("experiments.scaling did not end within 60 s")

    monkeypatch.setattr(study, "run_module", run_some)
    monkeypatch.setattr(study, "PROCESSES", 2)
    study.measure(here := make(tmp_path, seconds=100))
    said = here.results["measurements"]["study h200:rehearsal"]["failed"]
    # Three of the first are to be fine-tuned, and their checkpoints aren't here.
    assert re.match("runs: 5 missing, 1 failed, 3 waits. Start again .*; .* within 60 s", said)
    done = 9
    study.measure(here := make(tmp_path, seconds=100))
    found = here.values("study h200:rehearsal")
    assert found["exaflops"] == pytest.approx(8 * 24 / 1000)
    assert len(began) == 4 and all("--minutes=0.67" in arguments for arguments in began)
    assert "h200:rehearsal | 8 | 1 | 192 | 0.192" in page(here.results)
    study.measure(make(tmp_path, seconds=100))
    assert len(began) == 4


PARTS = {
    "train": (train.measure, "train ViT-Ti/16 ours 2"),
    "attention": (attention.measure, "attention triton 64 tokens 8 features"),
    "plan": (plan.measure, "plan ViT-Ti/16 4 32 px scan=True accumulation=2"),
    "trace": (trace.measure, "trace ViT-Ti/16 kernels"),
    "input": (input.measure, "input train ViT-Ti/16 with markers"),
    "correct": (correct.measure, "correct losses float32"),
    "batches": (train.measure_batches, "batches ViT-Ti/16 scan 2"),
    "study": (study.measure, "study h200:rehearsal"),
}


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_each_part_is_rehearsed(tmp_path, monkeypatch, part):
    """On tiny sizes; torch and GPUs may be missing, which is said."""
    import experiments.benchmarks.gpu.steps  # noqa: F401 (Here looks it up)

    monkeypatch.setattr(bench, "Worker", Here)
    function, name = PARTS[part]
    here = make(tmp_path, seconds=10_000)
    function(here)
    assert here.values(name), here.results["measurements"]
    before = json.dumps(here.results["measurements"])
    again = make(tmp_path, seconds=10_000)
    page(again.results)
    kept = {n: m for n, m in json.loads(before).items() if "values" in m}
    assert kept.items() <= again.results["measurements"].items()


needs_compiler = pytest.mark.skipif(
    not any(map(topology._installed, topology.CUDA_PLUGINS)),
    reason="needs jax's CUDA plugin, which needs no GPU",
)


@needs_compiler
@pytest.mark.parametrize("way", ["cudnn", "unpadded", "triton", "mosaic"])
def test_attention_compiles_for_the_gpu(way):
    devices = topology.open_topology(topology.parse_topology("h200:1"))
    mesh = make_mesh(MeshConfig(), devices)
    dtype = "float16" if way == "mosaic" else "bfloat16"
    shape = (2, 256, 12, 64) if way == "mosaic" else (2, 197, 12, 64)
    array = jax.ShapeDtypeStruct(shape, dtype, sharding=replicated(mesh))
    function = jax.jit(attention.with_gradients(attention.IMPLEMENTATIONS[way]))
    with use_mesh(mesh):
        text = function.lower(*[array] * 4).compile().as_text()
    target = {"triton": "triton", "mosaic": "mosaic_gpu"}.get(way, "__cudnn$fmha")
    assert re.search(rf'custom_call_target="[^"]*{re.escape(target)}', text)
    assert ("pad(" in text) == (way in ("cudnn", "triton"))


@pytest.mark.slow
@needs_compiler
def test_the_steps_compile_for_the_gpu(tmp_path):
    """A tiny step, as `--part=predict` compiles it."""
    here = make(tmp_path, seconds=1000)
    plan.predict(here)
    (found,) = (m["values"] for m in here.results["measurements"].values())
    kinds = {kind for kind, *_ in found["kernels"]}
    assert {"product", "other"} <= kinds and found["peak_gib"] > 0
