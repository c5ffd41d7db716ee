"""What every backbone is, whatever it is made of."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from memvir.models.settings import Model, Weights


class Backbone(nn.Module):
    """forward: images (B, in_channels, H, W) -> features (B, features_dim, h, w); or (B, features_dim), pooled by a
    head of its own, for `pooling: head`.
    """

    in_channels: int
    features_dim: int
    unused_keys: tuple[str, ...] = ()
    """Prefixes of keys that its weight file holds beyond the module's own: a classifier."""

    @classmethod
    def from_settings(cls, model: "Model", in_channels: int) -> "Backbone":
        """With random weights from torch's generator. Raises UserError if the settings or channels do not fit."""
        raise NotImplementedError

    @staticmethod
    def preprocessing(backbone: str) -> dict[str, Any]:
        """What a recipe's `images` may leave out, as this backbone wants it; empty: nothing."""
        return {}

    @staticmethod
    def own_weights(backbone: str) -> "Weights":
        """Where its library has pretrained weights for it; no addresses: nowhere."""
        from memvir.models.settings import Weights  # late: only a recipe asks

        return Weights()

    @property
    def title(self) -> str:
        """How errors call it."""
        return type(self).__name__

    def holder(self) -> nn.Module:
        """The module whose keys are those of its weight files."""
        return self

    def adapt(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """A weight file's content in the form of `holder().state_dict()`."""
        return {key: value for key, value in weights.items() if not key.startswith(self.unused_keys)}


def try_on_meta(module: nn.Module, shape: Sequence[int]) -> Any:
    """What `module` gives for images of a shape, as tensors without numbers: costs nothing, changes nothing."""
    tensors = {name: tensor.to("meta") for name, tensor in [*module.named_parameters(), *module.named_buffers()]}
    with torch.no_grad():
        return torch.func.functional_call(module, tensors, torch.empty(*shape, device="meta"))
