"""A run's history as TensorBoard shows it. The log is a function of the history alone: a run that continues rewrites
what it had, so that no step is missing or there twice."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from memvir.config import Run
from memvir.history import History


class TensorBoardLog:
    def __init__(self, folder: Path, run: Run, history: History) -> None:
        from torch.utils.tensorboard import SummaryWriter  # late: half a second

        shutil.rmtree(folder, ignore_errors=True)
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
        hyperparameters = {key: value for key, value in _flat(self.run.model_dump(mode="json")) if key != "seed"}
        self.writer.add_hparams(
            {**hyperparameters, "seed": self.run.seed}, {f"result/{k}": v for k, v in metrics.items()}, run_name="."
        )
        self.writer.add_embedding(embeddings, metadata=class_names, tag="test", global_step=0)
        self.writer.close()


def _tag(key: str) -> str:
    if key.startswith("num_virtual"):
        return f"memory/{key}"
    return f"training/{key}" if key in ("loss", "lr", "lr_proxies") else f"test/{key}"


def _flat(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [pair for key, item in value.items() for pair in _flat(item, f"{prefix}.{key}" if prefix else key)]
    return [(prefix, value if isinstance(value, (int, float, str, bool)) else str(value))]
