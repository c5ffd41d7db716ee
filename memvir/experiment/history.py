"""What a run remembers of itself: a row per epoch, the growth of its virtual classes, and the best models so far."""

import csv
import io
from typing import Any

from torch import Tensor, nn


class History:
    """One row per epoch (metrics only where it was evaluated), and one row whenever more is in use beside the batch."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self.growth: list[dict[str, int]] = [{"step": 0, "num_virtual_classes": 0, "num_virtual_embeddings": 0}]

    def append(self, **row: float) -> None:
        self.rows.append(row)

    def record_growth(self, step: int, loss: nn.Module) -> None:
        """A row where there are more virtual classes than ever, or without any more embeddings."""
        now, before = in_use(loss), self.growth[-1]
        key = "num_virtual_classes" if now["num_virtual_classes"] else "num_virtual_embeddings"
        if now[key] > before[key]:
            self.growth.append({"step": step, **now})

    def state_dict(self) -> dict[str, Any]:
        return {"rows": [dict(row) for row in self.rows], "growth": [dict(row) for row in self.growth]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows, self.growth = state["rows"], state["growth"]


def in_use(loss: nn.Module) -> dict[str, int]:
    """What the loss saw in its last step beyond its batch and its classes."""
    return {key: getattr(loss, key, 0) for key in ("num_virtual_classes", "num_virtual_embeddings")}


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
