r"""Fine-tunes a checkpoint on another dataset (arXiv 2010.11929, section 4.1 and appendix B.1.1).

vit_jax transfer ./photos
vit_jax transfer --config=transfer/folder --config.data=/my/images --config.init=augreg:S/16 \
    --workdir=runs/mine
vit_jax transfer --config=transfer/digits --config.init=runs/strokes --workdir=runs/digits

DATA is a folder of images, a table of them, or another dataset's name, as `data.dataset` of the
recipe. Without --workdir the run is kept in runs/NAME, where NAME is the dataset's. Where neither
--config.init nor --config.model.variant is given, the start is `embedded` on a CPU, a small ResNet
in this package, and augreg:S/16, which is downloaded, on a GPU or TPU. `--config.init=` with
nothing behind it starts from random weights, for comparison. What a recipe doesn't say of the model
(`model.variant`, `image_size`) is the checkpoint's.

With the recipe's `workflow` it checks the data, creates missing splits and compares trials on dev.
It trains the best again on train and dev, and tests it once. `report.html` shows all of it. The
same command resumes a stopped run.
"""

from absl import flags

from vit_jax.classifier.workflow import default_workdir, transfer
from vit_jax.command_line import define_config_flag, run
from vit_jax.config import InputError
from vit_jax.parallel import multihost
from vit_jax.training.clock import Clock, process_age

CONFIG = define_config_flag()
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run, also gs://BUCKET/PATH.")
DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Join the other processes of a cluster.")
flags.DEFINE_float("join_seconds", multihost.JOIN_SECONDS, "Time for all processes to join.")
flags.DEFINE_float(
    "heartbeat_seconds", multihost.HEARTBEAT_SECONDS, "Time until a silent host counts as gone."
)


def main(arguments: list[str]) -> None:
    """Calls `vit_jax.transfer`."""
    command, *data = arguments
    clock = Clock(process_age())
    if len(data) > 1:
        raise InputError(f"{len(data)} datasets, {', '.join(data)}: expected one")
    args = flags.FLAGS
    multihost.initialize(DISTRIBUTED.value, args.join_seconds, args.heartbeat_seconds)
    dataset, workdir, init = "".join(data), WORKDIR.value, None
    if workdir is None:
        workdir = default_workdir(dataset or CONFIG.value.data.get("dataset", ""))
        print(f"the run is kept in {workdir}", flush=True)
    if "config.init" in flags.FLAGS:  # `--config.init=` too: random weights
        init = CONFIG.value.init
    transfer(dataset, init, workdir, CONFIG.value, command=command, clock=clock)


if __name__ == "__main__":
    run(main, rest="DATA", recipe="transfer/folder")
