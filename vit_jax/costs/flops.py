r"""Computes parameters and FLOPs of a model by formula.

python -m vit_jax.costs.flops [variant ...]

prints parameters, multiply-accumulates (MACs) and pretraining compute of the variants (default:
all). It also compares our compute with Table 6 of arXiv 2010.11929, and prints the MFU that the
TPU days in its Table 2 imply.

Letters in the formulas: N tokens, D width, M MLP width, C channels.
"""

import math

import jax

from vit_jax.command_line import run
from vit_jax.config import explained_errors
from vit_jax.costs.chips import CHIPS, Chip
from vit_jax.models.mixer import Mixer
from vit_jax.models.resnet import ResNet, StemConfig
from vit_jax.models.transformer import TransformerConfig
from vit_jax.models.variants import KNOWN, Model, ModelConfig, build_model
from vit_jax.models.vit import ViT

# Variant, epochs of JFT-300M, exaFLOPs of pretraining: arXiv 2010.11929, Table 6.
TABLE_6: tuple[tuple[str, int, int], ...] = (
    ("ViT-B/32", 7, 55),
    ("ViT-B/16", 7, 224),
    ("ViT-L/32", 7, 196),
    ("ViT-L/16", 7, 783),
    ("ViT-L/16", 14, 1567),
    ("ViT-H/14", 14, 4262),
    ("R50x1", 7, 50),
    ("R50x2", 7, 199),
    ("R101x1", 7, 96),
    ("R152x1", 7, 141),
    ("R152x2", 7, 563),
    ("R152x2", 14, 1126),
    ("R200x3", 14, 3306),
    ("R50x1+ViT-B/32", 7, 106),
    ("R50x1+ViT-B/16", 7, 274),
    ("R50x1+ViT-L/32", 7, 246),
    ("R50x1+ViT-L/16", 7, 859),
    ("R50x1+ViT-L/16", 14, 1668),
)
# A probable misprint of Table 6: it contradicts the row of twice the epochs.
MISPRINT = ("R50x1+ViT-L/16", 7, 859)
JFT_IMAGES = 303_000_000

# Variant, dataset, its images, epochs, TPUv3-core-days: arXiv 2010.11929, Table 2. The epochs of
# ImageNet-21k are the longer of the two in Table 3.
TABLE_2: tuple[tuple[str, str, int, int, int], ...] = (
    ("ViT-H/14", "JFT-300M", JFT_IMAGES, 14, 2500),
    ("ViT-L/16", "JFT-300M", JFT_IMAGES, 14, 680),
    ("ViT-L/16", "ImageNet-21k", 14_197_122, 90, 230),
)

Size = tuple[int, int]  # rows, columns


def forward_macs(model: Model) -> int:
    """Counts multiply-accumulates of one image's forward pass: matrix products and convolutions.

    Like XLA and Table 6, doesn't count a convolution's taps on padding.
    """
    count = {ViT: _vit, ResNet: _resnet, Mixer: _mixer}[type(model.module)]
    macs, features = count(model.module, model.image_size)
    return macs + features * model.num_classes


def training_flops(model: Model) -> int:
    """Counts model FLOPs of training on one image: forward and backward, without recomputation.

    A multiply-accumulate is 2 FLOPs, and the backward pass costs two forward passes. This
    convention reproduces the compute column of arXiv 2010.11929, Table 6.
    """
    return 6 * forward_macs(model)


def pretraining_exaflops(variant: str, epochs: int, images: int = JFT_IMAGES) -> float:
    """Computes Table 6's exaFLOPs: epochs of JFT-300M at 224 pixels, with one class."""
    model = build_model(ModelConfig(variant), 1, (224, 224))
    return training_flops(model) * images * epochs / 1e18


def device_days(exaflops: float, mfu: float, chip: Chip) -> float:
    """Returns days on one jax device of `chip` (TPU v3: a core) at a model FLOPs utilisation."""
    return exaflops * 1e18 / (mfu * chip.device_peak_flops) / 86_400


def published_parameters(model: Model) -> int:
    """Counts parameters as in official checkpoints.

    Their learned position embedding has a slot for the class token; ours is part of the token.
    """
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0)))
    total = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    vit = model.module
    if isinstance(vit, ViT) and vit.class_token and vit.positions.kind == "learned_1d":
        total += vit.config.width
    return total


def _vit(vit: ViT, size: Size) -> tuple[int, int]:
    """Returns the MACs of a ViT or hybrid without the head, and the head's input features."""
    config, channels, macs = vit.config, 3, 0
    if vit.stem is not None:
        macs, size, channels = _stem(vit.stem, size)
    patches = math.prod(size) // vit.patch**2
    macs += math.prod(size) * channels * config.width  # every pixel is in one patch
    patches = vit.kept or patches
    tokens = patches + vit.positions.prefix
    block = _attention(config, tokens, tokens) + _mlp(config, tokens, config.width, config.mlp_dim)
    if vit.positions.kind == "relative":
        # Products of queries and offset keys, in every layer, even where the keys are 0.
        block += tokens**2 * config.width
    macs += config.depth * block
    if vit.pool == "map":
        read = patches + vit.class_token
        macs += _attention(config, 1, read) + _mlp(config, 1, config.width, vit.pool_config.mlp_dim)
    macs += patches * config.width * (vit.patch_outputs or 0)
    if vit.representation_size is None:
        twice = vit.pool == "token+gap" or vit.distillation
        return macs, config.width * (2 if twice else 1)
    return macs + config.width * vit.representation_size, vit.representation_size


def _mixer(mixer: Mixer, size: Size) -> tuple[int, int]:
    """Returns MACs and features like `_vit`. Token mixing is an MLP over N for each channel."""
    config, patches = mixer.config, math.prod(size) // mixer.patch**2
    across_tokens = _mlp(config, config.width, patches, mixer.token_mlp_dim)
    across_channels = _mlp(config, patches, config.width, config.mlp_dim)
    embedding = math.prod(size) * 3 * config.width
    return embedding + config.depth * (across_tokens + across_channels), config.width


def _resnet(resnet: ResNet, size: Size) -> tuple[int, int]:
    """Returns MACs and features like `_vit`."""
    macs, _, channels = _stem(resnet.stem, size)
    if resnet.stage_features:  # channels double from stage to stage
        channels = sum(2 * channels // 2**i for i in range(len(resnet.stem.stages)))
    return macs, channels


def _attention(config: TransformerConfig, queries: int, tokens: int) -> int:
    """Counts q, out per query and k, v per token (D^2 each), scores and weighted sum (N D each)."""
    projections = (2 * queries + 2 * tokens) * config.width**2
    return projections + 2 * queries * tokens * config.width


def _mlp(config: TransformerConfig, vectors: int, width: int, mlp_dim: int) -> int:
    """Counts D M per vector and dense layer: two, or three with SwiGLU."""
    return (3 if config.mlp == "swiglu" else 2) * vectors * width * mlp_dim


def _stem(config: StemConfig, size: Size) -> tuple[int, Size, int]:
    """Returns the MACs of root and stages, the output's (rows, columns), and its channels."""

    def halved(size: Size) -> Size:
        return -(-size[0] // 2), -(-size[1] // 2)

    def conv(kernel: int, stride: int, size: Size, inputs: int, outputs: int) -> int:
        taps = (_taps(side, kernel, stride) for side in size)
        return math.prod(taps) * inputs * outputs

    macs = conv(7, 2, size, 3, config.width)
    size, channels = halved(halved(size)), config.width  # by the root and the pooling
    for stage, units in enumerate(config.stages):
        width = config.width * 2**stage
        for unit in range(units):
            stride = 2 if stage and not unit else 1
            after = halved(size) if stride == 2 else size
            macs += conv(1, 1, size, channels, width)
            macs += conv(3, stride, size, width, width)
            macs += conv(1, 1, after, width, 4 * width)
            if not unit:  # the shortcut's projection
                macs += conv(1, stride, size, channels, 4 * width)
            size, channels = after, 4 * width
    return macs, size, channels


def _taps(side: int, kernel: int, stride: int) -> int:
    """Counts the kernel taps on pixels, not padding, along one side of the image.

    Assumes v2's symmetric padding; v1's is the same or mirrored, with the same count.
    """
    starts = range(-(kernel // 2), side - kernel // 2, stride)
    return sum(min(start + kernel, side) - max(start, 0) for start in starts)


def variant_row(variant: str) -> str:
    """Formats parameters and GMACs with 1,000 classes, and exaFLOPs of 7 JFT-300M epochs."""
    large = 378 if variant.endswith("/14") else 384
    models = [build_model(ModelConfig(variant), 1000, (side, side)) for side in (224, large)]
    gmacs, gmacs_large = (forward_macs(model) / 1e9 for model in models)
    return (
        f"| {variant:15} | {published_parameters(models[0]):13,} | {gmacs:9.2f} "
        f"| {gmacs_large:9.2f} | {pretraining_exaflops(variant, 7):8.1f} |"
    )


def table_6_row(row: tuple[str, int, int]) -> str:
    """Formats the paper's exaFLOPs, ours, and the difference."""
    variant, epochs, paper = row
    ours = pretraining_exaflops(variant, epochs)
    note = ""
    if row == MISPRINT:
        twice = next(e for v, n, e in TABLE_6 if (v, n) == (variant, 2 * epochs))
        note = f"half of the paper's row of {2 * epochs} epochs is {twice / 2:.0f}"
    return (
        f"| {variant:15} | {epochs:6} | {paper:5} | {ours:6.1f} | {ours / paper - 1:+10.1%} "
        f"| {note:43} |"
    )


def table_2_row(row: tuple[str, str, int, int, int]) -> str:
    """Formats the paper's TPUv3-core-days, the implied MFU, and our core-days at 40% MFU."""
    variant, dataset, images, epochs, paper = row
    exaflops = pretraining_exaflops(variant, epochs, images)
    ours = device_days(exaflops, 0.4, CHIPS["v3"])
    return (
        f"| {variant:8} | {dataset:12} | {epochs:6} | {exaflops:8.0f} | {paper:9,} "
        f"| {0.4 * ours / paper:11.0%} | {ours:10,.0f} |"
    )


def main(arguments: list[str]) -> None:
    """Prints the tables as Markdown."""
    with explained_errors():
        print(
            "1,000 classes; 384 px is 378 where the patch is 14; exaFLOPs: 7 epochs of JFT-300M\n"
        )
        print("| variant         |    parameters | GMACs 224 | GMACs 384 | exaFLOPs |")
        print("|-----------------|--------------:|----------:|----------:|---------:|")
        for variant in arguments[1:] or KNOWN:
            print(variant_row(variant), flush=True)
    print("\nexaFLOPs of Table 6 of the paper\n")
    print(f"| variant         | epochs | paper | ours   | difference | {'note':43} |")
    print(f"|-----------------|-------:|------:|-------:|-----------:|{'-' * 45}|")
    for row in TABLE_6:
        print(table_6_row(row))
    print("\nTPUv3-core-days of Table 2 of the paper\n")
    print("| variant  | dataset      | epochs | exaFLOPs | core-days | implied MFU | at 40% MFU |")
    print("|----------|--------------|-------:|---------:|----------:|------------:|-----------:|")
    for row in TABLE_2:
        print(table_2_row(row))


if __name__ == "__main__":
    run(main, rest="VARIANT ...")
