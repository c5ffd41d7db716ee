"""Networks from images to embeddings.

A new backbone takes a file with a `Backbone` and a line in `BACKBONES`. Nothing here imports torch before it is used:
settings know the backbones by name in no time.
"""

import difflib
import pkgutil
import re
from typing import TYPE_CHECKING, Any

from memvir.errors import UserError

if TYPE_CHECKING:
    from memvir.models.backbone import Backbone
    from memvir.models.bn_inception import BNInception
    from memvir.models.convnet import ConvNet
    from memvir.models.embedder import Embedder, build_embedder
    from memvir.models.timm_networks import TimmNetwork
    from memvir.models.torchvision_networks import TorchvisionNetwork
    from memvir.models.weights import fetch_weights, find_weights, load_weights, read_weights

__all__ = [
    "BACKBONES",
    "BNInception",
    "Backbone",
    "ConvNet",
    "Embedder",
    "TimmNetwork",
    "TorchvisionNetwork",
    "backbone_class",
    "build_embedder",
    "canonical_backbone",
    "fetch_weights",
    "find_weights",
    "load_weights",
    "read_weights",
]

BACKBONES = {
    "convnet": "memvir.models.convnet:ConvNet",
    "bn_inception": "memvir.models.bn_inception:BNInception",
    "timm/NAME": "memvir.models.timm_networks:TimmNetwork",
    "torchvision/NAME": "memvir.models.torchvision_networks:TorchvisionNetwork",
}
"""What `model.backbone` can be -> its class; NAME stands for any network of that library."""


def canonical_backbone(name: str) -> str:
    """A backbone's name in full; resnet50 and the like are torchvision's. Raises UserError with the choices."""
    name = f"torchvision/{name}" if re.fullmatch(r"resnet\d+", name) else name
    if _key(name) not in BACKBONES:
        close = difflib.get_close_matches(_key(name), BACKBONES, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise UserError(f"expected one of {', '.join(BACKBONES)}, found {name[:60]!r}{hint}")
    return name


def module_of(backbone: str) -> str:
    """The module that a backbone's class is in, without importing it."""
    return BACKBONES[_key(canonical_backbone(backbone))].partition(":")[0]


def backbone_class(name: str) -> "type[Backbone]":
    return pkgutil.resolve_name(BACKBONES[_key(canonical_backbone(name))])


def _key(name: str) -> str:
    return re.sub("/.+", "/NAME", name, flags=re.DOTALL)


_LAZY = {path.rpartition(":")[2]: path for path in BACKBONES.values()} | {
    "Backbone": "memvir.models.backbone:Backbone",
    "Embedder": "memvir.models.embedder:Embedder",
    "build_embedder": "memvir.models.embedder:build_embedder",
    "fetch_weights": "memvir.models.weights:fetch_weights",
    "find_weights": "memvir.models.weights:find_weights",
    "load_weights": "memvir.models.weights:load_weights",
    "read_weights": "memvir.models.weights:read_weights",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return pkgutil.resolve_name(_LAZY[name])
