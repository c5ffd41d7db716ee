from typing import TYPE_CHECKING

from memvir.losses.cross_entropy import CrossEntropyLoss

if TYPE_CHECKING:
    from memvir.sections import Positive


class ProxyNCA(CrossEntropyLoss):
    """Cross-entropy of -s * ||e - w||^2, the positive in the denominator (Movshovitz-Attias et al.; Teh et al.).

    On unit vectors -s * ||e - w||^2 = 2s * <e, w> - 2s, and the constant drops out of the cross-entropy.
    """

    display_name = "Proxy-NCA"
    initialisation = "normal_d"  # Kaiming-normal, fan_out, of the (D, C) matrix

    def __init__(self, num_classes: int, dim: int, scale: "Positive" = 12.0, **kwargs):
        super().__init__(num_classes, dim, **kwargs)
        self.scale = scale

    @property
    def factor(self):
        return 2 * self.scale
