"""Whether the same run ends in the same bytes: twice from its start, and once more from its middle."""

import hashlib
import io
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.gpu_check.machine import choose
from benchmarks.gpu_check.small_run import Watch, make_trainer
from memvir.experiment.environment import set_up_device
from memvir.experiment.settings import Runtime
from memvir.experiment.training import Trainer

STOP_AFTER = 3
"""Epochs."""


def check(device: str) -> Iterator[dict[str, Any]]:
    target = choose(device)
    set_up_device(Runtime(device="cpu" if target.type == "cpu" else "cuda"))  # deterministic, as runs are by default
    hashes = {}
    for name, stops in {"first run": False, "second run": False, "stopped and continued": True}.items():
        hashes[name] = train(target, stops)
        yield hashes
    assert len(set(hashes.values())) == 1, f"the bytes differ: {hashes}"


def train(device: torch.device, stops: bool) -> str:
    """A hash of all that the run's state holds at its end, but for the time that it took."""
    trainer, watch, states = make_trainer(device), Watch(), States()
    trainer.train(states, watch)  # type: ignore[arg-type]
    if stops:
        trainer = make_trainer(device)
        trainer.load_state_dict(torch.load(io.BytesIO(states.saved[STOP_AFTER]), weights_only=True))
        trainer.train(states, watch)  # type: ignore[arg-type]
    return state_hash(trainer)


def state_hash(trainer: Trainer) -> str:
    digest = hashlib.sha256()
    parts = [part.state_dict() for part in (trainer.embedder, trainer.loss)]
    for tensor in [value for part in parts for value in part.values() if isinstance(value, torch.Tensor)]:
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    digest.update(repr(trainer.history.rows).encode())
    return digest.hexdigest()[:16]


class States:
    """Checkpoints in memory."""

    def __init__(self) -> None:
        self.saved: dict[int, bytes] = {}

    def save(self, state: dict[str, Any]) -> None:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        self.saved[state["position"]["epoch"] - 1] = buffer.getvalue()
