r"""Fine-tunes a checkpoint on another dataset (arXiv 2010.11929, section 4.1 and appendix B.1.1).

python -m vit_jax.transfer --config=configs/transfer/digits.py --config.init=runs/strokes \
    --workdir=runs/digits

`--config.init=` with nothing behind it starts from random weights instead, for comparison.
"""

import dataclasses

from absl import app, flags

from vit_jax import config as configuration
from vit_jax.models.variants import Model
from vit_jax.parallel import multihost
from vit_jax.training import loop
from vit_jax.training.checkpoint import load_checkpoint
from vit_jax.weights.adapt import adapt

CONFIG = configuration.define_config_flag()
WORKDIR = flags.DEFINE_string("workdir", "", "Folder of the run.")
DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Join the other processes of a cluster.")


@dataclasses.dataclass(frozen=True)
class TransferConfig(loop.TrainConfig):
    """A recipe that starts from `init`, a run's workdir or a checkpoint's folder."""

    init: str = ""  # empty: random weights
    reinitialize: tuple[str, ...] = ("head/.*",)  # regexes of tensors to start afresh
    drop: tuple[str, ...] = ("pre_logits/.*",)  # regexes of the checkpoint's tensors to leave out


def prepare(config: TransferConfig, workdir: str) -> loop.Run:
    """As `loop.prepare`, with the parameters of `config.init`."""
    if not config.init:
        return loop.prepare(config, workdir)

    def load(model: Model, shapes: dict) -> dict:
        params, _ = load_checkpoint(config.init)
        grid = tuple(side // model.module.patch for side in model.image_size)
        adapted, report = adapt(
            params, shapes, grid=grid, reinitialize=config.reinitialize, drop=config.drop
        )
        print(f"{config.init}:\n{report}")
        return adapted

    return loop.prepare(config, workdir, load)


def main(_) -> None:
    """Builds the run from its flags, and trains."""
    with configuration.explained_errors():
        config = configuration.build(TransferConfig, CONFIG.value.to_dict())
        multihost.initialize(DISTRIBUTED.value)
        run = prepare(config, WORKDIR.value)
    loop.train(run)


if __name__ == "__main__":
    app.run(main, flags_parser=configuration.parse_flags)
