"""Whether the same run ends in the same bytes: twice from its start, and once more from its middle and its end."""

import hashlib
import io
import warnings
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
    set_up_device(Runtime(device=target.type))  # deterministic, as runs are by default
    hashes, states = {}, States()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        hashes["first run"] = state_hash(train(make_trainer(target), states))
        yield hashes
        hashes["second run"] = state_hash(train(make_trainer(target), States()))
        yield hashes
        for name, epoch in {"stopped and continued": STOP_AFTER, "ended again": max(states.saved)}.items():
            hashes[name] = state_hash(train(states.continued(epoch, target), States()))
            yield hashes
    assert len(set(hashes.values())) == 1, f"the bytes differ: {hashes}"
    chances = {str(warning.message).split(" ")[0] for warning in said if "deterministic" in str(warning.message)}
    yield {"operations that are not deterministic here": ", ".join(sorted(chances)) or "none"}
    if target.type == "cuda":
        yield {"continued on the CPU": on_the_cpu(states)}


def train(trainer: Trainer, states: "States") -> Trainer:
    trainer.train(states, Watch())  # type: ignore[arg-type]
    return trainer


def on_the_cpu(states: "States") -> str:
    """How far the losses of the next epoch are from those on the GPU."""
    found = []
    for place in ("cuda", "cpu"):
        trainer = states.continued(STOP_AFTER, torch.device(place))
        trainer.train_epoch(Watch())  # type: ignore[arg-type]
        found.append(trainer.losses.double().cpu())
    error = float(((found[1] - found[0]).abs() / found[0].abs()).max())
    assert error < 1e-2, f"losses on the GPU {found[0]}, on the CPU {found[1]}"
    return f"largest relative difference of an epoch's losses {error:.1e}"


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

    def continued(self, epoch: int, device: torch.device) -> Trainer:
        """A run that goes on after an epoch, read as a checkpoint is."""
        trainer = make_trainer(device)
        trainer.load_state_dict(torch.load(io.BytesIO(self.saved[epoch]), map_location="cpu", weights_only=True))
        return trainer
