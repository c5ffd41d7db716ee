"""Any network of timm (https://github.com/huggingface/pytorch-image-models), as backbone timm/NAME or timm/NAME.TAG."""

import math
import re
import sys
from typing import TYPE_CHECKING, Any

from torch import Tensor

from memvir.errors import UserError
from memvir.models.library_network import LibraryNetwork, known_name, no_map, without_dropout

if TYPE_CHECKING:
    from memvir.models.settings import Model, Weights


class TimmNetwork(LibraryNetwork):
    """forward: as in `Backbone`; the tokens of a transformer, without its class token, are a map (B, F, N, 1).

    Takes images of any number of channels: the first convolution of three-channel weights is summed for grey ones.
    """

    def __init__(self, backbone: str, in_channels: int, pooling: str) -> None:
        network: Any = _timm(backbone).create_model(_known(backbone), in_chans=in_channels)
        size = network.pretrained_cfg["input_size"][-1]
        whole = network.state_dict().keys()
        try:
            network.reset_classifier(0, None if pooling == "head" else "")  # None: its own, "": none
        except (AssertionError, TypeError):
            raise no_map(backbone) from None
        super().__init__(backbone, without_dropout(network), in_channels, pooling, size)
        self.unused_keys = tuple(whole - network.state_dict().keys())

    @classmethod
    def from_settings(cls, model: "Model", in_channels: int) -> "TimmNetwork":
        return cls(model.backbone, in_channels, model.pooling)

    @staticmethod
    def preprocessing(backbone: str) -> dict[str, Any]:
        timm = _timm(backbone)
        config = timm.data.resolve_data_config(pretrained_cfg=_config(backbone).to_dict())
        size = config["input_size"][-1]
        return {
            "size": size,
            "channels": "rgb",
            "value_range": 1,
            "mean": list(config["mean"]),
            "std": list(config["std"]),
            "test": {"resize": math.floor(size / config["crop_pct"])},
        }

    @staticmethod
    def own_weights(backbone: str) -> "Weights":
        """The file whose name carries its checksum if there is one, else the one on the Hugging Face hub."""
        from memvir.models.settings import Weights  # late: only a recipe asks

        config = _config(backbone)
        checked = re.search(r"-([0-9a-f]{8,64})\.pth$", config.url or "")
        if checked and not config.custom_load:
            return Weights(addresses=[config.url], sha256=checked[1], license=config.license)
        if config.hf_hub_id:
            file = config.hf_hub_filename or "model.safetensors"
            address = f"https://huggingface.co/{config.hf_hub_id}/resolve/main/{file}"
            return Weights(addresses=[address], license=config.license)
        raise UserError(f"model.pretrained: timm has no weight file for {backbone}; name one as model.weights.path")

    def features(self, images: Tensor) -> Tensor:
        features = self.network(images)
        if features.ndim == 3:  # (B, N, F)
            prefix = getattr(self.network, "num_prefix_tokens", 0)
            return features[:, prefix:].transpose(1, 2).unsqueeze(3)  # (B, F, N, 1)
        if features.ndim == 4 and getattr(self.network, "output_fmt", "NCHW") == "NHWC":
            return features.permute(0, 3, 1, 2)
        return features

    def adapt(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        from timm.models import adapt_input_conv

        # what timm itself does with a file on loading it: keys of other code bases become its own
        module = sys.modules[type(self.network).__module__]
        if hasattr(module, "checkpoint_filter_fn"):
            weights = module.checkpoint_filter_fn(weights, self.network)
        first = f"{self.network.pretrained_cfg.get('first_conv')}.weight"
        if first in weights and weights[first].ndim == 4 and weights[first].shape[1] == 3 != self.in_channels:
            weights[first] = adapt_input_conv(self.in_channels, weights[first])
        return super().adapt(weights)


def _timm(backbone: str) -> Any:
    try:
        import timm
        import timm.data
    except ModuleNotFoundError:
        raise UserError(f"model.backbone: {backbone} needs the package timm; `pip install timm` installs it") from None
    return timm


def _known(backbone: str) -> str:
    timm = _timm(backbone)
    return known_name(backbone, [*timm.list_models(), *timm.list_pretrained()])


def _config(backbone: str) -> Any:
    """timm's description of a network's pretrained weights and their preprocessing."""
    timm = _timm(backbone)
    config = timm.get_pretrained_cfg(_known(backbone))
    return timm.models.PretrainedCfg() if config is None else config
