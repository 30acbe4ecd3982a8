"""Several processes as one run."""

import jax


def initialize(distributed: bool) -> None:
    """Joins the cluster's processes, before any other use of jax; TPU pods and SLURM are detected.

    Nothing is caught: a job whose processes don't find each other would train as many private
    models.
    """
    if distributed:
        jax.distributed.initialize()


def is_main() -> bool:
    """Whether this process is the one that writes records."""
    return jax.process_index() == 0
