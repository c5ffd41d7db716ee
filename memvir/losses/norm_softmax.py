from typing import TYPE_CHECKING

from memvir.losses.cross_entropy import CrossEntropyLoss

if TYPE_CHECKING:
    from memvir.sections import Positive


class NormSoftMax(CrossEntropyLoss):
    """Cross-entropy of s * <e, w> (Zhai and Wu, "Classification is a Strong Baseline for Deep Metric Learning")."""

    display_name = "Norm-SoftMax"

    def __init__(self, num_classes: int, dim: int, scale: "Positive" = 23.0, **kwargs):
        super().__init__(num_classes, dim, **kwargs)
        self.scale = scale

    @property
    def factor(self):
        return self.scale
