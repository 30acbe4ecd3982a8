"""The cluster that this process is part of, as its environment tells."""

import math
import os

import jax
from jax._src.clusters import ClusterEnv

from vit_jax.config import InputError

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def find_cluster(seconds: float) -> tuple[str, int, int] | tuple[()]:
    """Process 0's address, the number of processes and this one's, of the variables or from jax.

    () where jax knows no cluster. Raises ValueError for what can't be.
    """
    if found := {name: os.environ[name] for name in VARIABLES if name in os.environ}:
        return _checked(found)
    try:
        address, processes, process, _ = ClusterEnv.auto_detect_unset_distributed_params(
            *(None, None, None, None, None), math.ceil(seconds)
        )
    except ValueError as error:  # a variable that is no number
        raise InputError(f"--distributed: the cluster's variables are wrong: {error}") from error
    if address is None:
        return ()
    if not 0 <= process < processes:
        raise InputError(
            f"--distributed: found process {process} of {processes}, with process 0 at {address}: "
            "expected process 0 to N-1 of N. Look at the cluster's variables (SLURM_NTASKS)"
        )
    return address, processes, process


def _checked(found: dict[str, str]) -> tuple[str, int, int]:
    """Returns process 0's address, the number of processes and this one's; ValueError if wrong."""
    address, *numbers = (found.get(name, "") for name in VARIABLES)
    host, _, port = address.rpartition(":")
    if host and all(n.isdecimal() for n in (port, *numbers)):
        processes, process = map(int, numbers)
        if 0 < int(port) < 1 << 16 and process < processes:
            return address, processes, process
    shown = ", ".join(f"{name}={value}" for name, value in found.items())
    raise InputError(
        f"found {shown}: expected all of JAX_COORDINATOR_ADDRESS=host:port, "
        "JAX_NUM_PROCESSES=N and JAX_PROCESS_ID=0 to N-1"
    )


def check_not_one_of_several() -> None:
    """ValueError in a task of `srun` or `mpirun` with others beside it: each would train alone.

    The script of a batch job and a shell of `salloc` have the job's variables, and are one process.
    """
    for count, one in (VARIABLES[1:], ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK")):
        if os.environ.get(count, "1") != "1" and one in os.environ:
            raise InputError(
                f"{count}={os.environ[count]}: this is process {os.environ[one]} of several, and "
                f"each would train for itself: add --distributed for one run of all, or unset {one}"
            )
    process = os.environ.get("SLURM_PROCID")
    step = {"SLURM_STEP_ID", "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS"} & os.environ.keys()
    several = os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ.get("SLURM_NTASKS", "1")
    if process is None or not (step or process != "0") or jax.distributed.is_initialized():
        return
    if several != "1":
        raise InputError(
            f"this is task {process} of {several} of srun, and each would train for itself: add "
            "--distributed for one run of all, or start one with srun --ntasks=1"
        )
