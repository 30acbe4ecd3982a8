"""The result of a finished run."""

import dataclasses
import html
from pathlib import Path

from vit_jax.weights.trained import TrainedModel, load


@dataclasses.dataclass(frozen=True)
class Trained:
    """A finished run.

    Attributes:
      workdir: its folder.
      metrics: the newest value of everything recorded, and the last "step". For a transfer with a
        workflow, the contents of results.json.
    """

    workdir: Path
    metrics: dict[str, float]

    @property
    def model(self) -> TrainedModel:
        """The model of the newest checkpoint, read from disk at each access."""
        return load(self.workdir)

    def _repr_html_(self) -> str:
        """Shows a transfer's report in a notebook, otherwise a table of the metrics."""
        report = self.workdir / "report.html"
        if report.exists():
            page = html.escape(report.read_text("utf-8"))
            return f'<iframe srcdoc="{page}" width="100%" height="600"></iframe>'
        rows = "".join(
            f"<tr><td>{html.escape(name)}</td><td>{value:.6g}</td></tr>"
            for name, value in self.metrics.items()
            if isinstance(value, int | float)
        )
        return f"<p>{html.escape(str(self.workdir))}</p><table>{rows}</table>"
