r"""Plans a run on chips that you don't have: does it fit, how fast is it, what does it cost.

vit_jax plan --config=pretrain/paper:ViT-B/16 --topology=v5e:16x16
vit_jax plan --config=pretrain/paper:ViT-L/16,dataset=imagenet21k \
    --topology=v4:8x8x16 --num_slices=2 --price_per_chip_hour=1.2 --output=plan.json

Compiles the recipe's own training step for the named chips, on any machine, without the chips and
the data. It only needs the compiler: pip install 'jax[tpu]', or 'jax[cuda12]' for GPUs. GPUs are
h100:8, or h100:32x8 for nodes x GPUs. The printed numbers are the compiler's estimates, not
measurements; they exclude input, evaluations and checkpoints. For GPUs, whose time the compiler
doesn't estimate, it is from shares of the peaks that were measured (vit_jax/costs/gpu_time.py), or
from an assumed MFU while there are none. `--search` compiles several meshes (data, FSDP, tensor),
remat policies and numbers of microbatches, and ranks those that fit. `--mfu=0.45` computes the time
from a stated MFU instead. Any field of the recipe is a flag: --config.batch_size=512.
"""

import json
from pathlib import Path
from typing import Any

from absl import flags

from vit_jax.command_line import define_config_flag, run
from vit_jax.costs.report import show_ranked
from vit_jax.training import plan

CONFIG = define_config_flag()
flags.DEFINE_string("topology", "", "The chips: v5e:16x16, v4:8x8x16, ...")
flags.DEFINE_integer("num_slices", 1, "TPU slices, connected by the data center's network.")
flags.DEFINE_bool("search", False, "Rank meshes x remat x microbatches that fit.")
flags.DEFINE_float("price_per_chip_hour", None, "Price of a chip-hour, in any currency.")
flags.DEFINE_float("mfu", None, "Estimate the time from this MFU, not the compiler's cycles.")
flags.DEFINE_integer("num_classes", None, "Classes of the dataset, if it is not prepared here.")
flags.DEFINE_integer("num_examples", None, "Examples of the split, if it is not prepared here.")
flags.DEFINE_string("output", "", "JSON file to write.")


def main(_) -> None:
    """Plans the recipe in the flags and prints the plan."""
    args = flags.FLAGS
    size = {"num_classes": args.num_classes, "num_examples": args.num_examples}
    options = {"mfu": args.mfu, "price": args.price_per_chip_hour}
    if args.search:
        prepared = plan.prepare_plan(CONFIG.value, args.topology, args.num_slices, **size)
        result: Any = []
        for report in plan.search(prepared, **options):
            result.append(report)
            print(plan.show_searched(report), flush=True)
        fitting = [report for report in result if report["memory_gib"]["fits"]]
        print("\n" + (show_ranked(fitting) if fitting else "None fits: take a larger slice."))
    else:
        slices = {"num_slices": args.num_slices}
        found = plan.plan(CONFIG.value, args.topology, **slices, **options, **size)
        print(found)
        result = found.report
    if args.output:
        Path(args.output).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    run(main)
