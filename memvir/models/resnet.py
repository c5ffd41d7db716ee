"""torchvision's ResNets without their classifier."""

from collections import OrderedDict

from torch import nn

from memvir.models.backbone import Backbone


class ResNet(nn.Sequential, Backbone):
    """forward: images (B, 3, H, W) -> features (B, 512 or 2048, H/32, W/32), rounded up, after ReLU.

    torchvision's ResNet of `depth` 18, 34, 50 or 101 (He et al., https://arxiv.org/abs/1512.03385) up to its last
    convolution, under torchvision's names and with its initialisation (He-normal, fan-out). Its ImageNet weights expect
    RGB from 0 to 1, minus (0.485, 0.456, 0.406), divided by (0.229, 0.224, 0.225).
    """

    in_channels = 3
    unused_keys = ("fc.",)

    def __init__(self, depth: int) -> None:
        from torchvision import models  # late: it takes seconds, which runs with other backbones need not pay

        whole = models.get_model(f"resnet{depth}", weights=None)
        layers = OrderedDict(whole.named_children())
        del layers["avgpool"]
        features_dim = layers.pop("fc").in_features
        super().__init__(layers)
        self.features_dim = features_dim
