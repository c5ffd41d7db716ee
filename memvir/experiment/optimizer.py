"""The optimiser of a run, and its learning rates from epoch to epoch."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from memvir.experiment.settings import LrDecay, Optimizer

SCHEDULE = ("training.epochs", "training.lr_decay.epochs", "training.lr_decay.factor")
"""What two identities may differ in, and one still go on from the other's state."""


def build_optimizer(settings: Optimizer, embedder: nn.Module, loss: nn.Module) -> torch.optim.Optimizer:
    """One optimiser with two groups: the embedder at `lr`, the proxies at `lr_proxies`."""
    groups = [
        {"params": list(embedder.parameters()), "lr": settings.lr},
        {"params": list(loss.parameters()), "lr": settings.lr_proxies},
    ]
    decay = settings.weight_decay
    # one kernel, which takes the same square roots on every processor
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in loss.parameters())
    match settings.name:
        case "adam":
            return torch.optim.Adam(groups, eps=settings.eps, weight_decay=decay, fused=fused)
        case "adamw":
            return torch.optim.AdamW(groups, eps=settings.eps, weight_decay=decay, fused=fused)
        case "rmsprop":
            return torch.optim.RMSprop(groups, eps=settings.eps, weight_decay=decay, momentum=settings.momentum)
        case "sgd":
            return torch.optim.SGD(groups, lr=settings.lr, weight_decay=decay, momentum=settings.momentum)


def rate_factor(decay: LrDecay, epoch: int) -> float:
    """What the learning rates are multiplied by in an epoch."""
    return decay.factor ** sum(start <= epoch for start in decay.epochs)


def continues(old: Mapping[str, Any], new: Mapping[str, Any], state: Mapping[str, Any]) -> bool:
    """Whether a state of a run of the identity `old` is one of `new` too: until then their schedules agree, and they
    differ in nothing else.
    """
    if any(old.get(key) != new.get(key) for key in {**old, **new} if key not in SCHEDULE):
        return False
    epoch, batch = state["position"]["epoch"], state["position"]["batch"]
    before, after = (LrDecay(epochs=identity[SCHEDULE[1]], factor=identity[SCHEDULE[2]]) for identity in (old, new))
    trained = range(1, epoch + (batch > 0))
    same_rates = all(
        rate_factor(before, trained_epoch) == rate_factor(after, trained_epoch) for trained_epoch in trained
    )
    return same_rates and epoch <= new[SCHEDULE[0]]
