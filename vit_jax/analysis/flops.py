"""How much arithmetic a model needs, by formula."""

from vit_jax.models.variants import Model

# Dense bfloat16 peak of one jax device, FLOP/s: the vendors' published figures. A device of v2 and
# v3 is one core, half a chip. Keys are `jax.Device.device_kind`.
PEAK_FLOPS: dict[str, float] = {
    "TPU v2": 22.5e12,
    "TPU v3": 61.5e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


def forward_macs(model: Model) -> int:
    """Multiply-accumulates of one image's forward pass: matrix products alone."""
    vit = model.module
    height, width = model.image_size
    patches = (height // vit.patch) * (width // vit.patch)
    tokens = patches + (vit.pool == "token")
    embedding = patches * vit.patch**2 * 3 * vit.width
    projections = 4 * tokens * vit.width**2  # q, k, v, out
    attention = 2 * tokens**2 * vit.width  # scores, and their sum over values
    mlp = 2 * tokens * vit.width * vit.mlp_dim
    features = vit.representation_size or vit.width
    head = features * model.num_classes
    if vit.representation_size is not None:
        head += vit.width * features
    return embedding + vit.depth * (projections + attention + mlp) + head


def training_flops(model: Model) -> int:
    """Model FLOPs of one image's training: forward and backward, nothing recomputed.

    A multiply-accumulate is 2 FLOPs and the backward pass costs two forward passes; this convention
    reproduces the compute column of arXiv 2010.11929, Table 6.
    """
    return 6 * forward_macs(model)
