r"""Fine-tunes a checkpoint on another dataset (arXiv 2010.11929, section 4.1 and appendix B.1.1).

python -m vit_jax.transfer --config=configs/transfer/digits.py --config.init=runs/strokes \
    --workdir=runs/digits

`--config.init=` with nothing behind it starts from random weights instead, for comparison.
"""

import dataclasses

from absl import app, flags

from vit_jax import config as configuration
from vit_jax.models.variants import Model, described_model
from vit_jax.parallel import multihost
from vit_jax.training import loop
from vit_jax.training.checkpoint import load_checkpoint
from vit_jax.training.clock import Clock, process_age
from vit_jax.training.recipe import TrainConfig
from vit_jax.weights.adapt import DROP, REINITIALIZE, adapt

CONFIG = configuration.define_config_flag()
WORKDIR = flags.DEFINE_string("workdir", "", "Folder of the run.")
DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Join the other processes of a cluster.")


@dataclasses.dataclass(frozen=True)
class TransferConfig(TrainConfig):
    """A recipe that starts from a checkpoint."""

    init: str = ""  # whatever `training.checkpoint.load_checkpoint` reads; empty: random weights
    reinitialize: tuple[str, ...] = REINITIALIZE  # regexes of tensors to start afresh
    drop: tuple[str, ...] = DROP  # regexes of the checkpoint's tensors to leave out


def prepare(config: TransferConfig, workdir: str, clock: Clock | None = None) -> loop.Run:
    """As `loop.prepare`, with the parameters of `config.init`."""
    if not config.init:
        return loop.prepare(config, workdir, clock=clock)

    def load(model: Model, shapes: dict) -> dict:
        params, description = load_checkpoint(config.init)
        source = described_model(description)
        for name in (
            "mlp",
            "norm_epsilon",
            "zero_padded_pool",
        ):  # which no tensor's name or shape would betray
            there, here = getattr(source.config, name), getattr(model.config, name)
            if there != here:
                raise ValueError(
                    f"{config.init} was trained with {name} = {there!r}, the recipe's model has "
                    f"{here!r}: set --config.model.{name}={there}"
                )
        adapted, report = adapt(
            params,
            shapes,
            grid=model.grid,
            source_grid=source.grid,
            reinitialize=config.reinitialize,
            drop=config.drop,
        )
        print(f"{config.init}:\n{report}")
        return adapted

    return loop.prepare(config, workdir, load, clock)


def main(_) -> None:
    """Builds the run from its flags, and trains."""
    clock = Clock(process_age())
    with configuration.explained_errors():
        config = configuration.build(TransferConfig, CONFIG.value.to_dict())
        multihost.initialize(DISTRIBUTED.value)
        run = prepare(config, WORKDIR.value, clock)
    loop.train(run)


if __name__ == "__main__":
    app.run(main, flags_parser=configuration.parse_flags)
