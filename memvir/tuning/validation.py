"""Runs on some of the training classes, judged by others of them: a search's trials, and studies.

They see the training half of the index alone, so that no test image can be read, by mistake or otherwise.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from memvir.errors import UserError
from memvir.experiment.paths import RunFiles
from memvir.experiment.settings import Run, Runtime, changed


def validation_index(index: pd.DataFrame, share: float, seed: int) -> pd.DataFrame:
    """The training images of an index, those of some classes marked `test`: a share drawn from the classes by `seed`.

    Raises UserError if fewer than two classes are left on either side.
    """
    images = index[index["split"] == "train"].reset_index(drop=True)
    classes = images["class_id"].unique()  # in the index's order
    count = round(share * len(classes))
    if min(count, len(classes) - count) < 2:
        raise UserError(
            f"tuning.validation_share: {share} of {len(classes)} training classes leaves fewer than two to train on or "
            "to validate with; use another share"
        )
    drawn = np.random.default_rng(seed).permutation(classes)[:count]
    return images.assign(split=np.where(images["class_id"].isin(drawn), "test", "train"))


def validation_run(base: Run, settings: Mapping[str, Any], seed: int, check_epoch: int | None, where: str) -> Run:
    """A variant's run under other settings, evaluated every `check_epoch` epochs, or after the last one alone.

    Raises UserError, naming the key in `where`, if the variant does not take such a setting.
    """
    run = changed(base, settings, where)
    own: dict[str, Any] = {
        "training.check_epoch": check_epoch or run.training.epochs,
        "training.early_stopping": None,
        "snapshots": [],
        "seed": seed,
        "dataset": f"{base.dataset}-tuning",  # its decoded images are others than the tables' runs'
    }
    return changed(run, own, where)


def validation_map(run: Run, runtime: Runtime, files: RunFiles, index: pd.DataFrame) -> float:
    """The MAP of the validation classes after the last epoch; 0 if the run diverges."""
    history = validation_history(run, runtime, files, index)
    return float(history["map"].iloc[-1]) if len(history) else 0.0


def validation_history(run: Run, runtime: Runtime, files: RunFiles, index: pd.DataFrame) -> pd.DataFrame:
    """Train a run on `index`: epoch, recall_at_1, rp and map of its validation classes; no rows if it diverges."""
    from memvir.experiment.data import open_training_data  # late: the process's threads have been set by now
    from memvir.experiment.environment import set_up_device
    from memvir.experiment.training import Trainer
    from memvir.models import find_weights

    columns = ["epoch", "recall_at_1", "rp", "map"]
    device = set_up_device(runtime)
    data = open_training_data(run, runtime, files, index, device)
    trainer = Trainer(run, data, device, find_weights(run.model, files.weights), runtime)
    try:
        trainer.train(Nowhere(), Nobody())  # type: ignore[arg-type]
    except UserError:  # the loss or the embeddings are not finite
        return pd.DataFrame(columns=columns)
    return pd.DataFrame([row for row in trainer.history.rows if "map" in row])[columns]


class Nowhere:
    """A checkpoint that is not kept: a trial that was stopped is made again."""

    def save(self, state: dict[str, Any]) -> None:
        pass


class Nobody:
    """Watches nothing and stops nothing."""

    stop_requested = False

    def epoch_done(self, row: dict[str, float], images_per_second: float) -> None:
        pass
