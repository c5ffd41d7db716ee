"""What the networks of a library have in common as backbones."""

import difflib
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from memvir.errors import UserError
from memvir.models.backbone import Backbone, try_on_meta


class LibraryNetwork(Backbone):
    """A network without its classifier, under its library's names and with its initialisation.

    Args:
        backbone: LIBRARY/NAME.
        network: the library's, up to what `pooling` asks for: a map of features, or pooled ones for `head`.
        size: a side of images that it takes.
    """

    network: Any  # each library's networks have attributes of their own

    def __init__(self, backbone: str, network: nn.Module, in_channels: int, pooling: str, size: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.network = network
        self.in_channels = in_channels
        try:
            features = try_on_meta(self, (2, in_channels, size, size))
        except Exception as error:  # hundreds of networks, each with its own ways
            raise UserError(f"model.backbone: {backbone} does not work here ({_one_line(error)})") from None
        if pooling == "head" and features.ndim != 2:
            raise UserError(f"model.pooling: {backbone} has no pooled features for head; choose another network")
        if pooling != "head" and features.ndim != 4:
            raise no_map(backbone)
        self.features_dim = features.shape[1]

    @property
    def title(self) -> str:
        return self.backbone

    def holder(self) -> nn.Module:
        return self.network

    def forward(self, images: Tensor) -> Tensor:
        try:
            return self.features(images)
        except Exception:
            # too small, or not the one size it is built for: only then does it fail without numbers too
            try:
                try_on_meta(self.network, images.shape)
            except Exception as error:
                height, width = images.shape[2:]
                raise UserError(
                    f"images.size: {self.backbone} does not take images of {height}x{width} ({_one_line(error)})"
                ) from None
            raise

    def features(self, images: Tensor) -> Tensor:
        return self.network(images)


def without_dropout(network: nn.Module) -> nn.Module:
    """Switch off dropout and stochastic depth: a run's randomness is in its order and augmentation, which every device
    and every continued run repeats.
    """
    for module in network.modules():
        for probability in ("p", "drop_prob"):  # of torch and torchvision, of timm
            if isinstance(getattr(module, probability, None), float):
                setattr(module, probability, 0.0)
    return network


def known_name(backbone: str, names: Iterable[str]) -> str:
    """NAME of LIBRARY/NAME. Raises UserError with near ones if it is not among `names`."""
    library, _, name = backbone.partition("/")
    names = set(names)
    if name not in names:
        close = difflib.get_close_matches(name, sorted(names), n=3)
        hint = f"; near ones: {', '.join(f'{library}/{other}' for other in close)}" if close else ""
        raise UserError(f"model.backbone: {library} has no network {name!r}{hint}")
    return name


def no_map(backbone: str) -> UserError:
    return UserError(f"model.pooling: {backbone} has no map of features to pool; write head for its own pooling")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
