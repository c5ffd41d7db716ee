"""From images to embeddings: a backbone, global pooling and a linear layer."""

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from memvir.models.backbone import Backbone


def average(features: Tensor) -> Tensor:
    return features.mean((2, 3))  # (B, F, h, w) -> (B, F)


def maximum(features: Tensor) -> Tensor:
    return features.amax((2, 3))  # (B, F, h, w) -> (B, F)


POOLINGS: dict[str, Callable[[Tensor], Tensor]] = {
    # plain reductions: adaptive pooling layers have no deterministic backward on a GPU
    "gap": average,
    "gmp": maximum,
    "gap_gmp": lambda features: average(features) + maximum(features),
}


class Embedder(nn.Module):
    """forward: images (B, in_channels, H, W) -> embeddings (B, D), not normalised; losses and evaluation do that.

    Args:
        backbone: gives features (B, F, h, w), F its `features_dim`.
        pooling: gap (global average), gmp (global maximum) or gap_gmp (their sum).
        embedding_dim: D.
        freeze_batch_norm: keep BatchNorm layers in eval mode whatever `train` says, so that their running statistics
            stay as they are; their affine parameters train all the same.

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
