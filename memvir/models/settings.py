"""The network, and the weights that it starts from."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from memvir.models import canonical_backbone
from memvir.sections import Section, UserPath


class Weights(Section):
    """Pretrained weights as a file: downloaded once, checked by hash, loaded with strict keys."""

    addresses: list[str] = []
    """Where to download the file; tried in order. Empty: where the backbone's library has it."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{8,64}$")] | None = None
    """The file's sha256 or the start of it. Null: as its library says, else that of the first download."""
    path: UserPath | None = None
    """A local file to use instead of downloading: a state_dict, or a .safetensors file."""
    license: str | None = None
    """The weights' licence, for the model card: such as apache-2.0. Null: as timm says, else unknown."""


class Model(Section):
    backbone: str
    """convnet, bn_inception, timm/NAME or torchvision/NAME; resnet50 and the like are torchvision's."""
    widths: list[Annotated[int, Field(ge=1, le=4096)]] = Field(default=[16, 32, 64], min_length=1, max_length=8)
    """Of networks that are made to measure, such as convnet: output channels of the stride-2 convolutions."""
    pretrained: Literal["none", "imagenet"]
    """`none` starts from random weights and must be said. `imagenet` needs `weights` for bn_inception and means the
    library's own for timm and torchvision, whatever images they saw."""
    weights: Weights | None = None
    """The pretrained weight file: needed for bn_inception; without it timm's and torchvision's networks take theirs."""
    pooling: Literal["gap", "gmp", "gap_gmp", "head"]
    """Global average pooling, global max pooling, or their sum, over all positions (a transformer's patches); or as the
    head of a network of timm or torchvision pools, for instance by the class token."""
    embedding_dim: Annotated[int, Field(ge=1, le=65536)]
    """D, the embedding's length."""
    freeze_batch_norm: bool
    """Keep BatchNorm's running statistics (eval mode); its affine parameters train all the same. Networks without
    BatchNorm, such as transformers and ConvNeXt, have nothing to freeze."""

    @field_validator("backbone")
    @classmethod
    def _canonical(cls, value: str) -> str:
        return canonical_backbone(value)

    @model_validator(mode="after")
    def _fits_the_backbone(self) -> "Model":
        if self.pooling == "head" and "/" not in self.backbone:
            raise ValueError(f"pooling: {self.backbone} has no head of its own; write gap, gmp or gap_gmp")
        if self.weights and self.weights.addresses and not (self.weights.sha256 or self.weights.path):
            raise ValueError("weights.sha256 is missing: a file from addresses has to be checked")
        if self.pretrained == "imagenet":
            if self.backbone == "convnet":
                raise ValueError("there are no ImageNet weights for convnet: write pretrained: none")
            if "/" not in self.backbone and self.weights is None:
                raise ValueError(
                    f"weights is missing: {self.backbone} with pretrained: imagenet needs addresses and sha256"
                )
        return self
