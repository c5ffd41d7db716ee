"""A run's history as TensorBoard shows it. The log is a function of the history alone: a run that continues rewrites
what it had, so that no step is missing or there twice."""

import json
import math
import shutil
from pathlib import Path

import numpy as np

from memvir.experiment.history import History
from memvir.experiment.identity import flatten
from memvir.experiment.settings import Run

PROJECTED = 10_000
"""Test embeddings that go to the projector at most; written as text, SOP's 60,502 would take 300 MB of each run."""


class TensorBoardLog:
    def __init__(self, folder: Path, run: Run, history: History) -> None:
        from torch.utils.tensorboard import SummaryWriter  # late: half a second

        for entry in folder.iterdir() if folder.exists() else ():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.suffix != ".json":  # what trained earlier runs stays, as they may come back
                entry.unlink()
        self.writer = SummaryWriter(str(folder))
        self.run = run
        settings = json.dumps(run.model_dump(mode="json"), indent=2)
        self.writer.add_text("settings", "\n".join("    " + line for line in settings.splitlines()))
        for row in history.rows:
            self.add_epoch(row)

    def add_epoch(self, row: dict[str, float]) -> None:
        for key, value in row.items():
            if key not in ("epoch", "step"):
                self.writer.add_scalar(_tag(key), value, int(row["epoch"]))

    def finish(self, metrics: dict[str, float], embeddings: np.ndarray, class_names: list[str]) -> None:
        """Add what is known at the end: hyperparameters against results, and the test embeddings for the projector."""
        settings = flatten(self.run.model_dump(mode="json"))
        hyperparameters = {key: v if isinstance(v, (int, float, str, bool)) else str(v) for key, v in settings.items()}
        self.writer.add_hparams(hyperparameters, {f"result/{k}": v for k, v in metrics.items()}, run_name=".")
        shown = slice(None, None, math.ceil(len(embeddings) / PROJECTED))
        self.writer.add_embedding(embeddings[shown], metadata=class_names[shown], tag="test", global_step=0)
        self.writer.close()


def _tag(key: str) -> str:
    if key.startswith("num_virtual"):
        return f"memory/{key}"
    return f"training/{key}" if key in ("loss", "lr", "lr_proxies") else f"test/{key}"
