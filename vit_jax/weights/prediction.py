"""The prediction for one image."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The prediction for one image, or the reason why it can't be read."""

    image: str
    classes: tuple[str, ...]
    probabilities: np.ndarray | None  # [C]; None if the image can't be read
    error: str = ""

    @property
    def label(self) -> str | None:
        """The most probable class; None for an error."""
        return self.top(1)[0][0] if self.probabilities is not None else None

    def top(self, count: int = 3) -> list[tuple[str, float]]:
        """Returns the most probable classes with their probabilities; none for an error."""
        if self.probabilities is None:
            return []
        best = np.argsort(-self.probabilities, kind="stable")[:count]
        return [(self.classes[i], float(self.probabilities[i])) for i in best]

    def __repr__(self) -> str:
        found = ", ".join(f"{name} {p:.1%}" for name, p in self.top()) or f"error: {self.error}"
        return f"{self.image}: {found}"
