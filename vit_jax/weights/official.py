"""Published ViT checkpoints -> our names. Pure functions from arrays to arrays."""

from functools import reduce

import numpy as np

# The original 2020 files count every module of a block; Linen counts each kind apart.
_RENAMES = (
    ("/MultiHeadDotProductAttention_1/", "/MultiHeadDotProductAttention_0/"),
    ("/LayerNorm_2/", "/LayerNorm_1/"),
    ("/MlpBlock_3/", "/MlpBlock_0/"),
)
_OLD_POSITION = "Transformer/posembed_input/pos_embedding"


def from_official(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays under the names of google-research/vision_transformer's npz files -> under ours.

    There the position embeddings [1, 1 + N, D] have a slot for the class token, which is only ever
    added to the token: here it is part of `cls`, and `pos_embedding` is [1, N, D].
    """

    def rename(name: str) -> str:
        return reduce(lambda name, pair: name.replace(*pair), _RENAMES, name)

    renamed = {rename(name): array for name, array in arrays.items()}
    if _OLD_POSITION in renamed:
        position = renamed.pop(_OLD_POSITION)
        if "cls" in renamed:
            renamed["cls"] = renamed["cls"] + position[:, :1]
            position = position[:, 1:]
        renamed["pos_embedding"] = position
    return renamed
