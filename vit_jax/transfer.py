r"""Fine-tunes a checkpoint on another dataset (arXiv 2010.11929, section 4.1 and appendix B.1.1).

python -m vit_jax.transfer --config=configs/transfer/folder.py --config.data=/my/images \
    --config.init=augreg:S/16 --workdir=runs/mine
python -m vit_jax.transfer --config=configs/transfer/digits.py --config.init=runs/strokes \
    --workdir=runs/digits

`--config.init=` with nothing behind it starts from random weights instead, for comparison. What a
recipe doesn't say of the model (`model.variant`, `image_size`) is the checkpoint's.

With the recipe's `workflow` the data are looked at, missing splits are cut, trials compete on dev,
the best is trained on train and dev and tested once; `report.html` shows all of it. Started again,
it goes on.
"""

import shlex
import sys

from absl import app, flags

from vit_jax import config as configuration
from vit_jax.classifier.workflow import transfer
from vit_jax.parallel import multihost
from vit_jax.training.clock import Clock, process_age

CONFIG = configuration.define_config_flag()
WORKDIR = flags.DEFINE_string("workdir", "", "Folder of the run.")
DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Join the other processes of a cluster.")


def main(_) -> None:
    """Calls `vit_jax.transfer`."""
    clock = Clock(process_age())
    command = shlex.join(["python", "-m", "vit_jax.transfer", *sys.argv[1:]])
    with configuration.explained_errors():
        multihost.initialize(DISTRIBUTED.value)
        transfer(workdir=WORKDIR.value, config=CONFIG.value, command=command, clock=clock)


if __name__ == "__main__":
    app.run(main, flags_parser=configuration.parse_flags)
