"""Pretrains a model on a large dataset, from random weights.

vit_jax pretrain --config=pretrain/formula --workdir=runs/strokes

Any field of the recipe is a flag: --config.batch_size=512 --config.model.variant=ViT-S/16. The same
command resumes a stopped run from its newest checkpoint.
"""

from absl import flags

from vit_jax.command_line import define_config_flag, run
from vit_jax.config import build
from vit_jax.parallel import multihost
from vit_jax.training import loop
from vit_jax.training.clock import Clock, process_age
from vit_jax.training.plan import check_recipe
from vit_jax.training.recipe import TrainConfig

CONFIG = define_config_flag()
flags.DEFINE_string("workdir", "", "Folder of the run, also gs://BUCKET/PATH.")
flags.DEFINE_bool("distributed", False, "Join the other processes of a cluster.")
flags.DEFINE_float("join_seconds", multihost.JOIN_SECONDS, "Time for all processes to join.")
flags.DEFINE_float(
    "heartbeat_seconds", multihost.HEARTBEAT_SECONDS, "Time until a silent host counts as gone."
)
flags.DEFINE_string("check", "", "Only check the recipe for these devices: 256, v5litepod-256.")


def main(_) -> None:
    """Builds the run from its flags and trains; with --check, only checks the recipe."""
    clock = Clock(process_age())
    config = build(TrainConfig, CONFIG.value)
    if flags.FLAGS.check:
        check_recipe(config, flags.FLAGS.check)
        return
    args = flags.FLAGS
    multihost.initialize(args.distributed, args.join_seconds, args.heartbeat_seconds)
    run = loop.prepare(config, flags.FLAGS.workdir, clock=clock)
    loop.train(run)


if __name__ == "__main__":
    run(main)
