"""Official names <-> ours: every naming generation, and bit-identical round trips."""

from functools import partial

import jax
import ml_dtypes
import numpy as np
import pytest

from vit_jax.models.stacking import stack_layers, unstack_layers
from vit_jax.models.variants import ModelConfig, build_model
from vit_jax.weights.adapt import adapt, flatten, unflatten
from vit_jax.weights.files import read_arrays, write_npz
from vit_jax.weights.official import from_official, rename, to_official

POSITION = "Transformer/posembed_input/pos_embedding"
MODELS = {
    "token": {},
    "gap": {"pool": "gap"},
    "map": {"pool": "map"},
    "pre_logits": {"representation_size": 20},
    "no position": {"position": "sincos_2d", "pool": "gap"},
    "hybrid": {"variant": "R50+ViT-nano/16", "stages": (1, 2, 1), "stem_width": 32},
    "root only": {"variant": "R+ViT-nano/16", "stem_width": 32},
    "mixer": {"variant": "Mixer-S/16", "width": 16, "token_mlp_dim": 8, "mlp_dim": 24},
}


def shapes(variant="ViT-nano/8", **options):
    model = build_model(ModelConfig(variant, depth=2, **options), 5, (32, 64))
    return jax.eval_shape(model.init, jax.random.key(0))


def ours(**options):
    """Returns random parameters, including zeros of both signs."""
    rng = np.random.default_rng(0)
    return {
        name: np.where(rng.random(leaf.shape) < 0.1, -0.0, rng.normal(size=leaf.shape)).astype("f4")
        for name, leaf in flatten(shapes(**options)).items()
    }


def same_bits(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape, name
        assert a[name].tobytes() == b[name].tobytes(), name


@pytest.mark.parametrize("model", MODELS)
def test_round_trip(model):
    arrays = ours(**MODELS[model])
    official = to_official(arrays)
    same_bits(from_official(official), arrays)
    assert (POSITION in official) == ("pos_embedding" in arrays)
    slot = "cls" in arrays
    if POSITION in official:
        assert official[POSITION].shape[1] == arrays["pos_embedding"].shape[1] + slot
        assert not official[POSITION][:, :slot].any()


def test_scanned_layers_are_unstacked():
    arrays = ours()
    stacked = flatten(jax.device_get(stack_layers(unflatten(arrays), 2)))
    same_bits(to_official(stacked), to_official(arrays))
    assert from_official(stacked).keys() == stacked.keys()  # not here: the model may want them so


@pytest.mark.parametrize("name", ["vit_token", "vit_token_prelogits", "vit_gap", "vit_nonsquare"])
def test_original_names(golden, name):
    """Generation (a); the round trip differs only in the class slot, of which the sum matters."""
    published, _ = golden(name)
    read = from_official(published)
    position, cls = published[POSITION], published.get("cls")
    slot = cls is not None
    np.testing.assert_array_equal(read["pos_embedding"], position[:, slot:])
    if slot:
        np.testing.assert_array_equal(read["cls"], cls + position[:, :1])
    for old, new in (
        ("LayerNorm_2/scale", "LayerNorm_1/scale"),
        ("MlpBlock_3/Dense_0/bias", "MlpBlock_0/Dense_0/bias"),
        (
            "MultiHeadDotProductAttention_1/out/kernel",
            "MultiHeadDotProductAttention_0/out/kernel",
        ),
    ):
        block = "Transformer/encoderblock_2/"
        np.testing.assert_array_equal(read[block + new], published[block + old])
    back = to_official(read)
    assert {k: v.shape for k, v in back.items()} == {k: v.shape for k, v in published.items()}
    same_bits(
        {k: back[k] for k in back.keys() - {"cls", POSITION}},
        {k: published[k] for k in published.keys() - {"cls", POSITION}},
    )


@pytest.mark.parametrize("name", ["hybrid_stage3", "hybrid_root_only"])
def test_hybrids(golden, name):
    published, _ = golden(name)
    read = from_official(published)
    root = {k: v for k, v in published.items() if k.startswith(("block", "conv_root", "gn_root"))}
    same_bits({k: read[k] for k in root}, root)
    four = {k: v[None, None, None] if "gn" in k else v for k, v in published.items()}
    assert four["gn_root/scale"].shape == (1, 1, 1, 32)
    same_bits(from_official(four), read)


@pytest.mark.parametrize(
    "name", ["bigvision_tok", "bigvision_gap_rep", "bigvision_gap_sincos2d", "bigvision_map"]
)
def test_big_vision_names_are_ours(golden, name):
    published, _ = golden(name)
    same_bits(from_official(published), published)
    same_bits(from_official(to_official(published)), published)


def test_stacked_layers_of_big_vision(golden):
    published, _ = golden("bigvision_scan_tok")
    same_bits(from_official(published), published)
    loop = flatten(unstack_layers(unflatten(published)))
    same_bits(from_official(to_official(published)), loop)


def generations(published, modern):
    """One model's names in every generation that the golden files lack."""
    with_prefix = {
        prefix: {prefix + name: array for name, array in modern.items()}
        for prefix in ("params/", "params/img/", "img/", "opt/target/params/")
    }
    with_prefix["params/"] |= {"opt/0/mu/cls": np.ones(3), "opt/1/count": np.ones(())}
    with_prefix["params/img/"] |= {
        "params/txt/head/kernel": np.ones((2, 2)),
        "params/t": np.ones(1),
        "params/b": np.ones(1),
    }
    yield from with_prefix.items()
    adam = {f"opt/state/param_states/{name}/grad_ema": array for name, array in published.items()}
    yield (
        "opt/target/",
        {"opt/target/" + k: v for k, v in published.items()}
        | adam
        | {"opt/state/step": np.int64(7)},
    )
    encoder = dict(published)
    encoder["Transformer/pos_embedding"] = encoder.pop(POSITION)
    yield "Transformer/pos_embedding", encoder
    without_slot = dict(modern)
    without_slot["Transformer/pos_embedding"] = without_slot.pop("pos_embedding")
    yield "Transformer/pos_embedding without a slot", without_slot


def test_every_generation(golden):
    published, _ = golden("vit_token")
    modern = from_official(published)
    seen = set()
    for generation, arrays in generations(published, modern):
        same_bits(from_official(arrays), modern)
        seen.add(generation)
    assert len(seen) == 7


def test_bfloat16_files(golden, tmp_path):
    """Generation (g): numpy stores bfloat16 as two bytes of no type."""
    published, _ = golden("bigvision_tok")
    half = {f"params/{k}": v.astype(ml_dtypes.bfloat16) for k, v in published.items()}
    np.savez(tmp_path / "half.npz", **half)
    with np.load(tmp_path / "half.npz") as file:
        assert file["params/cls"].dtype == np.dtype("V2")
    read = from_official(read_arrays(tmp_path / "half.npz"))
    same_bits(read, {k: half[f"params/{k}"].astype(np.float32) for k in published})


def test_unknown_names_are_reported_and_not_dropped(golden):
    published, _ = golden("vit_token")
    read = from_official({f"params/{k}": v for k, v in published.items()} | {"extra/x": np.ones(2)})
    assert "extra/x" in read
    target = {k: v for k, v in read.items() if k != "extra/x"}
    with pytest.raises(ValueError, match="extra/x"):
        adapt(unflatten(read), unflatten(target), grid=(4, 4))


def test_two_models_in_a_file(golden):
    published, _ = golden("bigvision_tok")
    with pytest.raises(ValueError, match="params/cls and cls are both cls here"):
        from_official({f"params/{k}": v for k, v in published.items()} | {"cls": published["cls"]})
    with pytest.raises(ValueError, match="a and b are both c here: expected one model's weights"):
        rename({"a": np.ones(1), "b": np.ones(1)}, lambda _: "c")


@pytest.mark.parametrize("shape", [(17,), (1, 17, 40), (17, 48)])
def test_misshapen_position_embeddings(golden, shape):
    published, _ = golden("vit_token")
    with pytest.raises(ValueError, match=r"cls \(1, 1, 48\) and position embeddings .*expected"):
        from_official({**published, POSITION: np.ones(shape, np.float32)})


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"registers": 2}, "registers"),
        ({"layer_scale": 0.1}, "layer_scale_0"),
        ({"qk_norm": True}, "key_norm/scale"),
        ({"mlp": "swiglu"}, "gate/kernel"),
        ({"position": "relative"}, "relative_embedding"),
        ({"position": "learned_2d"}, "pos_embedding_rows"),
        ({"position_at": "layers"}, "encoderblock_0/pos_embedding"),
        ({"variant": "R50x1", "stages": (1, 1), "stem_width": 32}, "gn_head/scale"),
    ],
)
def test_what_the_official_models_lack_is_not_written(options, name):
    options = {"variant": "ViT-nano/8", **options}
    depth = {} if options["variant"] == "R50x1" else {"depth": 2}
    model = build_model(ModelConfig(**options, **depth), 5, (32, 32))
    params = flatten(jax.eval_shape(model.init, jax.random.key(0)))
    with pytest.raises(ValueError, match=f"official models have no .*{name}"):
        to_official(params)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("pool", ["token", "gap", "map"])
def test_timm_reads_the_files(tmp_path, pool, scan):
    """timm's own npz loader gives the same logits (needs torch, torchvision and timm)."""
    torch = pytest.importorskip("torch")
    timm = pytest.importorskip("timm.models", exc_type=ImportError)
    config = ModelConfig("ViT-nano/8", depth=2, pool=pool, dtype="float32", scan=scan)
    arrays = {name: 0.2 * array for name, array in ours(pool=pool, scan=scan).items()}
    write_npz(tmp_path / "vit.npz", to_official(arrays))
    images = np.random.default_rng(0).uniform(-1, 1, (2, 32, 64, 3)).astype(np.float32)
    model = build_model(config, 5, images.shape[1:3])
    theirs = timm.VisionTransformer(
        img_size=images.shape[1:3],
        patch_size=8,
        num_classes=5,
        embed_dim=96,
        depth=2,
        num_heads=3,
        mlp_ratio=2,
        class_token=pool == "token",
        global_pool={"gap": "avg"}.get(pool, pool),
        fc_norm=False,
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
        act_layer=partial(torch.nn.GELU, approximate="tanh"),
    ).eval()
    theirs.load_pretrained(str(tmp_path / "vit.npz"))
    with torch.no_grad():
        logits = theirs(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
    np.testing.assert_allclose(model.apply(unflatten(arrays), images).logits, logits, atol=2e-5)
    assert np.std(logits) > 0.1
