r"""Fine-tunes a checkpoint on another dataset (arXiv 2010.11929, section 4.1 and appendix B.1.1).

vit_jax transfer ./photos
vit_jax transfer --config=transfer/folder --config.data=/my/images --config.init=augreg:S/16 \
    --workdir=runs/mine
vit_jax transfer --config=transfer/digits --config.init=runs/strokes --workdir=runs/digits

DATA is a folder of images, a table of them, or another dataset's name, as `data.dataset` of the
recipe. Without --workdir the run is kept in runs/NAME, where NAME is the dataset's. Without
--config.init and --config.model.variant, DATA alone trains a small ResNet from random weights on a
CPU, and starts from augreg:S/16, which is downloaded, on a GPU or TPU.
`--config.init=` with nothing behind it starts from random weights instead, for comparison. What a
recipe doesn't say of the model (`model.variant`, `image_size`) is the checkpoint's.

With the recipe's `workflow` it checks the data, creates missing splits and compares trials on dev.
It trains the best again on train and dev, and tests it once. `report.html` shows all of it. The
same command resumes a stopped run.
"""

import jax
from absl import flags

from vit_jax.classifier.workflow import default_workdir, transfer
from vit_jax.command_line import define_config_flag, run
from vit_jax.config import InputError
from vit_jax.parallel import multihost
from vit_jax.training.clock import Clock, process_age

INIT = "augreg:S/16"  # on accelerators, where neither a checkpoint nor a model is named
CONFIG = define_config_flag()
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run, also gs://BUCKET/PATH.")
DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Join the other processes of a cluster.")
flags.DEFINE_float("join_seconds", multihost.JOIN_SECONDS, "Time for all processes to join.")


def main(arguments: list[str]) -> None:
    """Calls `vit_jax.transfer`."""
    command, *data = arguments
    clock = Clock(process_age())
    if len(data) > 1:
        raise InputError(f"{len(data)} datasets, {', '.join(data)}: expected one")
    multihost.initialize(DISTRIBUTED.value, flags.FLAGS.join_seconds)
    dataset, workdir, init = "".join(data), WORKDIR.value, None
    if workdir is None:
        workdir = default_workdir(dataset or CONFIG.value.data.get("dataset", ""))
        print(f"the run is kept in {workdir}", flush=True)
    named = "config.init" in flags.FLAGS or "variant" in CONFIG.value.model
    if data and not named and not CONFIG.value.get("init"):
        init = "" if jax.default_backend() == "cpu" else INIT
        shown = init or "random weights, a small model for a CPU"
        print(f"it starts from {shown}; another start: --config.init=CHECKPOINT", flush=True)
    transfer(dataset, init, workdir, CONFIG.value, command=command, clock=clock)


if __name__ == "__main__":
    run(main, rest="DATA", recipe="transfer/folder")
