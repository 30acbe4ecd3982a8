r"""Fine-tunes a checkpoint on another dataset (arXiv 2010.11929, section 4.1 and appendix B.1.1).

python -m vit_jax.transfer --config=configs/transfer/folder.py --config.data=/my/images \
    --config.init=augreg:S/16 --workdir=runs/mine
python -m vit_jax.transfer --config=configs/transfer/digits.py --config.init=runs/strokes \
    --workdir=runs/digits

`--config.init=` with nothing behind it starts from random weights instead, for comparison. What a
recipe doesn't say of the model (`model.variant`, `image_size`) is the checkpoint's.

A recipe with a `sweep` looks at the data first, cuts the splits that are missing, chooses on dev,
trains on train and dev together, tests once, and writes `report.html`. Started again, it goes on.
"""

import shlex
import sys
from pathlib import Path

from absl import app, flags

from vit_jax import config as configuration
from vit_jax.classifier.start import TransferConfig, choose_and_train, complete, prepare
from vit_jax.parallel import multihost
from vit_jax.training import loop
from vit_jax.training.clock import Clock, process_age

CONFIG = configuration.define_config_flag()
WORKDIR = flags.DEFINE_string("workdir", "", "Folder of the run.")
DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Join the other processes of a cluster.")


def main(_) -> None:
    """Builds the run from its flags, and trains."""
    clock = Clock(process_age())
    with configuration.explained_errors():
        multihost.initialize(DISTRIBUTED.value)
        config = configuration.build(TransferConfig, complete(CONFIG.value.to_dict()))
        if config.sweep is None:
            run = prepare(config, WORKDIR.value, clock)
    if config.sweep is None:
        loop.train(run)
        return
    command = shlex.join(["python", "-m", "vit_jax.transfer", *sys.argv[1:]])
    with configuration.explained_errors():
        if not WORKDIR.value:
            raise ValueError("no workdir: say where to keep this run with --workdir=FOLDER")
        choose_and_train(config, Path(WORKDIR.value), command)


if __name__ == "__main__":
    app.run(main, flags_parser=configuration.parse_flags)
