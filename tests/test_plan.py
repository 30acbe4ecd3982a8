"""The plan of a run on chips that are not here.

The last test compiles for real TPUs: `pip install 'jax[tpu]'`, which works on any machine, then
`python -m pytest tests/test_plan.py -k compiles`. Without libtpu it is skipped.
"""

import json
import math

import jax
import pytest
from processes import command

from vit_jax.costs import topology
from vit_jax.costs.chips import CHIPS
from vit_jax.costs.collectives import Collective
from vit_jax.costs.compiled import Kernel, OutOfMemory
from vit_jax.costs.flops import TABLE_2, device_days, pretraining_exaflops, training_flops
from vit_jax.costs.report import (
    collectives_report,
    device_bytes,
    kernels_report,
    memory_report,
    remedies,
    run_report,
    show,
    show_ranked,
)
from vit_jax.costs.topology import parse_topology
from vit_jax.data.pipeline import DataConfig, dataset_size
from vit_jax.models.variants import ModelConfig, build_model
from vit_jax.parallel.mesh import MeshConfig, make_mesh
from vit_jax.training.optimizer import ScheduleConfig
from vit_jax.training.plan import search_meshes
from vit_jax.training.recipe import TrainConfig, build_training

CONFIG = "--config=configs/pretrain/formula.py:ViT-nano/8"
PAPER = "--config=configs/pretrain/paper.py:ViT-B/16"


def make_config(variant="ViT-nano/8", **fields):
    fields = {"batch_size": 64, "image_size": 32, "steps": 10, **fields}
    return TrainConfig(
        model=ModelConfig(variant, scan=True),
        data=DataConfig("strokes/10", "train"),
        schedule=ScheduleConfig(1e-3, warmup=1),
        **fields,
    )


@pytest.mark.parametrize(
    ("text", "slices", "chips", "devices", "islands"),
    [
        ("v5e:16x16", 1, 256, 256, 1),
        ("v5e:16x16", 2, 512, 512, 2),
        ("v5e:1x1", 1, 1, 1, 1),
        ("v3:32x32", 1, 1024, 2048, 1),  # a device of v3 is a core
        ("v4:8x8x16", 1, 1024, 1024, 1),  # both cores of a v4 are one device
        ("v4:8x8", 1, 64, 64, 1),
        ("tpu7x:2x2x1", 1, 4, 8, 1),
        ("h100:8", 1, 8, 8, 1),
        ("h100:32x8", 1, 256, 256, 32),
        ("v5litepod-16", 1, 16, 16, 1),
        ("v4-32", 1, 16, 16, 1),  # of TensorCores
        ("v3-8", 1, 4, 8, 1),
    ],
)
def test_topologies(text, slices, chips, devices, islands):
    parsed = parse_topology(text, slices)
    assert (parsed.num_chips, parsed.num_devices) == (chips, devices)
    assert parsed.islands == islands


@pytest.mark.parametrize(
    ("text", "slices", "message"),
    [
        ("v5x:4x4", 1, "unknown chip 'v5x': did you mean 'v5"),
        ("v5e", 1, "expected chips along each side, such as v5e:8x8"),
        ("v4:4,4", 1, "such as v4:8x8x8"),
        ("v5e:4x4x4", 1, "slices of 2 sides, the largest v5e:16x16"),
        ("v5e:16x32", 1, r"for more chips use several slices \(--num_slices\)"),
        ("v5e:3x4", 1, "first two sides are even: the nearest is v5e:4x4"),
        ("v5e:4x4", 0, "num_slices = 0: expected at least 1"),
        ("v4-24", 1, "12 chips, expected a power of 2, or .* such as v4:4x4x4"),
        ("h100:8", 2, "h100:8 or h100:32x8, without slices"),
    ],
)
def test_topologies_that_do_not_exist(text, slices, message):
    with pytest.raises(ValueError, match=message):
        parse_topology(text, slices)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--topology=v6:4x4",), "unknown chip 'v6': did you mean 'v6e'"),
        (
            ("--topology=v5e:4x4", "--config.data.dataset=cars196"),
            "A plan needs no data: give --num_classes and --num_examples",
        ),
    ],
)
def test_errors_of_the_command(arguments, message):
    code, _, err = command("plan", PAPER, *arguments)
    assert code == 1
    assert message in err and "Traceback" not in err


def test_without_the_compiler_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    for text, kind, extra in (("v5e:2x2", "TPU", "tpu"), ("h100:8", "GPU", "cuda12")):
        with pytest.raises(ValueError, match=rf"needs no {kind}: pip install 'jax\[{extra}\]'"):
            topology.open_topology(parse_topology(text))


@pytest.mark.parametrize(
    ("dataset", "split", "given", "size"),
    [
        ("imagenet2012", "train[:99%]", (None, None), (1000, 1_268_355)),
        ("imagenet2012:5.1.0", "train", (None, None), (1000, 1_281_167)),
        ("imagenet21k", "full[51200:]", (None, None), (21_843, 14_197_122 - 51_200)),
        ("jft300m", "train", (None, None), (18_291, 303_000_000)),
        ("strokes/20", "train[:5000]", (None, None), (20, 5000)),
        ("imagenet2012", "train", (7, None), (7, 1_281_167)),
        ("no_such_set", "train", (7, 70), (7, 70)),
    ],
)
def test_the_data_need_not_be_here(dataset, split, given, size):
    assert dataset_size(DataConfig(dataset, split), *given) == size


def test_the_size_of_data_that_is_not_known():
    with pytest.raises(ValueError, match="give --num_classes and --num_examples"):
        dataset_size(DataConfig("no_such_set", "train"), 7)


@pytest.mark.parametrize(("fsdp", "part"), [(1, 1), (8, 8)])
def test_memory_of_the_state(fsdp, part):
    """Adam keeps two moments; with FSDP every device has its part of all that is large."""
    config = make_config(mesh=MeshConfig(fsdp=fsdp, min_size=0))
    training = build_training(config, make_mesh(config.mesh), 8, 1000)
    whole = 4 * sum(leaf.size for leaf in jax.tree.leaves(training.shapes.params))
    error = OutOfMemory(20.0, 15.75)
    sizes = memory_report(training.shapes, training.shardings, error, 16.0)
    assert sizes["parameters"] * 2**30 == pytest.approx(whole / part, rel=0.01)
    assert sizes["optimizer"] == pytest.approx(2 * sizes["parameters"], rel=0.01)
    assert (sizes["fits"], sizes["peak"], sizes["capacity"]) == (False, 20.0, 15.75)
    assert device_bytes(training.shapes.params, training.shardings.params) <= whole


@pytest.mark.parametrize(("row", "mfu"), list(zip(TABLE_2, (0.32, 0.43, 0.39), strict=True)))
def test_the_papers_core_days(row, mfu):
    """2.5k, 0.68k and 0.23k TPUv3-core-days at utilisations of a third and more."""
    variant, _, images, epochs, paper = row
    days = device_days(pretraining_exaflops(variant, epochs, images), mfu, CHIPS["v3"])
    assert days == pytest.approx(paper, rel=0.02)


def test_the_plan_of_the_papers_largest_run():
    """ViT-H/14, 14 epochs of JFT-300M, on TPU v3 at 32 %: 2.5k core-days on any slice."""
    config = make_config("ViT-H/14", batch_size=4096, image_size=224, steps=None, epochs=14.0)
    size = dataset_size(DataConfig("jft300m", "train"))
    training = build_training(config, make_mesh(config.mesh), *size)
    flops = training_flops(training.model) * config.batch_size
    runs = [
        run_report(
            parse_topology(text),
            flops=flops,
            batch_size=config.batch_size,
            steps=training.steps,
            mfu=0.32,
            price=2.0,
        )
        for text in ("v3:16x16", "v3:32x32")
    ]
    for run, chips in zip(runs, (256, 1024), strict=True):
        assert run["steps"] == math.ceil(14 * 303_000_000 / 4096)
        assert run["device_days"] == pytest.approx(2500, rel=0.02)
        assert run["chip_hours"] == pytest.approx(run["device_days"] * 24 / 2)
        assert run["days"] == pytest.approx(run["device_days"] / chips / 2)
        assert run["price"] == pytest.approx(2.0 * run["chip_hours"])
        assert run["img_per_sec"] * run["step_seconds"] == pytest.approx(4096)


def test_time_and_mfu_are_inverse():
    chips = parse_topology("tpu7x:4x4x4")
    numbers = {"flops": 1e18, "batch_size": 1024, "steps": 100}
    run = run_report(chips, mfu=0.4, **numbers)
    assert run_report(chips, seconds=run["step_seconds"], **numbers) == run
    assert run["step_seconds"] == pytest.approx(1e18 / (0.4 * 64 * 2307e12))


def test_collectives_are_summed_by_kind_and_size():
    chips = parse_topology("v5e:4x4", 2)
    inside, across = tuple(range(16)), (0, 16)
    found = [
        Collective("all-gather", 2**30, inside, 12, beside=15 * 10**5),
        Collective("all-gather", 2**29, inside, 2),
        Collective("all-reduce", 2**20, across),
    ]
    gathers, reduces = collectives_report(found, chips)
    assert (gathers["count"], gathers["gib"], gathers["devices"]) == (14, 13.0, 16)
    assert gathers["asynchronous"] == 12
    assert gathers["beside_seconds"] == pytest.approx(12 * 1e-3, rel=0.01)  # at 1.5 GHz
    expected = sum(c.seconds(chips.chip, 16) for c in found[:2])
    assert gathers["roofline_seconds"] == pytest.approx(expected)
    network = 2**20 / chips.chip.network_bandwidth  # 2 (2 - 1) / 2 of the bytes
    assert reduces["roofline_seconds"] == pytest.approx(network)
    v4 = parse_topology("v4:4x4x1", 2)
    assert collectives_report(found[2:], v4)[0]["roofline_seconds"] is None


def too_large(**changes):
    sizes = {"parameters": 1.0, "optimizer": 2.0, "peak": 19.0, "capacity": 11.0, "fits": False}
    return {
        "memory_gib": {**sizes, **changes},
        "model": "ViT-B/16", "dataset": "imagenet2012", "num_classes": 1000, "image_size": 224,
        "batch_size": 64, "topology": "v5e:4x4", "chips": 16, "devices": 16,
        "mesh": {"data": 16, "fsdp": 1, "tensor": 1}, "remat": "none", "accumulation": 1,
        "flops": {"model": 1e12},
    }  # fmt: skip


def test_what_would_make_it_fit():
    """16 GiB of activations in 8 GiB beside the state: half of the activations fit."""
    found = " | ".join(remedies(too_large()))
    assert "model.remat=full" in found
    assert "--config.accumulation=2" in found
    assert "32 chips" in found
    assert "FSDP" not in found  # without any state it would still be 16 GiB of 11
    fsdp, larger = remedies(too_large(peak=12.0))[2:]
    assert fsdp.endswith("--config.mesh.fsdp=2") and larger.startswith("a larger slice: 32")
    # A state that alone is too large: microbatches don't help.
    found = remedies(too_large(parameters=8.0, optimizer=16.0, peak=25.0))
    assert [remedy.split(":")[0] for remedy in found] == ["remat", "FSDP"]


def test_kernels_are_summed_by_name():
    h100 = CHIPS["h100"]
    found = [
        Kernel("flash", 10**12, 2**30, 12),
        Kernel("flash", 10**12, 2**30),
        Kernel("other", 1, 1),
    ]
    flash, other = kernels_report(found, h100)
    assert (flash["count"], flash["flops"], flash["gib"]) == (13, 13e12, 13.0)
    assert other["count"] == 1
    assert flash["roofline_seconds"] == pytest.approx(13e12 / h100.peak_flops)
    (flash,) = kernels_report([found[0], Kernel("flash", None, None)], h100)
    assert flash["count"] == 13 and flash["roofline_seconds"] is None


@pytest.mark.parametrize(
    ("topology", "slices", "meshes"),
    [
        ("v5e:4x4", 2, [(32, 1, 1), (8, 4, 1), (2, 16, 1), (16, 1, 2), (8, 2, 2), (2, 8, 2)]),
        ("h100:2x8", 1, [(16, 1, 1), (8, 2, 1), (2, 8, 1), (8, 1, 2), (4, 2, 2), (2, 4, 2)]),
    ],
)
def test_a_search_keeps_fsdp_and_tensor_inside_an_island(topology, slices, meshes):
    parsed = parse_topology(topology, slices)
    config = make_config("ViT-Ti/8", image_size=32)  # of three heads
    found = {(m.fsdp, m.tensor) for m in search_meshes(config, parsed, 10)}
    assert found == {(fsdp, tensor) for _, fsdp, tensor in meshes if tensor == 1}
    config = make_config("ViT-S/8", image_size=32)
    found = [(m.fsdp, m.tensor) for m in search_meshes(config, parsed, 10)]
    assert found == [mesh[1:] for mesh in meshes]
    assert all(math.prod(mesh) == parsed.num_devices for mesh in meshes)


def test_the_table_labels_estimates():
    text = show(too_large())
    assert "DOES NOT FIT" in text and "accumulation=2" in text and "ESTIMATE" not in text
    chips = parse_topology("v5e:4x4")
    numbers = {"flops": 1e12, "batch_size": 64, "steps": 10, "price": 1.0}
    fits = [
        {
            **too_large(fits=True),
            "remat": remat,
            "run": {
                "from": "the compiler's estimated cycles",
                **run_report(chips, seconds=seconds, **numbers),
            },
        }
        for remat, seconds in (("full", 2.0), ("dots", 1.0))
    ]
    assert "an ESTIMATE from the compiler's estimated cycles" in show(fits[0])
    ranked = show_ranked(fits).splitlines()[1:]
    assert "dots" in ranked[0] and "full" in ranked[1]


def test_it_compiles_for_chips_that_are_not_here(tmp_path):
    """Runs the real command and compiler: memory, FLOPs as by formula, and a search's ranking."""
    pytest.importorskip("libtpu")
    plan = ("plan", CONFIG, "--topology=v5e:2x2", "--config.model.dtype=bfloat16")
    plan += ("--config.model.scan=true", "--config.model.pool=gap")  # all of the last block too
    plan += (f"--output={tmp_path / 'plan.json'}",)
    code, out, err = command(*plan, "--price_per_chip_hour=1.2")
    assert code == 0, err
    assert "fits" in out and "ESTIMATE" in out and "price" in out
    report = json.loads((tmp_path / "plan.json").read_text())
    config = ModelConfig("ViT-nano/8", representation_size=384, pool="gap")
    model = build_model(config, report["num_classes"], (32, 32))
    assert report["flops"]["model"] == training_flops(model) * 128
    assert abs(report["flops"]["recomputed"]) < 0.1
    assert 0 < report["run"]["mfu"] < 1 and report["loops_of_unknown_trips"] == 0
    parameters = sum(x.size for x in jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0))))
    assert report["memory_gib"]["parameters"] * 2**30 == pytest.approx(4 * parameters)
    assert report["memory_gib"]["capacity"] == 15.75
    assert {row["kind"] for row in report["collectives"]} == {"all-reduce"}
    assert sum(row["gib"] for row in report["collectives"]) * 2**30 > 2 * parameters

    code, out, err = command(*plan, "--search", "--num_slices=2", "--config.batch_size=64")
    assert code == 0, err
    (first, *_) = json.loads((tmp_path / "plan.json").read_text())
    network = [row for row in first["collectives"] if row["devices"] == 2]
    assert sum(row["gib"] for row in network) * 2**30 > parameters / 4  # a device's share, bf16
    assert (
        "microbatches" in out
        and "data=2 x fsdp=4 x tensor=1" in out
        and "data=8 x fsdp=1 x tensor=1" in out
    )


def test_it_compiles_for_gpus_that_are_not_here(tmp_path):
    """Uses jax's CUDA plugin (5 GB; no GPU): memory, collectives, and time from an MFU."""
    if not any(map(topology._installed, topology.CUDA_PLUGINS)):
        pytest.skip("no compiler for GPUs")
    plan = ("plan", CONFIG, "--topology=h100:2x8", f"--output={tmp_path / 'plan.json'}")
    code, out, err = command(*plan)
    assert code == 0, err
    assert "an ESTIMATE from an assumed MFU of 0.4" in out
    report = json.loads((tmp_path / "plan.json").read_text())
    assert report["memory_gib"]["fits"] and report["run"]["mfu"] == pytest.approx(0.4)
    assert {row["devices"] for row in report["collectives"]} == {16}
    assert "cycles" not in report and "compiled" not in report["flops"]
