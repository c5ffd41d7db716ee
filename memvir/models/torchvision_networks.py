"""Any classification network of torchvision, as backbone torchvision/NAME."""

import re
from typing import TYPE_CHECKING, Any

from torch import Tensor

from memvir.errors import UserError
from memvir.models.library_network import LibraryNetwork, known_name, no_map, without_dropout

if TYPE_CHECKING:
    from memvir.models.settings import Model, Weights

POOLS = ("avgpool", "adaptive_avg_pool2d", "mean")
"""How torchvision's networks call the step that pools globally."""


class TorchvisionNetwork(LibraryNetwork):
    """forward: the map of features (B, F, h, w) before global pooling; for `pooling: head` what the last layer of the
    classifier would get, (B, F).
    """

    def __init__(self, backbone: str, pooling: str) -> None:
        from torchvision import models  # late: it takes seconds, which runs with other backbones need not pay
        from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

        whole = without_dropout(models.get_model(_known(backbone), weights=None))
        steps, steps_of_evaluation = get_graph_node_names(whole)
        if steps != steps_of_evaluation:
            raise UserError(f"model.backbone: {backbone} has classifiers for training alone; choose another network")
        pools = [step for step in steps if step in POOLS]
        if pooling == "head":
            last = steps[-1]
        elif pools:
            last = pools[-1]
        else:
            raise no_map(backbone)
        before = steps[steps.index(last) - 1]
        super().__init__(backbone, create_feature_extractor(whole, {before: "features"}), 3, pooling, 224)
        self.unused_keys = tuple(whole.state_dict().keys() - self.network.state_dict().keys())

    @classmethod
    def from_settings(cls, model: "Model", in_channels: int) -> "TorchvisionNetwork":
        return cls(model.backbone, model.pooling)

    @staticmethod
    def preprocessing(backbone: str) -> dict[str, Any]:
        transforms = _first_weights(backbone).transforms()
        return {
            "size": transforms.crop_size[0],
            "channels": "rgb",
            "value_range": 1,
            "mean": list(transforms.mean),
            "std": list(transforms.std),
            "test": {"resize": transforms.resize_size[0]},
        }

    @staticmethod
    def own_weights(backbone: str) -> "Weights":
        from memvir.models.settings import Weights  # late: only a recipe asks

        address = _first_weights(backbone).url
        match = re.fullmatch(r".*-([0-9a-f]{8,64})\.pth", address)
        assert match, f"torchvision's file names carry the start of their sha256, but {address} does not"
        return Weights(addresses=[address], sha256=match[1])

    def features(self, images: Tensor) -> Tensor:
        return self.network(images)["features"]


def _known(backbone: str) -> str:
    from torchvision import models

    return known_name(backbone, models.list_models(module=models))


def _first_weights(backbone: str) -> Any:
    """IMAGENET1K_V1 of nearly all, what `pretrained=True` meant when metric learning's figures were published."""
    from torchvision import models

    return next(iter(models.get_model_weights(_known(backbone))))
