from typing import TYPE_CHECKING

from memvir.losses.cross_entropy import CrossEntropyLoss

if TYPE_CHECKING:
    from memvir.sections import NonNegative, Positive


class CosFace(CrossEntropyLoss):
    """Cross-entropy of s * cos, for the positive s * (cos - m) (Wang et al., CVPR 2018)."""

    display_name = "CosFace"

    def __init__(self, num_classes: int, dim: int, scale: "Positive" = 64.0, margin: "NonNegative" = 0.35, **kwargs):
        super().__init__(num_classes, dim, **kwargs)
        self.scale, self.margin = scale, margin

    @property
    def factor(self):
        return self.scale

    def positive(self, similarity):
        return similarity - self.margin
