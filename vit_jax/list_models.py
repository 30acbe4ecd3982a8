"""Lists the architectures, as `model.variant` of a recipe, and the published checkpoints.

vit_jax models
vit_jax models '*B/16*'
"""

import sys

from vit_jax.command_line import run
from vit_jax.models.variants import list_models
from vit_jax.weights.published import list_checkpoints


def main(arguments: list[str]) -> None:
    """Prints the names that match any of the patterns; one without *?[ matches within names."""
    patterns = [text if set(text) & set("*?[") else f"*{text}*" for text in arguments[1:] or ["*"]]
    models, checkpoints = (
        sorted({name for pattern in patterns for name in find(pattern)})
        for find in (list_models, list_checkpoints)
    )
    if not (models or checkpoints):
        sys.exit(f"error: no model matches {' '.join(patterns)}: vit_jax models lists all")
    print("\n".join([*models, *(f"{name}  (checkpoint)" for name in checkpoints)]))


if __name__ == "__main__":
    run(main, rest="PATTERN")
