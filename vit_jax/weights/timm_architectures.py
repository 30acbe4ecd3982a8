"""What the names of timm's architectures say: sizes, and options that weights don't show.

timm's own models (`vision_transformer.py`, `deit.py`, `eva.py` of timm 1.0) are the source.
"""

import re
from typing import Any, NamedTuple

# Width, depth, MLP width, heads by the part of a name before its patch.
_SIZES = {
    "tiny": (192, 12, 768, 3),
    "xsmall": (256, 10, 1024, 4),
    "wee": (256, 14, 1280, 4),
    "little": (320, 14, 1792, 5),
    "small": (384, 12, 1536, 6),
    "small_plus": (384, 12, 1536, 6),
    "medium": (512, 12, 2048, 8),
    "mediumd": (512, 20, 2048, 8),
    "betwixt": (640, 12, 2560, 10),
    "base": (768, 12, 3072, 12),
    "so150m2": (832, 21, 2176, 13),
    "so150m": (896, 18, 2304, 14),
    "large": (1024, 24, 4096, 16),
    "intern300m": (1024, 24, 4096, 16),
    "so400m": (1152, 27, 4304, 16),
    "huge": (1280, 32, 5120, 16),
    "huge_plus": (1280, 32, 5120, 20),
    "giant": (1408, 40, 6144, 16),
    "giantopt": (1536, 40, 6144, 16),
    "gigantic": (1664, 48, 8192, 16),
    "7b": (4096, 40, 8192, 32),
}
# Names whose size differs from their word's.
_EXCEPTIONS = (
    (r"vit_base_patch16_gap_224", (768, 12, 3072, 16)),
    (r"vit_base_patch(?:16|32)_plus_.*", (896, 12, 3584, 14)),
    (r"vit_giant_patch14_(?:reg\d_)?(?:dinov2|tipsv2)|vit_giant_.*_lingbot", (1536, 40, 4096, 24)),
    (r"vit_giant_patch16_radio_v3", (1536, 40, 6144, 24)),
    (r"vit_small_patch16_36x1_224", (384, 36, 1536, 6)),
    (r"vit_pe_\w+_gigantic_.*", (1536, 50, 8960, 16)),
    (r"vit_pe_lang_gigantic_.*", (1536, 47, 8960, 16)),
    (r"vit_pe_lang_large_.*", (1024, 23, 4096, 16)),
    (r"eva02_tiny_.*", (192, 12, 512, 3)),
    (r"eva02_small_.*", (384, 12, 1024, 6)),
    (r"eva02_base_.*", (768, 12, 2048, 12)),
    (r"eva02_large_.*", (1024, 24, 2730, 16)),
)
_NAME = re.compile(
    r"(?:vit(?:_pe_(?:core|lang|spatial))?|deit3?|flexivit|eva|eva02)_"
    rf"({'|'.join(sorted(_SIZES, key=len, reverse=True))})(?:_distilled)?"
    r"(?:_patch(\d+)|_r_s16_p8|_r26_s32|_r50_s16|_r50_s32)?(?:_36x1)?(?:_plus)?"
    r"(?:_rope(?:_mixed)?(?:_ape)?)?(?:_reg(\d))?(?:_gap|_map)?"
    r"(?:_clip(?:_quickgelu)?|_dinov2|_dinov3(?:_qkvb)?|_tipsv2|_siglip(?:_gap)?|_radio_v\d"
    r"|_lingbot|_xp)?(?:_\d+)?(?:_in21k)?(?:_miil)?"
)
# Hybrids with stems of other libraries, another order of norms, parallel or grouped attention.
_OTHER = re.compile(r".*_(?:mci|rpn|18x2)_.*|vit_(?:dwee|dlittle|pwee|dpwee)_.*|eva02_enormous_.*")
_EVA = re.compile(
    r"eva02_.*|eva_giant_.*|vit_.*_(?:dinov3|lingbot)(?:_qkvb)?|vit_pe_.*|vit_.*_rope_.*"
)
# Whether tensors exist, by timm's arguments: the defaults of both classes.
_DEFAULTS = {"class_token": True, "qkv_bias": True, "use_abs_pos_emb": True}
_DEFAULTS_OF = {  # Eva or not
    False: {"pre_norm": False, "final_norm": True},
    True: {"use_pre_transformer_norm": False, "scale_mlp": False, "scale_attn_inner": False},
}
# Options of timm's models that differ from the defaults, by their timm names; all that match.
_OPTIONS: tuple[tuple[str, dict[str, Any]], ...] = (
    (r"vit_.*_clip_.*|vit_pe_.*|vit_.*_(dinov3|lingbot)(_qkvb)?", {"epsilon": 1e-5}),
    (r".*_quickgelu_.*", {"act_layer": "quick_gelu"}),
    (
        r"vit_(base_patch32|so400m_patch16|giantopt_patch16)_siglip_.*"
        r"|vit_large_patch16_siglip_(gap_)?512",
        {"act_layer": "gelu_tanh"},
    ),
    (r"eva_large_.*|eva_giant_patch14_\d+|eva02_(?!.*_clip_).*", {"global_pool": "avg"}),
    (r"vit_.*_dinov3(_qkvb)?|vit_pe_(lang|spatial)_.*", {"global_pool": "avg"}),
    (r"vit_.*_radio_v3", {"reg_tokens": 7}),
    (r"vit_.*_radio_v4", {"reg_tokens": 9}),
    (r"vit_.*_(dinov3|lingbot)(_qkvb)?", {"reg_tokens": 4}),
    (r"vit_.*_(dinov3|lingbot)(_qkvb)?", {"rope_type": "dinov3", "rope_rotate_half": True}),
    (r"vit_.*_(dinov3|lingbot)(_qkvb)?", {"rope_temperature": 100.0, "use_rot_pos_emb": True}),
    (r"eva02_.*|vit_.*_rope_reg.*", {"use_rot_pos_emb": True, "ref_feat_shape": 16}),
    (r"vit_.*_rope_(mixed_)?(ape_)?224", {"use_rot_pos_emb": True, "rope_grid_indexing": "xy"}),
    (r"vit_.*_rope_(mixed_)?(ape_)?224", {"rope_temperature": 100.0}),
    (r"vit_.*_rope_mixed_.*", {"rope_type": "mixed", "rope_temperature": 10.0}),
    (r"vit_pe_.*", {"use_rot_pos_emb": True, "rope_grid_indexing": "xy"}),
    (r"vit_pe_(?!\w+_gigantic).*", {"rope_grid_offset": 1.0}),
    (r"vit_pe_core_(tiny|small)_.*_384|vit_pe_core_large_.*_336", {"ref_feat_shape": 24}),
    (r"vit_pe_core_base_.*_224", {"ref_feat_shape": 14}),
    (r"vit_pe_(lang|spatial)_.*|vit_pe_core_gigantic_.*", {"ref_feat_shape": 32}),
    (r"vit_pe_core_.*", {"attn_pool_num_heads": 8}),
    (r"vit_.*_(siglip|gap|map)_.*|vit_pe_\w+_gigantic_.*", {"class_token": False}),
    (r"vit_.*_(siglip|map)_\d+|vit_pe_core_.*", {"global_pool": "map"}),
    (
        r"vit_.*_(dinov3|lingbot)(_qkvb)?|vit_.*_rope_(mixed_)?224|vit_.*_rope_reg.*",
        {"use_abs_pos_emb": False},
    ),
    (r"vit_.*_clip_.*", {"pre_norm": True}),
    (r"vit_pe_.*", {"use_pre_transformer_norm": True}),
    (
        r"vit_.*_dinov3|vit_giant_.*_lingbot|.*_miil|vit_so150m2_.*|vit_(betwixt|medium)_patch16_gap_.*"
        r"|vit_mediumd_.*_rope_.*",
        {"qkv_bias": False},
    ),
    (
        r"vit_.*_(dinov2|tipsv2|dinov3|lingbot)(_qkvb)?|vit_.*_rope_.*|vit_pe_lang_.*|deit3_.*"
        r"|vit_pe_spatial_gigantic_.*|vit_.*_plus_2\d+|.*_36x1_.*|vit_intern300m_.*"
        r"|vit_(base|large)_.*_radio_v3|vit_(so150m2|betwixt|little|mediumd?|wee)_.*_gap_.*",
        {"init_values": 1e-5},
    ),
    (r"vit_.*_radio_v\d|vit_intern300m_.*", {"final_norm": False}),
    (r"vit_.*_xp_.*", {"pre_norm": True, "qkv_bias": False, "qk_norm": True}),
    (r"eva02_(base|large)_.*", {"scale_mlp": True}),
    (r"eva02_.*_clip_.*", {"scale_attn_inner": True}),
)


class Architecture(NamedTuple):
    """What a name says."""

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    patch: int | None  # None for a hybrid
    registers: int
    distilled: bool  # with a second class token and head
    parallel: bool  # blocks as in ViT-22B
    eva: bool  # of timm's class Eva, else VisionTransformer
    options: dict[str, Any]  # timm's arguments


def architecture(name: str) -> Architecture | None:
    """Returns what a name of timm says of its ViT; None for other blocks than ours."""
    match = _NAME.fullmatch(name)
    if match is None or _OTHER.fullmatch(name):
        return None
    size = _SIZES[match[1]]
    for pattern, other in _EXCEPTIONS:
        if re.fullmatch(pattern, name):
            size = other
    eva = _EVA.fullmatch(name) is not None
    options: dict[str, Any] = {**_DEFAULTS, **_DEFAULTS_OF[eva]}
    for pattern, some in _OPTIONS:
        if re.fullmatch(pattern, name):
            options |= some
    registers = options.pop("reg_tokens", int(match[3] or 0))
    hybrid = re.search(r"_r(\d*)_", name) is not None
    patch = None if hybrid else int(match[2] or 16)
    words = ("_distilled_" in name, "_xp_" in name)
    return Architecture(*size, patch, registers, *words, eva, options)
