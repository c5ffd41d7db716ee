"""Runs on some of the training classes, judged by others of them: a search's trials, and studies.

They see the training half of the index alone, so that no test image can be read, by mistake or otherwise.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from memvir.errors import UserError
from memvir.experiment.settings import Run, changed


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
