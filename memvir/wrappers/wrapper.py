"""What all that stands around a loss has in common."""

from typing import Any

import torch
from torch import Tensor, nn

from memvir.errors import UserError


class LossWrapper(nn.Module):
    """forward(embeddings (B, D), labels (B,)) -> scalar, like the loss; and what a training loop asks of it.

    While `enabled` is False (warm-up), and in eval mode, it is the plain loss. All that it keeps from step to step is
    in state_dict(), its place in any random sequence included. Every forward in train mode is a step.
    """

    saved: tuple[str, ...] = ("in_use",)
    """The attributes that are saved besides parameters and buffers."""

    def __init__(self, loss: Any) -> None:
        super().__init__()
        self.loss = loss
        self.enabled = True
        self.in_use = (0, 0)  # virtual classes and virtual embeddings of the last forward

    @property
    def active(self) -> bool:
        return self.enabled and self.training

    @property
    def proxies(self) -> Tensor:
        """(C, D)"""
        return self.loss.proxies

    @property
    def dtype(self) -> torch.dtype:
        """What the loss computes in."""
        return torch.promote_types(self.proxies.dtype, torch.float32)

    @property
    def num_virtual_classes(self) -> int:
        """How many virtual classes the last forward used."""
        return self.in_use[0]

    @property
    def num_virtual_embeddings(self) -> int:
        """How many embeddings the last forward used beyond those of its batch."""
        return self.in_use[1]

    def _memory(self) -> tuple[dict[str, Any], ...]:
        """Where tensors are kept from step to step, by their names."""
        return (self._buffers,)

    def _kept_in(self, name: str) -> torch.dtype:
        """The type in which the numbers of one of them are kept."""
        return self.dtype

    def _apply(self, fn, recurse=True):
        """Moves the memory with the module, but in its own types: half precision holds neither lengths nor sums."""
        memory = self._memory()
        held = [{name: tensor for name, tensor in tensors.items() if tensor is not None} for tensors in memory]
        self._buffers.update(dict.fromkeys(self._buffers))
        super()._apply(fn, recurse)
        for tensors, before in zip(memory, held, strict=True):
            for name, tensor in before.items():
                new, dtype = fn(tensor), self._kept_in(name) if tensor.is_floating_point() else tensor.dtype
                tensors[name] = new if new.dtype == dtype else tensor.to(new.device, dtype)
        return self

    def _settings(self) -> dict[str, Any]:
        """What a state must have in common with the module that it is loaded into."""
        return {}

    def get_extra_state(self) -> dict[str, Any]:
        return {"settings": self._settings()} | {name: getattr(self, name) for name in self.saved}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        for name in self.saved:
            setattr(self, name, state[name])

    def _prepare_for(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Once the settings are found to be the same, and before anything is loaded."""

    def _load_from_state_dict(self, state_dict, prefix, *args):
        extra = state_dict.get(prefix + "_extra_state")
        if extra is not None:
            ours = self._settings()
            theirs = extra.get("settings", ours)
            for setting, value in ours.items():
                if theirs.get(setting) != value:
                    raise UserError(
                        f"this state of {type(self).__name__} was saved with {setting} {theirs.get(setting)}, not "
                        f"{value}; build the module with the same settings, or train anew"
                    )
            self._prepare_for(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _replicate_for_data_parallel(self) -> "LossWrapper":
        name = type(self).__name__
        raise UserError(
            f"{name}'s state would be lost with the copies that DataParallel makes for each batch; wrap the embedder "
            f"alone, and call {name} with the embeddings of the whole batch"
        )
