"""Networks from images to embeddings.

A new backbone takes a file with a `Backbone`, a line in `BACKBONES` and its name in `memvir.config.Model`.
"""

from collections.abc import Callable
from pathlib import Path

from memvir.config import Model
from memvir.errors import UserError
from memvir.models.backbone import Backbone
from memvir.models.bn_inception import BNInception
from memvir.models.convnet import ConvNet
from memvir.models.embedder import Embedder
from memvir.models.resnet import ResNet
from memvir.models.weights import fetch_weights, find_weights, load_weights

__all__ = [
    "BACKBONES",
    "BNInception",
    "Backbone",
    "ConvNet",
    "Embedder",
    "ResNet",
    "build_embedder",
    "fetch_weights",
    "find_weights",
    "load_weights",
]

BACKBONES: dict[str, Callable[[Model, int], Backbone]] = {
    "convnet": lambda model, in_channels: ConvNet(model.widths, in_channels),
    "bn_inception": lambda model, in_channels: BNInception(),
    "resnet18": lambda model, in_channels: ResNet(18),
    "resnet34": lambda model, in_channels: ResNet(34),
    "resnet50": lambda model, in_channels: ResNet(50),
    "resnet101": lambda model, in_channels: ResNet(101),
}


def build_embedder(model: Model, in_channels: int, weights: Path | None) -> Embedder:
    """The network of a recipe, in training mode on the CPU.

    Args:
        in_channels: 1 for grey images, 3 for colour ones.
        weights: the file of the backbone's pretrained weights (`find_weights`); None for `pretrained: none`, which
            draws random weights from torch's generator.

    Raises UserError if pretrained weights are asked for and not given, do not fit, or the images' channels do not.
    """
    backbone = BACKBONES[model.backbone](model, in_channels)
    if backbone.in_channels != in_channels:
        raise UserError(f"images.channels: {model.backbone} takes colour images; write rgb or bgr")
    if model.pretrained != "none":
        if weights is None:
            raise UserError(
                f"model.pretrained: {model.pretrained} needs a weight file for {model.backbone}, and there is none; "
                "run `dvc repro`, which fetches it, or write pretrained: none for random weights"
            )
        load_weights(backbone, weights)
    return Embedder(backbone, model.pooling, model.embedding_dim, model.freeze_batch_norm)
