"""Names of weights: `embedded`, `augreg:S/16`, `dinov3:S/16`, `hf:google/vit-base-patch16-224`.

`embedded` is the checkpoint in the package, see `experiments.embedded`; the others are published.

DINOv2, DINOv3, SigLIP, CLIP and DeiT III are timm's files on the hub, named as in timm 1.0. Other
addresses are those of the READMEs and configs of google-research/vision_transformer and
big_vision. For AugReg ("How to train your ViT?", arXiv 2106.10270) each name is the ImageNet-21k
checkpoint that its authors recommend for the size.
"""

import fnmatch
import os
import re
from pathlib import Path
from urllib.parse import quote

from vit_jax.config import InputError, unknown
from vit_jax.weights.download import cache_path

# What a hub's repository holds for a model: timm's have no preprocessor_config.json.
HUB_FILES = ("model.safetensors", "config.json", "preprocessor_config.json")
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
EMBEDDED = "embedded"
_TIMM = {  # family -> sizes here and in timm, what follows the size there, the licence
    "dinov2": (
        {"S/14": "small_patch14", "B/14": "base_patch14", "L/14": "large_patch14"}
        | {"g/14": "giant_patch14"},
        *("vit_{}_dinov2.lvd142m", "Apache-2.0"),
    ),
    "dinov2_reg": (
        {"S/14": "small_patch14", "B/14": "base_patch14", "L/14": "large_patch14"}
        | {"g/14": "giant_patch14"},
        *("vit_{}_reg4_dinov2.lvd142m", "Apache-2.0"),
    ),
    "dinov3": (
        {"S/16": "small_patch16", "S+/16": "small_plus_patch16", "B/16": "base_patch16"}
        | {"L/16": "large_patch16", "H+/16": "huge_plus_patch16"},
        "vit_{}_dinov3.lvd1689m",
        "DINOv3 License, https://ai.meta.com/resources/models-and-libraries/dinov3-license/",
    ),
    "siglip": (
        {"B/16": "base_patch16_siglip_224", "So400m/14": "so400m_patch14_siglip_384"},
        *("vit_{}.webli", "Apache-2.0"),
    ),
    "siglip2": (
        {"B/16": "base_patch16_siglip_224", "L/16": "large_patch16_siglip_256"}
        | {"So400m/14": "so400m_patch14_siglip_224", "g/16": "giantopt_patch16_siglip_256"},
        *("vit_{}.v2_webli", "Apache-2.0"),
    ),
    "clip": (  # LAION's
        {"B/32": "base_patch32", "B/16": "base_patch16", "L/14": "large_patch14"}
        | {"H/14": "huge_patch14"},
        *("vit_{}_clip_224.laion2b", "Apache-2.0"),
    ),
    "deit3": (
        {"S/16": "small_patch16", "M/16": "medium_patch16", "B/16": "base_patch16"}
        | {"L/16": "large_patch16", "H/14": "huge_patch14"},
        *("deit3_{}_224.fb_in22k_ft_in1k", "Apache-2.0"),
    ),
}
PUBLISHED: dict[str, str] = {
    EMBEDDED: str(Path(__file__).with_name("embedded.npz")),
    **{
        f"{family}:{size}": f"hf://timm/{name.format(theirs)}"
        for family, (sizes, name, _) in _TIMM.items()
        for size, theirs in sizes.items()
    },
    **{f"augreg:{size}": f"{BUCKET}augreg/{name}.npz" for size, name in _AUGREG.items()},
    **{f"vit:{size}-21k": f"{BUCKET}imagenet21k/ViT-{size.replace('/', '_')}.npz" for size in _VIT},
    **{
        f"vit:{size}-1k": f"{BUCKET}imagenet21k+imagenet2012/ViT-{size.replace('/', '_')}.npz"
        for size in _VIT_1K
    },
}


_FAMILIES = {name.partition(":")[0] for name in PUBLISHED}


def licence(address: str) -> str | None:
    """Returns the licence of the weights at an address of `PUBLISHED`; None if it isn't known.

    Any file and revision of a repository, and DINOv3 wherever it is on the hub, have the same one.
    """
    address = re.sub(r"^(hf://[^/@]+/[^/@]+).*", r"\1", address)
    if address.startswith("hf://") and "dinov3" in address.lower():
        return _TIMM["dinov3"][2]
    families = (name.partition(":")[0] for name, known in PUBLISHED.items() if known == address)
    family = next(families, None)
    return _TIMM[family][2] if family in _TIMM else "Apache-2.0" if family else None


def list_checkpoints(pattern: str = "*") -> list[str]:
    """Returns the names of weights that match a glob, such as "*B/16*"."""
    return sorted(fnmatch.filter(PUBLISHED, pattern))


def resolve(name: str | os.PathLike) -> str:
    """Returns the address of a published name; returns paths unchanged.

    `hf:owner/repo[@revision]` becomes hf://owner/repo[@revision]. Raises ValueError for an unknown
    name.
    """
    name = os.fspath(name)
    if name in PUBLISHED:
        return PUBLISHED[name]
    if re.fullmatch(r"hf:[\w.-]+/[\w.-]+(@[\w.-]+)?", name):
        return "hf://" + name.removeprefix("hf:")
    if name.partition(":")[0] in _FAMILIES and ":" in name and not os.path.exists(name):
        raise unknown("published checkpoint", name, PUBLISHED)
    return name


def web_address(path: str) -> str:
    """Returns the HTTPS address of `gs://bucket/file` or `hf://owner/repo[@revision][/file]`.

    Without a file it is the repository's `model.safetensors`. Returns web addresses unchanged.
    Raises ValueError for other schemes.
    """
    scheme, _, rest = path.partition("://")
    if scheme in ("http", "https"):
        return path
    if scheme == "gs":
        return f"https://storage.googleapis.com/{quote(rest)}"
    match = re.fullmatch(r"((?:datasets/|spaces/)?[^/@]+/[^/@]+)(?:@([^/]+))?(?:/(.+))?", rest)
    if scheme != "hf" or not match:
        raise InputError(
            f"{path}: expected a local path, gs://bucket/file, hf://owner/repo/file or "
            "https://host/file"
        )
    repository, revision, file = match.groups()
    file = quote(file or "model.safetensors")
    return f"https://huggingface.co/{repository}/resolve/{revision or 'main'}/{file}"


def by_hand(path: str) -> str:
    """Returns advice on what to do where `path` can't be fetched, for error messages."""
    url = web_address(path)
    repository = url.rpartition("/")[0]
    if path.startswith("hf://") and url.endswith("/model.safetensors"):
        files = [f"{repository}/{name}" for name in HUB_FILES]
        command = f"curl {' '.join(f'-LO {file}' for file in files)}"
        what, given = "all files that are there", "their folder"
    else:
        command, what, given = (
            f"curl -{'' if path.startswith('gs:') else 'L'}O {url}",
            "it",
            "its path",
        )
    return (
        f"fetch {what} where there is a network, {command}, and give {given} instead, or put what "
        f"you fetch into {cache_path(url).parent}; or choose other weights (a transfer's "
        "--config.init=embedded are in this package; with nothing behind the = it starts from "
        "random ones)"
    )
