"""BN-Inception (Ioffe and Szegedy, "Batch Normalization", https://arxiv.org/abs/1502.03167), as ImageNet weights of it
are distributed: the names of its layers are the keys of that file.
"""

import csv
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from memvir.errors import UserError
from memvir.models.backbone import Backbone

if TYPE_CHECKING:
    from memvir.models.settings import Model

BLOCKS = Path(__file__).with_name("bn_inception_layers.csv")
"""One row per block: the output channels of its convolutions (empty: no such layer), its pooling, and the stride of its
last 3x3 convolutions and its pooling where they halve the resolution."""


class BNInception(Backbone):
    """forward: images (B, 3, H, W) -> features (B, 1024, H/32, W/32), after ReLU; UserError unless H and W are
    multiples of 32, at which its branches come out in one size.

    Every convolution has a bias and is followed by BatchNorm and ReLU; a block concatenates its branches.

    Without weights, convolutions start with He-normal weights (fan-in, gain of ReLU) and zero biases: these keep the
    scale of activations through the depth even where BatchNorm is frozen at its initial statistics.
    """

    in_channels = 3
    features_dim = 1024
    unused_keys = ("last_linear.",)

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        stem = [
            *self._convolution("conv1_7x7_s2", 3, 64, kernel=7, stride=2),
            *self._pool("pool1_3x3_s2", "max", stride=2, padding=0),
            *self._convolution("conv2_3x3_reduce", 64, 64, kernel=1),
            *self._convolution("conv2_3x3", 64, 192, kernel=3),
            *self._pool("pool2_3x3_s2", "max", stride=2, padding=0),
        ]
        self._blocks = [[stem]]  # blocks of branches of names of layers
        with BLOCKS.open(newline="") as file:
            for row in csv.DictReader(file):
                self._blocks.append(self._block(row))

    @classmethod
    def from_settings(cls, model: "Model", in_channels: int) -> "BNInception":
        return cls()

    @staticmethod
    def preprocessing(backbone: str) -> dict[str, Any]:
        """What the ImageNet weights expect."""
        scale = {"channels": "bgr", "value_range": 255, "mean": [104.0, 117.0, 128.0], "std": [1.0, 1.0, 1.0]}
        return {"size": 224, **scale, "test": {"resize": 256}}

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[2] % 32 or images.shape[3] % 32:
            raise UserError(
                f"images.size: bn_inception takes multiples of 32 such as 224, not {images.shape[2]}x{images.shape[3]}"
            )
        features = images
        for branches in self._blocks:
            outputs = [self._run(names, features) for names in branches]
            features = torch.cat(outputs, 1) if len(outputs) > 1 else outputs[0]
        return features

    def _run(self, names: list[str], features: Tensor) -> Tensor:
        for name in names:
            features = getattr(self, name)(features)
        return features

    def _block(self, row: dict[str, str]) -> list[list[str]]:
        """Add a block's layers; returns its branches in the order of concatenation."""
        block, pool = row.pop("block"), row.pop("pool")
        channels = {layer: int(number) for layer, number in row.items() if number}
        inputs, stride = channels["in_channels"], channels["stride"]
        branches = []
        if "1x1" in channels:
            branches.append(self._convolution(f"{block}_1x1", inputs, channels["1x1"], kernel=1))
        reduced, outputs = channels["3x3_reduce"], channels["3x3"]
        branches.append(
            self._convolution(f"{block}_3x3_reduce", inputs, reduced, kernel=1)
            + self._convolution(f"{block}_3x3", reduced, outputs, kernel=3, stride=stride)
        )
        reduced, outputs = channels["double_3x3_reduce"], channels["double_3x3"]
        branches.append(
            self._convolution(f"{block}_double_3x3_reduce", inputs, reduced, kernel=1)
            + self._convolution(f"{block}_double_3x3_1", reduced, outputs, kernel=3)
            + self._convolution(f"{block}_double_3x3_2", outputs, outputs, kernel=3, stride=stride)
        )
        branches.append(self._pool(f"{block}_pool", pool, stride, padding=1 if stride == 1 else 0))
        if "pool_proj" in channels:
            branches[-1] += self._convolution(f"{block}_pool_proj", inputs, channels["pool_proj"], kernel=1)
        return branches

    def _convolution(self, name: str, inputs: int, outputs: int, kernel: int, stride: int = 1) -> list[str]:
        convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2)
        nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
        assert convolution.bias is not None
        nn.init.zeros_(convolution.bias)
        self.add_module(name, convolution)
        self.add_module(f"{name}_bn", nn.BatchNorm2d(outputs))
        return [name, f"{name}_bn", "relu"]

    def _pool(self, name: str, kind: str, stride: int, padding: int) -> list[str]:
        if kind == "max":
            self.add_module(name, nn.MaxPool2d(3, stride, padding, ceil_mode=True))
        else:
            self.add_module(name, nn.AvgPool2d(3, stride, padding, ceil_mode=True, count_include_pad=True))
        return [name]
