"""Training on some of the training classes and evaluating others of them; nothing of it is kept but the figures."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from memvir.errors import UserError
from memvir.experiment.data import open_test_images, open_training_data
from memvir.experiment.environment import set_up_device
from memvir.experiment.paths import RunFiles
from memvir.experiment.settings import Run, Runtime
from memvir.experiment.training import WATCHED, Trainer, embed, evaluate
from memvir.models import find_weights

SEEN = {"recall_at_1": "train_recall_at_1", "map": "train_map"}
"""Metrics of the classes that a run trains on, beside those of the others."""


def validation_map(run: Run, runtime: Runtime, files: RunFiles, index: pd.DataFrame) -> float:
    """The MAP of the validation classes after the last epoch; 0 if the run diverges."""
    trainer = _trained(Trainer, run, runtime, files, index)
    return trainer.history.rows[-1]["map"] if trainer else 0.0


def validation_history(run: Run, runtime: Runtime, files: RunFiles, index: pd.DataFrame) -> pd.DataFrame:
    """A run on `index` at its evaluated epochs: `epoch`, `recall_at_1` and `map` of the validation classes, and
    `train_recall_at_1` and `train_map` of those that it trains on. No rows if it diverges."""
    columns = ["epoch", *SEEN, *SEEN.values()]
    trainer = _trained(TrainerThatLooksBack, run, runtime, files, index)
    rows = trainer.history.rows if trainer else []
    return pd.DataFrame([row for row in rows if "map" in row], columns=columns)


def _trained(kind: type[Trainer], run: Run, runtime: Runtime, files: RunFiles, index: pd.DataFrame) -> Trainer | None:
    device = set_up_device(runtime)
    data = open_training_data(run, runtime, files, index, device)
    trainer = kind(run, data, device, find_weights(run.model, files.weights), runtime)
    if isinstance(trainer, TrainerThatLooksBack):
        trainer.seen, trainer.seen_labels, _ = open_test_images(run, runtime, files, index, device, split="train")
    try:
        trainer.train(Nowhere(), Nobody())  # type: ignore[arg-type]
    except UserError:  # the loss or the embeddings are not finite
        return None
    return trainer


class TrainerThatLooksBack(Trainer):
    """Evaluates the classes that it trains on too, whose images are then cropped as for a test."""

    seen: Any
    seen_labels: Any

    def evaluate(self) -> dict[str, float]:
        embeddings = embed(self.embedder, self.seen, self.precision)
        seen = evaluate(self.run, embeddings, self.seen_labels, None, self.device, WATCHED)
        return {**super().evaluate(), **{name: seen[key] for key, name in SEEN.items()}}


class Nowhere:
    """A checkpoint that is not kept: a trial that was stopped is made again."""

    def save(self, state: Mapping[str, Any]) -> None:
        pass


class Nobody:
    """Watches nothing and stops nothing."""

    stop_requested = False

    def epoch_done(self, row: dict[str, float], images_per_second: float) -> None:
        pass
