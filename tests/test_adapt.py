"""Fitting a checkpoint to another model: every tensor is accounted for."""

import chex
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from vit_jax.models.options import RESIZES
from vit_jax.models.stacking import stack_layers, unstack_layers
from vit_jax.models.variants import ModelConfig, build_model
from vit_jax.weights.adapt import (
    DROP,
    adapt,
    flatten,
    resize_patch_kernel,
    resize_positions,
    unflatten,
)
from vit_jax.weights.official import from_official

NANO = {"variant": "ViT-nano/8", "depth": 2}
HYBRID = {"variant": "R+Ti/16", "depth": 2, "width": 48, "stem_width": 32}
RESNET = {"variant": "R26x1", "stages": (1, 1), "stem_width": 32}
MIXER = {"variant": "Mixer-S/8", "width": 24, "depth": 2, "token_mlp_dim": 10, "mlp_dim": 40}
OPTIONAL = {"qk_norm": True, "layer_scale": 0.1, "registers": 3, "mlp": "swiglu"}
PARALLEL = {"parallel": True, "pool": "map", "representation_size": 20}
LAW = settings(deadline=None, max_examples=50)  # the first example may compile


def make(num_classes=5, size=32, seed=0, **options):
    """Returns a model and random parameters."""
    config = ModelConfig(
        **{**({} if "variant" in options else NANO), "dtype": "float32", **options}
    )
    model = build_model(config, num_classes, size if isinstance(size, tuple) else (size, size))
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    rng = np.random.default_rng(seed)
    return model, jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32), shapes)


def params(*args, **options):
    return make(*args, **options)[1]


def between(source, target, **options):
    """Calls `adapt` from one (model, parameters) to another, with their grids."""
    (was, arrays), (model, fresh) = source, target
    return adapt(arrays, fresh, grid=model.grid, source_grid=was.grid, **options)


def assert_accounted(report, source, target):
    def names(entries):
        return {entry.split()[0] for entry in entries}

    taken = [*report.loaded, *names(report.resized)]
    assert len(set(taken)) == len(taken) == len(report.loaded) + len(report.resized)
    assert sorted([*taken, *report.initialised]) == sorted(flatten(target))
    assert sorted([*taken, *report.dropped]) == sorted(flatten(source))


@pytest.mark.parametrize(
    "options",
    [NANO, OPTIONAL, PARALLEL, HYBRID, RESNET, MIXER],
    ids=["ViT", "optional", "parallel", "hybrid", "ResNet", "Mixer"],
)
def test_same_architecture_new_head(options):
    source, target = make(7, 64, seed=0, **options), make(3, 64, seed=1, **options)
    adapted, report = between(source, target)
    for name, leaf in flatten(adapted).items():
        expected = target[1] if name.startswith("head/") else source[1]
        np.testing.assert_array_equal(leaf, flatten(expected)[name])
    assert report.initialised == report.dropped == ("head/bias", "head/kernel")
    assert_accounted(report, source[1], target[1])
    assert not report.resized
    assert "initialised 2: head/bias, head/kernel" in str(report)


def test_pre_logits_are_dropped_with_the_head():
    """Fine-tuning removes the whole pretraining head (section 3.2 of the paper)."""
    source = params(representation_size=20)
    _, report = adapt(source, params(), grid=(4, 4))
    assert "pre_logits/kernel" in report.dropped
    assert_accounted(report, source, params())
    with pytest.raises(ValueError, match=r"pre_logits/bias: \(20,\) in the checkpoint, not in"):
        adapt(source, params(), grid=(4, 4), drop=())
    _, report = adapt(source, source, grid=(4, 4))  # a model that has the layer keeps it
    assert "pre_logits/kernel" in report.loaded


# Layers


@pytest.mark.parametrize("options", [{}, OPTIONAL, {"position_at": "layers"}])
@pytest.mark.parametrize("scan", [False, True])
def test_layers_are_stacked_as_the_target_has_them(scan, options):
    loop = params(**options)
    target = params(scan=scan, seed=1, **options)
    expected = stack_layers(loop, 2) if scan else loop
    blocks = [loop["Transformer"][f"encoderblock_{i}"] for i in range(2)]
    others = {k: v for k, v in loop["Transformer"].items() if not k.startswith("encoderblock")}
    whole = {**others, "encoderblock": jax.tree.map(lambda *leaves: np.stack(leaves), *blocks)}
    # Published ones may have all layers in one.
    for source in (loop, stack_layers(loop, 2), {**loop, "Transformer": whole}):
        adapted, report = adapt(source, target, grid=(4, 4))
        chex.assert_trees_all_equal(adapted, {**expected, "head": target["head"]})
        assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(adapted))
        assert_accounted(report, adapted, target)


@pytest.mark.parametrize("scan", [False, True])
def test_layers_that_differ_are_listed(scan):
    source = flatten(params(depth=3))
    del source["Transformer/encoderblock_1/LayerNorm_0/scale"]
    source["Transformer/encoderblock_1/LayerNorm_0/bias"] = np.zeros(7, np.float32)
    with pytest.raises(ValueError) as error:
        adapt(unflatten(source), params(scan=scan, depth=3), grid=(4, 4))
    if not scan:
        assert "encoderblock_1/LayerNorm_0/bias: (7,) in the checkpoint, (96,)" in str(error.value)
        assert "encoderblock_1/LayerNorm_0/scale: (96,) in the model, not" in str(error.value)
        return
    for name in ("scale", "bias"):
        missing = f"encoderblock/LayerNorm_0/{name}: (2, 96) in the model, not in the checkpoint"
        assert missing in str(error.value)
        assert f"encoderblock_0/LayerNorm_0/{name}: (96,) in the checkpoint, not" in str(
            error.value
        )


# Position embeddings


@pytest.mark.parametrize(("options", "size"), [(NANO, (32, 48)), (HYBRID, (128, 192))])
def test_another_resolution_resizes_position_embeddings(options, size):
    source, target = make(size=size[0], **options), make(size=size[1], seed=1, **options)
    adapted, report = between(source, target)
    width = source[1]["cls"].shape[-1]
    assert report.resized == (f"pos_embedding (1, 4, 4, {width}) -> (1, 6, 6, {width})",)
    expected = resize_positions(source[1]["pos_embedding"].reshape(1, 4, 4, -1), (6, 6))
    np.testing.assert_array_equal(adapted["pos_embedding"], expected.reshape(1, 36, width))
    assert_accounted(report, source[1], target[1])


@pytest.mark.parametrize("position", ["learned_1d", "learned_2d"])
@pytest.mark.parametrize(("at", "scan"), [("stem", False), ("layers", False), ("layers", True)])
def test_every_learned_table_at_every_place(position, at, scan):
    """Resizes to and from grids that aren't square, each layer's table alike."""
    options = {"position": position, "position_at": at}
    source, target = make(size=(16, 48), **options), make(size=(32, 24), scan=scan, **options)
    adapted, report = between(source, target)
    assert_accounted(report, adapted, target[1])
    tables = (2 if position == "learned_2d" else 1) * (2 if at == "layers" else 1)
    assert len(report.resized) == tables
    if scan:
        adapted = unstack_layers(adapted)

    def table(model, arrays, layer):
        if at == "layers":
            arrays = arrays["Transformer"][f"encoderblock_{layer}"]
        if position == "learned_1d":
            return arrays["pos_embedding"].reshape(*model.grid, 96)
        halves = arrays["pos_embedding_rows"][0], arrays["pos_embedding_columns"][0]
        halves = [np.broadcast_to(half, (*model.grid, 48)) for half in halves]
        return np.concatenate(halves, axis=-1)

    for layer in (0, 1):
        expected = resize_positions(table(*source, layer), (4, 3))
        np.testing.assert_allclose(table(target[0], adapted, layer), expected, atol=1e-6)


def test_as_many_patches_in_another_grid_are_resized_too():
    """The shapes agree, but the grids do not."""
    tall, wide = make(size=(48, 32)), make(size=(32, 48), seed=1)
    adapted, report = between(tall, wide)
    assert report.resized == ("pos_embedding (1, 6, 4, 96) -> (1, 4, 6, 96)",)
    expected = resize_positions(tall[1]["pos_embedding"].reshape(6, 4, 96), (4, 6))
    np.testing.assert_array_equal(adapted["pos_embedding"].reshape(4, 6, 96), expected)
    _, report = between(tall, make(size=(48, 32), seed=1))
    assert not report.resized


def test_a_source_grid_that_is_not_square_must_be_known():
    source, target = params(size=(32, 48)), params(size=32)
    match = r"(?s)embedding: \(1, 24, 96\) in the checkpoint, \(1, 4, 4, 96\) here.*set source_grid"
    for wrong in (None, (5, 5)):
        with pytest.raises(ValueError, match=match):
            adapt(source, target, grid=(4, 4), source_grid=wrong)
    _, report = adapt(source, target, grid=(4, 4), source_grid=(4, 6))
    assert report.resized


@pytest.mark.parametrize("scan", [False, True])
def test_relative_positions_are_not_resized(scan):
    options = {"position": "relative", "scan": scan}
    source = make(size=(32, 48), **options)
    _, report = between(source, make(size=(32, 48), seed=1, **options))
    assert not report.resized and any("relative_embedding" in name for name in report.loaded)
    for size in (32, (48, 32)):  # the latter of as many offsets, with another meaning
        target = make(size=size, **options)
        with pytest.raises(ValueError, match=r"add '.\*relative_embedding' to reinitialize"):
            between(source, target)
        afresh = ("head/.*", ".*relative_embedding")
        adapted, report = between(source, target, reinitialize=afresh)
        kept = {name for name in flatten(adapted) if name.endswith("relative_embedding")}
        assert kept and kept == {*report.initialised} - {"head/bias", "head/kernel"}
        for name in kept:
            np.testing.assert_array_equal(flatten(adapted)[name], flatten(target[1])[name])


@pytest.mark.parametrize("position", ["sincos_2d", "rotary", "none"])
def test_fixed_positions_have_nothing_to_resize(position):
    _, report = between(make(position=position), make(size=(48, 24), position=position))
    assert not report.resized


@pytest.mark.parametrize("slot", [False, True])
@pytest.mark.parametrize("side", [5, 12, 24])
def test_resize_reference(golden, side, slot):
    """The class slot of published tables goes to the class token unchanged; the grid is resized."""
    _, io = golden("posemb_resize")
    table, expected = io["posemb_7x7"], io[f"to_{side}x{side}"]
    if slot:
        names = {
            "cls": np.zeros_like(table[:, :1]),
            "Transformer/posembed_input/pos_embedding": table,
        }
        published = from_official(names)
        np.testing.assert_array_equal(published["cls"], expected[:, :1])
        table = published["pos_embedding"]
    else:
        table = table[:, 1:]
    fresh = np.zeros_like(expected[:, 1:])
    adapted, report = adapt({"pos_embedding": table}, {"pos_embedding": fresh}, grid=(side, side))
    np.testing.assert_allclose(adapted["pos_embedding"], expected[:, 1:], atol=2e-6)
    assert len(report.resized) == 1


SIDES = st.integers(1, 30)


@LAW
@given(r=SIDES, c=SIDES, rows=SIDES, columns=SIDES, seed=st.integers(0, 9))
def test_resizing_positions_law(r, c, rows, columns, seed):
    """Planes stay the same planes, corners stay corners, and the result equals scipy's."""
    down, along = np.random.default_rng(seed).normal(size=(2, 3))

    def plane(rows, columns):  # of places from 0 to 1; a single row is the first
        y, x = (np.linspace(0, 1, n) for n in (rows, columns))
        return (1 + y[:, None, None] * down + x[:, None] * along).astype(np.float32)

    resized = resize_positions(plane(r, c), (rows, columns))
    flat = plane(rows if r > 1 else 1, columns if c > 1 else 1)
    np.testing.assert_allclose(resized, np.broadcast_to(flat, resized.shape), atol=1e-5)

    table = np.random.default_rng(seed).normal(size=(2, r, c, 3)).astype(np.float32)
    resized = resize_positions(table, (rows, columns))
    zoomed = ndimage.zoom(table, (1, rows / r, columns / c, 1), order=1, mode="nearest")
    np.testing.assert_allclose(resized, zoomed, atol=1e-5)
    for row in {0, -1} if rows > 1 else {0}:
        for column in {0, -1} if columns > 1 else {0}:
            corner = resized[:, row, column]
            np.testing.assert_allclose(corner, table[:, row, column], rtol=1e-6)
    np.testing.assert_array_equal(resize_positions(table, (r, c)), table)


# Patch kernels


def resize_patches(patches, side):
    """Resizes bilinearly, aligning edges: [..., P, P, C] -> [..., side, side, C]."""
    old = patches.shape[-2]
    at = (np.arange(side) + 0.5) * old / side - 0.5
    for axis in (-3, -2):
        patches = np.apply_along_axis(lambda x: np.interp(at, np.arange(old), x), axis, patches)
    return patches


@LAW
@given(old=st.integers(1, 16), more=st.integers(0, 16), seed=st.integers(0, 9))
def test_larger_patches_give_the_same_tokens(old, more, seed):
    rng = np.random.default_rng(seed)
    patches = rng.normal(size=(4, old, old, 3))
    kernel = rng.normal(size=(old, old, 3, 5)).astype(np.float32)
    larger = resize_patch_kernel(kernel, (old + more, old + more))
    expected = np.einsum("bpqc,pqcd->bd", patches, kernel)
    found = np.einsum("bpqc,pqcd->bd", resize_patches(patches, old + more), larger)
    np.testing.assert_allclose(found, expected, atol=2e-5)


@LAW
@given(old=st.integers(1, 10), new=st.integers(1, 10), seed=st.integers(0, 9))
def test_patch_kernels_are_the_least_squares_solution(old, new, seed):
    """Minimises the tokens' squared error over all unit patches; equals numpy's solver."""
    kernel = np.random.default_rng(seed).normal(size=(old, old, 2, 3)).astype(np.float32)
    unit = np.eye(old * old).reshape(-1, old, old, 1)
    resized = resize_patches(unit, new).reshape(old * old, new * new)
    solved, *_ = np.linalg.lstsq(resized, kernel.reshape(old * old, -1), rcond=None)
    found = resize_patch_kernel(kernel, (new, new))
    np.testing.assert_allclose(found, solved.reshape(found.shape), atol=1e-5)


@pytest.mark.parametrize("family", ["ViT-nano/{}", "Mixer-S/{}"])
def test_a_model_of_larger_patches_computes_the_same(family):
    """Compares whole networks, on images whose patches are resized as the kernel was."""
    sizes = MIXER if "Mixer" in family else NANO
    source = make(size=32, **{**sizes, "variant": family.format(8)})
    target = make(size=48, **{**sizes, "variant": family.format(12)})
    adapted, report = between(source, target, reinitialize=())
    (resized,) = report.resized
    width = sizes.get("width", 96)
    assert f"kernel (8, 8, 3, {width}) -> (12, 12, 3, {width})" in resized

    images = np.random.default_rng(1).uniform(-1, 1, (2, 4, 8, 4, 8, 3)).astype(np.float32)
    patches = images.swapaxes(2, 3)
    shape = (2, 4, 4, 12, 12, 3)
    larger = jax.image.resize(patches, shape, "bilinear").swapaxes(2, 3).reshape(2, 48, 48, 3)
    expected = jax.jit(source[0].apply)(source[1], images.reshape(2, 32, 32, 3)).features
    found = jax.jit(target[0].apply)(adapted, larger).features
    np.testing.assert_allclose(found, expected, atol=2e-4)


def test_patch_and_grid_together():
    source, target = make(variant="ViT-nano/8"), make(variant="ViT-nano/16", size=96)
    _, report = between(source, target)
    assert [entry.split()[0] for entry in report.resized] == ["embedding/kernel", "pos_embedding"]


def test_a_mixer_keeps_its_number_of_patches():
    with pytest.raises(ValueError) as error:
        between(make(size=32, **MIXER), make(size=48, **MIXER))
    text = str(error.value)
    assert "token_mixing/Dense_0/kernel: (16, 10) in the checkpoint, (36, 10) here" in text
    assert text.count("choose an image size that gives the same number") == 1


# What doesn't fit


def test_another_architecture_lists_both_sides():
    with pytest.raises(ValueError) as error:
        adapt(params(depth=3, pool="token"), params(mlp_dim=100, pool="gap"), grid=(4, 4))
    text = str(error.value)
    assert "  cls: (1, 1, 96) in the checkpoint, not in the model" in text
    assert "encoderblock_2/LayerNorm_0/bias: (96,) in the checkpoint, not in the model" in text
    assert "Dense_0/kernel: (96, 192) in the checkpoint, (96, 100) here" in text
    assert "Transformer/.*" not in text  # no advice to drop what both have
    with pytest.raises(ValueError, match=r"cls: \(1, 1, 96\) in the model, not in the checkpoint"):
        adapt(params(pool="gap"), params(pool="token"), grid=(4, 4))


def test_another_pooling_is_asked_for_as_the_error_says():
    token, map_ = make(pool="token"), make(pool="map")
    with pytest.raises(ValueError) as error:
        between(token, map_)
    drop, afresh = (*DROP, "cls"), ("head/.*", "MAPHead_0/.*")
    assert f"If only the checkpoint is to have cls: drop={drop}." in str(error.value)
    assert f"MAPHead_0/.*: reinitialize={afresh}." in str(error.value)
    adapted, report = between(token, map_, drop=drop, reinitialize=afresh)
    assert "cls" in report.dropped and "MAPHead_0/probe" in report.initialised
    assert_accounted(report, token[1], map_[1])
    chex.assert_trees_all_equal(adapted["MAPHead_0"], map_[1]["MAPHead_0"])


def test_another_family_gets_no_advice_to_drop_all_of_it():
    with pytest.raises(ValueError) as error:
        between(make(size=64, **RESNET), make(size=64))
    assert "conv_root/kernel: (7, 7, 3, 32) in the checkpoint, not in the model" in str(error.value)
    assert "is to have" not in str(error.value)


@pytest.mark.parametrize("option", ["reinitialize", "drop"])
def test_a_regex_that_matches_nothing_is_told(option):
    source, target = params(7), params(3)
    with pytest.raises(ValueError, match=rf"tensor in {option} 'clss': did you mean 'cls'"):
        adapt(source, target, grid=(4, 4), **{option: ("head/.*", "clss")})
    with pytest.raises(ValueError, match=rf"{option}: 'head/\(' is not a regular expression"):
        adapt(source, target, grid=(4, 4), **{option: ("head/(",)})


def test_shapes_stay_where_fresh_values_belong():
    model = build_model(ModelConfig("ViT-nano/8", depth=2), 3, (48, 48))
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    adapted, _ = adapt(params(7, pool="token"), shapes, grid=(6, 6))
    assert isinstance(adapted["head"]["kernel"], jax.ShapeDtypeStruct)
    assert isinstance(adapted["cls"], np.ndarray)
    chex.assert_trees_all_equal_shapes_and_dtypes(adapted, shapes)


NAMES = ["a/b", "a/c", "cls", "head/bias", "Transformer/encoderblock_0/a", "pos_embedding"]
SHAPES = st.lists(st.integers(1, 4), max_size=4).map(tuple)
TREES = st.dictionaries(st.sampled_from(NAMES), SHAPES)


@LAW
@given(source=TREES, target=TREES, drop=st.booleans(), afresh=st.booleans())
def test_all_is_accounted_for_or_all_that_is_not_is_listed(source, target, drop, afresh):
    """For any two trees, nothing is half-loaded and nothing is left out silently."""
    drop = tuple(source) if drop else ()
    afresh = tuple(target) if afresh else ()
    arrays = unflatten({name: np.ones(shape, np.float32) for name, shape in source.items()})
    fresh = unflatten({name: np.zeros(shape, np.float32) for name, shape in target.items()})
    options = {"grid": None, "drop": drop, "reinitialize": afresh}
    differs = {name for name in source.keys() & target.keys() if source[name] != target[name]}
    odd = (target.keys() - source.keys() | differs) - set(afresh)
    odd |= source.keys() - target.keys() - set(drop)
    try:
        adapted, report = adapt(arrays, fresh, **options)
    except ValueError as error:
        listed = {line[2:].split(":")[0] for line in str(error).splitlines() if line[:2] == "  "}
        # Position embeddings that could have been resized are no problem to list.
        assert listed <= odd and odd - listed <= {"pos_embedding"}
        assert all(len(source[name]) == len(target[name]) for name in odd - listed)
        return
    assert odd <= {entry.split()[0] for entry in report.resized}
    assert_accounted(report, arrays, fresh)
    for name, leaf in flatten(adapted).items():
        assert leaf.shape == target[name]
        assert (leaf == (name not in report.initialised)).all()


@pytest.mark.parametrize("method", RESIZES)
def test_ways_of_resizing_positions(method):
    """tests/test_families.py compares them with the libraries that have them."""
    table = np.random.default_rng(0).normal(size=(1, 4, 6, 3)).astype(np.float32)
    np.testing.assert_allclose(resize_positions(table, (4, 6), method), table, atol=1e-6)
    constant = np.full((1, 4, 6, 3), 0.7, np.float32)
    for grid in ((8, 5), (3, 13), (1, 2)):
        resized = resize_positions(constant, grid, method)
        np.testing.assert_allclose(resized, np.full((1, *grid, 3), 0.7), rtol=1e-6)
    others = [resize_positions(table, (2, 3), other) for other in RESIZES if other != method]
    assert min(np.abs(resize_positions(table, (2, 3), method) - o).max() for o in others) > 0.01
