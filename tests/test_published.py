"""Names of published weights, and the error without a network."""

import pytest

from vit_jax.weights.published import PUBLISHED, licence, resolve
from vit_jax.weights.timm_architectures import architecture
from vit_jax.weights.trained import load


def test_addresses():
    assert resolve("vit:B/16-21k") == "gs://vit_models/imagenet21k/ViT-B_16.npz"
    assert resolve("vit:L/32-1k") == "gs://vit_models/imagenet21k+imagenet2012/ViT-L_32.npz"
    assert resolve("augreg:S/16").startswith("gs://vit_models/augreg/S_16-i21k-300ep-")
    assert resolve("hf:google/vit-base-patch16-224") == "hf://google/vit-base-patch16-224"
    for path in ("runs/b16", "/abs/x.npz", "gs://bucket/x.npz", "hf://a/b"):
        assert resolve(path) == path
    assert resolve("dinov3:S/16") == "hf://timm/vit_small_patch16_dinov3.lvd1689m"
    assert resolve("siglip2:B/16") == "hf://timm/vit_base_patch16_siglip_224.v2_webli"
    assert licence(resolve("dinov3:S+/16")).startswith("DINOv3 License, https://")
    assert licence(resolve("vit:B/16-21k")) == "Apache-2.0" and licence("hf://a/b") is None
    assert licence(f"{resolve('clip:B/16')}@main/model.safetensors") == "Apache-2.0"
    assert licence("hf://facebook/dinov3-vits16-pretrain-lvd1689m").startswith("DINOv3 License")
    with pytest.raises(ValueError, match="unknown published checkpoint 'dinov2:S/16'"):
        resolve("dinov2:S/16")
    for address in PUBLISHED.values():  # of timm's, the architecture is one that is read
        if address.startswith("hf://timm/"):
            name = address.removeprefix("hf://timm/").partition(".")[0]
            assert architecture(name) is not None, name
    assert len(set(PUBLISHED.values())) == len(PUBLISHED)
    with pytest.raises(ValueError, match="unknown published checkpoint 'vit:B/16': did you mean"):
        resolve("vit:B/16")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "vit:B/16-1k",
            r"curl -O https://storage\.googleapis\.com/vit_models/imagenet21k%2Bimagenet2012/",
        ),
        ("hf:google/vit-base-patch16-224", r"curl -LO https://huggingface\.co/google/vit-base"),
    ],
)
def test_no_network(monkeypatch, tmp_path, name, message):
    """The message says where the file is, how to fetch it and where to put it."""
    monkeypatch.setenv("VIT_JAX_OFFLINE", "1")
    monkeypatch.setenv("VIT_JAX_CACHE", str(tmp_path))
    with pytest.raises(ConnectionError, match=rf"{message}.*into {tmp_path}/.*--config\.init"):
        load(name)
