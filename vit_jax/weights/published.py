"""Names of published weights: `augreg:S/16`, `vit:B/16-21k`, `hf:google/vit-base-patch16-224`.

The addresses are those of the READMEs and configs of google-research/vision_transformer and
big_vision. For AugReg ("How to train your ViT?", arXiv 2106.10270) each name is the ImageNet-21k
checkpoint that its authors recommend for the size.
"""

import fnmatch
import os
import re

from vit_jax.config import unknown

BUCKET = "gs://vit_models/"
_AUGREG = {
    "Ti/16": "Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0",
    "S/32": "S_32-i21k-300ep-lr_0.001-aug_none-wd_0.1-do_0.0-sd_0.0",
    "S/16": "S_16-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0",
    "B/32": "B_32-i21k-300ep-lr_0.001-aug_light1-wd_0.1-do_0.0-sd_0.0",
    "B/16": "B_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0",
    "B/8": "B_8-i21k-300ep-lr_0.001-aug_medium2-wd_0.1-do_0.0-sd_0.0",
    "L/16": "L_16-i21k-300ep-lr_0.001-aug_strong1-wd_0.1-do_0.0-sd_0.0",
}
_VIT = ("B/16", "B/32", "L/16", "L/32", "H/14")
_VIT_1K = ("B/16", "B/32", "L/16", "L/32")  # fine-tuned at 384 px
PUBLISHED: dict[str, str] = {
    **{f"augreg:{size}": f"{BUCKET}augreg/{name}.npz" for size, name in _AUGREG.items()},
    **{f"vit:{size}-21k": f"{BUCKET}imagenet21k/ViT-{size.replace('/', '_')}.npz" for size in _VIT},
    **{
        f"vit:{size}-1k": f"{BUCKET}imagenet21k+imagenet2012/ViT-{size.replace('/', '_')}.npz"
        for size in _VIT_1K
    },
}


def list_checkpoints(pattern: str = "*") -> list[str]:
    """Returns the published names that match a glob, such as "*B/16*"."""
    return sorted(fnmatch.filter(PUBLISHED, pattern))


def resolve(name: str | os.PathLike) -> str:
    """Returns the address of a published name; returns paths unchanged.

    `hf:owner/repo` becomes hf://owner/repo. Raises ValueError for an unknown name.
    """
    name = os.fspath(name)
    if name in PUBLISHED:
        return PUBLISHED[name]
    if re.fullmatch(r"hf:[\w.-]+/[\w.-]+", name):
        return "hf://" + name.removeprefix("hf:")
    if name.startswith(("augreg:", "vit:")) and not os.path.exists(name):
        raise unknown("published checkpoint", name, PUBLISHED)
    return name


def by_hand(address: str) -> str:
    """Returns advice on downloading an address on another machine, for error messages."""
    scheme, _, rest = address.partition("://")
    if scheme == "gs":
        url = f"https://storage.googleapis.com/{rest.replace('+', '%2B')}"
        return f"fetch it where there is a network, curl -O {url}, and give the file's path instead"
    repository = "/".join(rest.split("/")[:2])
    url = f"https://huggingface.co/{repository}/resolve/main"
    return (
        "fetch all files where there is a network, "
        f"curl -LO {url}/model.safetensors -LO {url}/config.json -LO "
        f"{url}/preprocessor_config.json (Hugging Face's have it), and give their folder instead"
    )
