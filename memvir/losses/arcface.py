import math
from typing import TYPE_CHECKING

import torch

from memvir.losses.cross_entropy import CrossEntropyLoss

if TYPE_CHECKING:
    from memvir.sections import Angle, Positive


class ArcFace(CrossEntropyLoss):
    """Cross-entropy of s * cos(theta), for the positive s * cos(theta + m), m in radians (Deng et al., CVPR 2019).

    Where theta + m exceeds pi, cos(theta) - m * sin(m) instead, as its authors do, so that it keeps falling.
    """

    display_name = "ArcFace"

    def __init__(self, num_classes: int, dim: int, scale: "Positive" = 64.0, margin: "Angle" = 0.5, **kwargs):
        super().__init__(num_classes, dim, **kwargs)
        self.scale, self.margin = scale, margin

    @property
    def factor(self):
        return self.scale

    def positive(self, similarity):
        square = (1 - similarity**2).clamp(min=1e-12)  # away from 0, where the root's gradient is infinite
        sine = square * square.rsqrt()  # torch's sqrt is MKL's, whose last digits differ between AMD and Intel
        beyond = similarity < -math.cos(self.margin)
        return torch.where(
            beyond,
            similarity - self.margin * math.sin(self.margin),
            similarity * math.cos(self.margin) - sine * math.sin(self.margin),
        )
