"""From images to embeddings: a backbone, global pooling and a linear layer."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from memvir.errors import UserError
from memvir.losses.products import ROWS
from memvir.models import backbone_class
from memvir.models.backbone import Backbone
from memvir.models.weights import load_weights

if TYPE_CHECKING:
    from memvir.models.settings import Model


def average(features: Tensor) -> Tensor:
    return features.mean((2, 3))  # (B, F, h, w) -> (B, F)


def maximum(features: Tensor) -> Tensor:
    return features.amax((2, 3))  # (B, F, h, w) -> (B, F)


POOLINGS: dict[str, Callable[[Tensor], Tensor]] = {
    # plain reductions: adaptive pooling layers have no deterministic backward on a GPU
    "gap": average,
    "gmp": maximum,
    "gap_gmp": lambda features: average(features) + maximum(features),
    "head": lambda features: features,  # the backbone has pooled them
}

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Embedder(nn.Module):
    """forward: images (B, in_channels, H, W) -> embeddings (B, D), not normalised; losses and evaluation do that.

    Args:
        backbone: gives features (B, F, h, w), F its `features_dim`; (B, F) for pooling `head`.
        pooling: gap (global average), gmp (global maximum), gap_gmp (their sum), over all positions; a transformer's
            are its patches, without the class token. Or head: as the backbone's library pools, for instance by the
            class token.
        embedding_dim: D.
        freeze_batch_norm: keep BatchNorm layers in eval mode whatever `train` says, so that their running statistics
            stay as they are; their affine parameters train all the same. A backbone without BatchNorm (a transformer,
            ConvNeXt) has no such statistics, and nothing is frozen.

    The linear layer has a bias; both start as PyTorch's default, uniform within 1/sqrt(F).
    """

    def __init__(self, backbone: Backbone, pooling: str, embedding_dim: int, freeze_batch_norm: bool) -> None:
        super().__init__()
        self.backbone = backbone
        self.pool = POOLINGS[pooling]
        self.embedding = nn.Linear(backbone.features_dim, embedding_dim)
        self.freeze_batch_norm = freeze_batch_norm
        self.train()

    def forward(self, images: Tensor) -> Tensor:
        return self.embedding(self.pool(self.backbone(images)))  # (B, F) -> (B, D)

    def train(self, mode: bool = True) -> "Embedder":
        super().train(mode)
        if self.freeze_batch_norm:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self


def build_embedder(model: "Model", in_channels: int, weights: Path | None) -> Embedder:
    """The network of a recipe, in training mode on the CPU.

    Args:
        in_channels: 1 for grey images, 3 for colour ones.
        weights: the file of the backbone's pretrained weights (`find_weights`); None for `pretrained: none`, which
            draws random weights from torch's generator.

    Raises UserError if pretrained weights are asked for and not given, do not fit, or the images' channels do not.
    """
    backbone = backbone_class(model.backbone).from_settings(model, in_channels)
    if backbone.in_channels != in_channels:
        raise UserError(f"images.channels: {model.backbone} takes colour images; write rgb or bgr")
    if model.pretrained != "none":
        if weights is None:
            raise UserError(
                f"model.pretrained: {model.pretrained} needs a weight file for {model.backbone}, and there is none; "
                "give one, or write pretrained: none for random weights"
            )
        load_weights(backbone, weights)
    return Embedder(backbone, model.pooling, model.embedding_dim, model.freeze_batch_norm)


def mixed_precision(device: torch.device, precision: torch.dtype) -> contextlib.AbstractContextManager:
    """Autocast to `precision`, or nothing for float32 (and on `meta`, which knows no autocast)."""
    if precision == torch.float32 or not torch.amp.is_autocast_available(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, precision)


@torch.inference_mode()
def embed_batch(embedder: nn.Module, images: Tensor, precision: torch.dtype) -> Tensor:
    """Images (B, C, S, S) -> float32 embeddings (B, D), not normalised; `embedder` is in eval mode."""
    count = len(images)
    if count < ROWS:  # the end of a data set: the embedding layer adds up so few rows in an order of their own
        images = torch.cat([images, images.new_zeros(ROWS - count, *images.shape[1:])])
    with mixed_precision(images.device, precision):
        return embedder(images).float()[:count]
