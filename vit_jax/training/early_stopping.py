"""Early stopping, decided by the run's records, so that a restart decides the same."""

from pathlib import Path

import numpy as np

from vit_jax.parallel.multihost import all_agree, is_main
from vit_jax.training.metrics import read_metrics


def has_waited(workdir: Path, metric: str, patience: int | None) -> bool:
    """True once the best result is `patience` evaluations old, on all processes alike.

    Ties don't count as better. None disables it.
    """
    if patience is None:
        return False
    records = read_metrics(workdir) if is_main() else []
    found = [record[metric] for record in records if metric in record]
    waited = len(found) - 1 - int(np.argmax(found)) if found else 0
    return all_agree(not is_main() or waited >= patience)
