"""A few convolutions for small images: what trains on a CPU in minutes."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from memvir.models.backbone import Backbone

if TYPE_CHECKING:
    from memvir.models.settings import Model


class ConvNet(nn.Sequential, Backbone):
    """forward: images (B, in_channels, H, W) -> features (B, widths[-1], H/2^n, W/2^n), rounded up, after ReLU.

    A 3x3 convolution of stride 2, BatchNorm and ReLU for each of the n `widths`, its output channels. PyTorch's default
    initialisation: uniform within 1/sqrt(fan-in).
    """

    def __init__(self, widths: Sequence[int], in_channels: int) -> None:
        layers: list[nn.Module] = []
        for inputs, outputs in zip([in_channels, *widths], widths, strict=False):
            # BatchNorm takes a constant away again: no bias
            convolution = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
        super().__init__(*layers)
        self.in_channels = in_channels
        self.features_dim = widths[-1]

    @classmethod
    def from_settings(cls, model: "Model", in_channels: int) -> "ConvNet":
        return cls(model.widths, in_channels)
