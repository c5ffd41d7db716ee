"""What a run remembers of itself: a row per epoch, the growth of its virtual classes, and the best models so far."""

import csv
import io
from typing import Any

import torch
from torch import Tensor, nn


class History:
    """One row per epoch (metrics only where it was evaluated), and one row per change of the virtual classes in use."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self.growth: list[dict[str, int]] = [{"step": 0, "num_virtual_classes": 0, "num_virtual_embeddings": 0}]

    def append(self, **row: float) -> None:
        self.rows.append(row)

    def record_growth(self, step: int, loss: nn.Module) -> None:
        in_use = {key: getattr(loss, key, 0) for key in ("num_virtual_classes", "num_virtual_embeddings")}
        if in_use["num_virtual_classes"] != self.growth[-1]["num_virtual_classes"]:
            self.growth.append({"step": step, **in_use})

    def state_dict(self) -> dict[str, Any]:
        return {"rows": [dict(row) for row in self.rows], "growth": [dict(row) for row in self.growth]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows, self.growth = state["rows"], state["growth"]


class BestModels:
    """For each metric its best value, the first epoch that reached it, and that epoch's weights (shared by metrics)."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}
        self.epochs: dict[str, int] = {}
        self.weights: dict[int, dict[str, Tensor]] = {}
        self.stale_checks = 0  # evaluations since Recall@1 was last better

    def update(self, epoch: int, metrics: dict[str, float], model: nn.Module) -> None:
        better = [name for name, value in metrics.items() if value > self.values.get(name, -1.0)]
        self.stale_checks = 0 if "recall_at_1" in better else self.stale_checks + 1
        if better:
            self.weights[epoch] = {key: value.detach().cpu().clone() for key, value in model.state_dict().items()}
        for name in better:
            self.values[name], self.epochs[name] = metrics[name], epoch
        self.weights = {epoch: weights for epoch, weights in self.weights.items() if epoch in self.epochs.values()}

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


def to_csv(rows: list[dict[str, Any]]) -> str:
    """Rows as CSV; columns in order of first appearance, missing cells empty, floats to full precision."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def save_model(weights: dict[str, Tensor]) -> bytes:
    """A state_dict as torch.save writes it: load it with torch.load(weights_only=True)."""
    buffer = io.BytesIO()
    torch.save(weights, buffer)
    return buffer.getvalue()
