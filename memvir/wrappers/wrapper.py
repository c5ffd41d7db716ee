"""What all that stands around a loss has in common."""

from typing import Any

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
    def num_virtual_classes(self) -> int:
        """How many virtual classes the last forward used."""
        return self.in_use[0]

    @property
    def num_virtual_embeddings(self) -> int:
        """How many embeddings the last forward used beyond those of its batch."""
        return self.in_use[1]

    def get_extra_state(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.saved}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        for name in self.saved:
            setattr(self, name, state[name])

    def _replicate_for_data_parallel(self) -> "LossWrapper":
        name = type(self).__name__
        raise UserError(
            f"{name}'s state would be lost with the copies that DataParallel makes for each batch; wrap the embedder "
            f"alone, and call {name} with the embeddings of the whole batch"
        )
