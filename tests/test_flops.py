"""The analytic FLOPs count against XLA's, and against the paper."""

import functools
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from vit_jax.costs.flops import (
    MISPRINT,
    TABLE_6,
    forward_macs,
    pretraining_exaflops,
)
from vit_jax.models.variants import KNOWN, ModelConfig, build_model
from vit_jax.training.stages import StageConfig, build_stages

ROOT = Path(__file__).parent.parent


def make(variant, image_size=(224, 224), num_classes=1000, **options):
    return build_model(ModelConfig(variant, **options), num_classes, image_size)


@functools.cache
def xla_macs(primitive, shapes, params):
    """Returns XLA's own count of one matmul or convolution, without taps on padding."""
    lowered = jax.jit(lambda *x: primitive.bind(*x, **dict(params))).lower(*shapes)
    return lowered.cost_analysis()["flops"] / 2


def traced_macs(jaxpr):
    """Sums over every matmul and convolution of a traced program."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            shapes = (jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype) for x in equation.invars)
            params = sorted(equation.params.items())
            total += xla_macs(equation.primitive, tuple(shapes), tuple(params))
        for inner in equation.params.values():
            if hasattr(inner, "eqns"):
                total += equation.params.get("length", 1) * traced_macs(inner)
    return total


def forward(model):
    """Traces one image's forward pass with its initialisation, which has no matmul.

    Includes the intermediate values, which the formulas count whether they are read or not.
    """
    image = jax.ShapeDtypeStruct((1, *model.image_size, 3), jnp.float32)
    run = lambda key, image: model.module.init_with_output(key, image, mutable=True)[0].logits  # noqa: E731
    return jax.make_jaxpr(run)(jax.random.key(0), image)


# Scanned layers are traced once; XLA's count of a layer is multiplied by their number.
# Any width of a ResNet, and any ViT on a stem, is counted as the others are.
@pytest.mark.long
@pytest.mark.parametrize("variant", [v for v in KNOWN if not re.search("x[34]$|[+]ViT-[TL]", v)])
def test_every_variant(variant):
    model = make(variant, scan="ViT" in variant)
    assert traced_macs(forward(model)) == forward_macs(model)


VIT, HYBRID, MIXER = "ViT-nano/16", "R26+ViT-Ti/32", "Mixer-S/32"


@pytest.mark.long
@pytest.mark.parametrize("image_size", [(384, 384), (96, 160), (32, 32)])
@pytest.mark.parametrize("variant", [VIT, HYBRID, "R+ViT-Ti/16", MIXER])
def test_every_family_at_other_resolutions(variant, image_size):
    model = make(variant, image_size)
    assert traced_macs(forward(model)) == forward_macs(model)


@pytest.mark.parametrize("preactivation", [True, False])  # padded differently
@pytest.mark.parametrize("image_size", [(224, 224), (97, 161), (30, 43)])
def test_padding(image_size, preactivation):
    model = make("R26x1", image_size, preactivation=preactivation)
    assert traced_macs(forward(model)) == forward_macs(model)


@pytest.mark.parametrize(
    ("variant", "options"),
    [
        (VIT, {"scan": False}),
        (VIT, {"scan": True, "remat": "full"}),
        (VIT, {"remat": "dots", "dtype": "float32"}),
        (VIT, {"pool": "gap"}),
        (VIT, {"pool": "map"}),
        (VIT, {"pool": "gap", "registers": 4}),
        (VIT, {"pool": "map", "registers": 4}),
        (VIT, {"registers": 4}),
        (VIT, {"representation_size": 40}),
        (VIT, {"position": "none"}),
        *((VIT, {"position": "learned_2d", "position_at": at}) for at in ("stem", "layers")),
        *((VIT, {"position": "relative", "position_at": at}) for at in ("stem", "layers")),
        (VIT, {"position": "relative", "position_at": "shared", "scan": True}),
        (VIT, {"position": "relative", "pool": "map", "registers": 2}),
        (VIT, {"position": "sincos_2d"}),
        (VIT, {"position": "rotary"}),
        (VIT, {"qk_norm": True, "layer_scale": 1e-4}),
        (VIT, {"parallel": True}),
        (VIT, {"mlp": "gelu"}),
        (VIT, {"mlp": "swiglu"}),
        (VIT, {"mlp": "swiglu", "pool": "map"}),
        (VIT, {"width": 64, "depth": 3, "mlp_dim": 100, "num_heads": 4}),
        (HYBRID, {"pool": "map", "representation_size": 40, "mlp": "swiglu"}),
        (HYBRID, {"position": "relative", "remat": "full", "scan": True}),
        (HYBRID, {"stages": (1, 2), "stem_width": 32}),
        (MIXER, {"mlp": "swiglu", "token_mlp_dim": 40, "remat": "dots"}),
        ("R26x1", {"stages": (1, 2, 1), "stem_width": 96, "remat": "full"}),
        ("R26x1", {"stages": (1, 1), "stem_width": 32, "stage_features": True}),
    ],
)
def test_every_option(variant, options):
    model = make(variant, (96, 160), num_classes=7, **options)
    assert traced_macs(forward(model)) == forward_macs(model)


@pytest.mark.parametrize(
    "stage",
    [
        StageConfig(1.0, image_size=48, keep=0.5),
        StageConfig(1.0, patch=8, keep=0.3),
        StageConfig(1.0, image_size=160),
    ],
)
@pytest.mark.parametrize("pool", ["map", "gap"])
def test_every_stage(stage, pool):
    model = make("ViT-Ti/16", (96, 96), num_classes=7, pool=pool, registers=2, scan=True)
    (stage,) = build_stages([stage], model, 10)
    small = stage.model
    shapes = (
        jax.eval_shape(small.init, jax.random.key(0)),
        jax.ShapeDtypeStruct((1, *small.image_size, 3), jnp.float32),
    )
    run = lambda p, x: small.module.apply({"params": p}, x, jax.random.split(jax.random.key(0), 1))  # noqa: E731
    traced = jax.make_jaxpr(lambda *args: run(*args).logits)(*shapes)
    assert traced_macs(traced) == forward_macs(small) != forward_macs(model)


# XLA counts element-wise work (softmax, norms, GELU) too: under 1% of large models, though 1.3% of
# Ti/16, and 2.4% of R50x1 at one image, where the weights are standardised for it alone. In
# bfloat16 on CPU each product's casts would add another percent.
@pytest.mark.parametrize(
    ("variant", "batch"),
    [
        ("ViT-B/32", 1),
        ("ViT-B/16", 1),
        ("Mixer-B/16", 1),
        ("R26x2", 32),
    ],
)
def test_the_whole_compiled_forward_pass(variant, batch):
    model = make(variant, dtype="float32")
    params = jax.eval_shape(model.init, jax.random.key(0))
    images = jax.ShapeDtypeStruct((batch, 224, 224, 3), jnp.float32)
    run = jax.jit(lambda p, x: model.module.apply({"params": p}, x, mutable=True)[0].logits)
    compiled = run.lower(params, images).compile()
    flops = compiled.cost_analysis()["flops"]
    assert flops == pytest.approx(2 * forward_macs(model) * batch, rel=0.01)


@pytest.mark.parametrize(("variant", "epochs", "paper"), TABLE_6)
def test_the_papers_compute(variant, epochs, paper):
    ours = pretraining_exaflops(variant, epochs)
    printed = 0.5  # the paper prints no decimals
    if (variant, epochs, paper) == MISPRINT:
        # Half of the paper's own row of 14 epochs is 834, and so is what we compute.
        assert abs(ours - paper) > 0.02 * paper + printed
        (paper,) = (e / 2 for v, n, e in TABLE_6 if (v, n) == (variant, 2 * epochs))
    assert abs(ours - paper) <= 0.02 * paper + printed


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "vit_jax.costs.flops", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_command():
    """Published totals of parameters, GMACs of the literature, and the table of the paper."""
    expected = {
        "ViT-B/16": ("86,567,656", "17.56", "55.48", "223.5"),
        "ViT-H/14": ("632,045,800", "167.30", "503.48", "2129.0"),  # 378 px
        "R+Ti/16": ("6,337,704", "0.43", "1.32", "5.5"),
        "R50+L/32": ("328,994,856", "19.27", "56.89", "245.2"),
        "R50x1": ("25,549,352", "3.95", "11.77", "50.2"),
        "Mixer-B/16": ("59,880,472", "12.60", "37.03", "160.4"),
    }
    result = command(*expected)
    assert result.returncode == 0, result.stderr
    rows = [tuple(cell.strip() for cell in x.split("|")[1:-1]) for x in result.stdout.splitlines()]
    assert [row for row in rows if len(row) == 5][2:] == [(k, *v) for k, v in expected.items()]
    table = [row for row in rows if len(row) == 6][2:]
    assert [(v, int(n), int(paper)) for v, n, paper, *_ in table] == list(TABLE_6)
    assert [row for row in table if row[5]] == [
        (*map(str, MISPRINT), "832.5", "-3.1%", "half of the paper's row of 14 epochs is 834")
    ]


def test_command_with_an_unknown_variant():
    result = command("ViT-B16")
    assert result.returncode == 1
    assert "did you mean 'ViT-B/16'" in result.stderr and "Traceback" not in result.stderr
