"""What every backbone is, whatever it is made of."""

from torch import nn


class Backbone(nn.Module):
    """forward: images (B, in_channels, H, W) -> features (B, features_dim, h, w)."""

    in_channels: int
    features_dim: int
    unused_keys: tuple[str, ...] = ()
    """Prefixes of keys that its weight file holds beyond the module's own: a classifier."""
