"""Writers of metrics besides `metrics.jsonl`: TensorBoard, Weights & Biases."""

import dataclasses
import importlib.util
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from vit_jax.config import InputError, unknown

JSONL = "jsonl"  # required: a resumed run reads it
PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}
WRITERS = (JSONL, *PACKAGES)


@dataclasses.dataclass(frozen=True)
class MetricsConfig:
    """Where metrics are written.

    Attributes:
      writers: jsonl and any of tensorboard and wandb. None means jsonl, and tensorboard if
        tensorboardX is installed. wandb reads its own variables, such as WANDB_MODE=offline and
        WANDB_PROJECT.
    """

    writers: tuple[str, ...] | None = None

    @classmethod
    def upgrade(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Accepts names joined by commas, as flags give them."""
        names = values.get("writers")
        split = isinstance(names, str) and names.lower() != "none"
        return {**values, "writers": tuple(names.split(",")) if split else names}

    def __post_init__(self):
        for name in self.writers or ():
            if name not in WRITERS:
                raise unknown("writer of metrics", name, WRITERS)
        if self.writers is not None and JSONL not in self.writers:
            raise InputError(
                f"metrics.writers = {self.writers}: add {JSONL!r}, which resuming reads"
            )

    def check_packages(self) -> None:
        """Raises ValueError for a writer whose package is not installed."""
        for name in self.writers or ():
            if name in PACKAGES and not importlib.util.find_spec(PACKAGES[name]):
                raise InputError(
                    f"metrics.writers has {name!r}, whose package is not installed: pip install "
                    f"{PACKAGES[name]}, or leave it out"
                )


class Writer(Protocol):
    """Writes scalars of a step.

    Attributes:
      note: a message to print when the run starts, or "".
    """

    note: str

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in the workdir's `tensorboard/`."""

    note = ""

    def __init__(self, workdir: Path, resumed_step: int, recipe: Mapping[str, Any]):
        from tensorboardX import SummaryWriter

        folder = str(workdir / "tensorboard")
        self._board = SummaryWriter(folder, purge_step=resumed_step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._board.add_scalar(name.replace(" ", "/"), value, step)  # norms grouped by kind

    def close(self) -> None:
        self._board.close()


class WeightsAndBiases:
    """A wandb run named after the workdir, continued on resuming; files are in its wandb/."""

    def __init__(self, workdir: Path, resumed_step: int, recipe: Mapping[str, Any]):
        import wandb

        kept = workdir / "wandb" / "run_id"
        if not (resumed_step and kept.exists()):
            kept.parent.mkdir(exist_ok=True)
            kept.write_text(secrets.token_hex(4))
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "vit_jax"),
                name=os.environ.get("WANDB_NAME", workdir.absolute().name),
                id=kept.read_text(),
                resume="allow",
                dir=workdir,
                config=dict(recipe),
                reinit="create_new",  # trials may run side by side
                settings=wandb.Settings(silent=True, console="off"),
            )
        except wandb.errors.Error as error:
            raise InputError(
                f"wandb: {error}: `wandb login` first, set WANDB_MODE=offline, or leave it out of "
                "metrics.writers"
            ) from error
        folder = Path(self._run.dir).parent
        offline = f"offline; to upload: wandb sync {folder}"
        self.note = f"wandb: {offline if self._run.offline else self._run.url}"

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


def open_writers(
    config: MetricsConfig, workdir: Path, resumed_step: int, recipe: Mapping[str, Any]
) -> list[Writer]:
    """Opens the writers of `config` besides `metrics.jsonl`; `recipe` is shown with the run.

    Records after `resumed_step` will be written again.
    """
    kinds = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}
    names = config.writers
    on_disk = isinstance(workdir, Path)
    if names is None:
        names = ("tensorboard",) if on_disk and importlib.util.find_spec("tensorboardX") else ()
    if not on_disk and {*names} & {*kinds}:
        raise InputError(
            f"metrics.writers = {names}: all but {JSONL} write to a disk, and {workdir} is in a "
            "bucket: leave them out"
        )
    return [kinds[name](workdir, resumed_step, recipe) for name in names if name in kinds]
