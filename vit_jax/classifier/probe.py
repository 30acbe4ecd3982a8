"""The linear probe of a workflow: a head fitted to the checkpoint's frozen features.

It is a trial like the others, and the least that fine-tuning must beat. Features of a split are
computed once and kept in `workdir/probe/`.
"""

import dataclasses
import json
from functools import cached_property
from pathlib import Path

import numpy as np

from vit_jax.classifier.examine import keep_outputs, score, write_outputs
from vit_jax.classifier.recipe import TransferConfig
from vit_jax.classifier.splits import Splits
from vit_jax.classifier.start import fresh_besides_head, load_adapted, place_frozen
from vit_jax.classifier.sweep import RESULT, Trial, make_trial, read_result, trial_name
from vit_jax.data.sources import open_source
from vit_jax.evaluation.by_class import measure_predictions
from vit_jax.evaluation.protocols.linear import L2, choose_l2, fit_head
from vit_jax.parallel.mesh import make_mesh, use_mesh
from vit_jax.parallel.multihost import barrier, is_main
from vit_jax.parallel.run_files import write_whole
from vit_jax.training.recipe import Training, build_training
from vit_jax.training.workdir import compiled_kept

VALUES = {"head": "probe", "stop": 0}  # of its trial: the initial state with a fitted head


@dataclasses.dataclass(frozen=True)
class Probe:
    """What is fitted on frozen features.

    Attributes:
      config: the workflow's recipe.
      splits: the parts of the data.
      workdir: the workflow's.
      metric: of `evaluation.by_class.METRICS`; the l2 is chosen by it on dev.
    """

    config: TransferConfig
    splits: Splits
    workdir: Path
    metric: str

    @property
    def fresh(self) -> list[str]:
        """Parameters besides the head's that aren't the checkpoint's: there is nothing to probe."""
        return [] if (self._folder / RESULT).exists() else fresh_besides_head(self._adapted)

    def trial(self) -> Trial:
        """Fits train and measures dev, once: the trial's folder keeps the result."""
        folder = self._folder
        if not (folder / RESULT).exists():
            features, labels = self.features("dev")
            logits = _apply(self._fit(*self.features("train")), features)
            if is_main():
                folder.mkdir(parents=True, exist_ok=True)
                write_outputs(folder / "dev.npz", logits, labels)
                trial = make_trial(VALUES, score(logits, labels, 1.0), step=0)
                print(
                    f"linear probe: dev accuracy {trial.accuracy:.2%}, l2 {self._l2:g}", flush=True
                )
                write_whole(folder / RESULT, json.dumps(dataclasses.asdict(trial), indent=2) + "\n")
            barrier("probe")
        return read_result(folder)

    def head(self) -> dict:
        """The head's parameters, fitted to train and dev."""
        both = zip(self.features("train"), self.features("dev"), strict=True)
        kernel, bias = self._fit(*map(np.concatenate, both))
        return {"kernel": kernel, "bias": bias}

    def test_logits(self) -> tuple[np.ndarray, np.ndarray]:
        """(logits [N, C], labels [N]) of the test split by `head`."""
        features, labels = self.features("test")
        return _apply(tuple(self.head().values()), features), labels

    def features(self, part: str) -> tuple[np.ndarray, np.ndarray]:
        """(features [N, D], labels [N]) of "train", "dev" or "test"."""
        file = self.workdir / "probe" / f"{part}.npz"
        file.parent.mkdir(parents=True, exist_ok=True)
        data = dataclasses.replace(
            self.config.data,
            dataset=self.splits.dataset,
            split=getattr(self.splits, part),
            preprocess=self.config.eval_preprocess,
        )
        source = open_source(data.dataset, data.split, data.data_dir)
        model, mesh = self._training.model, self._training.mesh
        cache = compiled_kept(self.workdir, self.config.compilation_cache)
        with use_mesh(mesh), cache:
            return keep_outputs(
                *(file, model, lambda: self._frozen, mesh, source, data, self.config.batch_size),
                "features",
            )

    @property
    def _folder(self) -> Path:
        return self.workdir / "trials" / trial_name(VALUES)

    @cached_property
    def _training(self) -> Training:
        source = open_source(self.splits.dataset, self.splits.train, self.config.data.data_dir)
        mesh = make_mesh(self.config.mesh)
        return build_training(self.config, mesh, source.num_classes, len(source))

    @cached_property
    def _adapted(self) -> dict:
        return load_adapted(self.config, self._training.model, self._training.shapes.params)

    @cached_property
    def _frozen(self) -> dict:
        return place_frozen(self.config, self._adapted, self._training.mesh)

    @cached_property
    def _l2(self) -> float:
        def metric(labels: np.ndarray, predicted: np.ndarray) -> float:
            return measure_predictions(labels, predicted)[self.metric]

        return choose_l2(self.features("train"), self.features("dev"), L2, metric)[0]

    def _fit(self, features: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return fit_head(features, labels, self._training.model.num_classes, self._l2)


def _apply(head: tuple[np.ndarray, np.ndarray], features: np.ndarray) -> np.ndarray:
    kernel, bias = head
    return features @ kernel + bias
