"""What the proxy losses share.

Every class c has a trainable proxy w_c, a row of `.proxies` (C, D); `forward(embeddings (B, D), labels (B,))` is the
mean loss. Embeddings and proxies are L2-normalised by the loss itself (SoftMax excepted), in at least float32.

Each loss is an *anchor-wise* one: it looks at one anchor at a time (an embedding, or for Proxy-Anchor a proxy) and
compares it with all the others (proxies, or embeddings) through a log-sum-exp over them. That is what lets
`memvir.memory.MemVir` add virtual classes in O(N): see there. `block` computes the log-sum-exp over the others at hand,
and `combine` makes the loss of it, so that the plain loss is `combine` of one `block`.
"""

import math
from numbers import Real
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memvir.errors import UserError
from memvir.losses.checks import check_counts, checked_labels
from memvir.losses.logsumexp import without_autocast


class ProxyLoss(nn.Module):
    """What all losses share. A subclass sets `factor` and defines `block` and `combine`."""

    display_name: str
    normalised = True
    anchors_are_proxies = False
    factor: float
    """What multiplies the similarity <e, w> in the log-sum-exps."""
    initialisation = "uniform_c"  # Kaiming-uniform (a = sqrt 5) of the (D, C) matrix

    def __init__(
        self,
        num_classes: int,
        dim: int,
        initialisation: Literal["uniform_c", "uniform_d", "normal_c", "normal_d"] | None = None,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        check_counts(type(self).__name__, num_classes=num_classes, dim=dim)
        if not isinstance(generator, torch.Generator | None):
            raise UserError(f"{type(self).__name__}: generator must be a torch.Generator, not {generator!r}")
        self.proxies = nn.Parameter(torch.empty(num_classes, dim))
        with torch.no_grad():
            self.initialise(self.initialisation if initialisation is None else initialisation, generator)

    def initialise(self, initialisation: str, generator: torch.Generator | None) -> None:
        """Uniform within 1/sqrt(C) or 1/sqrt(D), or normal with a standard deviation of sqrt(2/C) or sqrt(2/D)."""
        num_classes, dim = self.proxies.shape
        match initialisation:
            case "uniform_c" | "uniform_d":
                bound = 1 / math.sqrt(num_classes if initialisation == "uniform_c" else dim)
                self.proxies.uniform_(-bound, bound, generator=generator)
            case "normal_c" | "normal_d":
                deviation = math.sqrt(2 / (num_classes if initialisation == "normal_c" else dim))
                self.proxies.normal_(0, deviation, generator=generator)
            case _:
                raise UserError(
                    f"{self.display_name}: initialisation is uniform_c, uniform_d, normal_c or normal_d, "
                    f"not {initialisation!r}"
                )

    def inputs(self, embeddings: Tensor, proxies: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings (B, D) and proxies (C, D) as the formula takes them."""
        dtype = torch.promote_types(proxies.dtype, torch.float32)
        embeddings, proxies = embeddings.to(dtype), proxies.to(dtype)
        return (F.normalize(embeddings), F.normalize(proxies)) if self.normalised else (embeddings, proxies)

    def block(self, embeddings: Tensor, proxies: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For each of the A anchors: log-sum-exp over the others, its positive's term, and 1 if that counts, else 0."""
        raise NotImplementedError

    def combine(self, logsumexp: Tensor, positive: Tensor, counted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The mean loss of any number of anchors, given what `block` returns, and its derivatives by the first two."""
        raise NotImplementedError

    def mean(self, embeddings: Tensor, proxies: Tensor, labels: Tensor) -> Tensor:
        """The loss of embeddings and proxies as `inputs` gives them."""
        return self.combine(*self.block(embeddings, proxies, labels))[0]

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        labels = checked_labels(embeddings, labels, self.proxies, len(self.proxies))
        with without_autocast(embeddings.device):
            return self.mean(*self.inputs(embeddings, self.proxies), labels)

    @property
    def numbers(self) -> dict[str, float]:
        """Its options that are numbers, as they are now: they may be changed while it trains."""
        values = vars(self).items()
        return {name: float(value) for name, value in values if isinstance(value, Real) and not isinstance(value, bool)}

    def extra_repr(self) -> str:
        num_classes, dim = self.proxies.shape
        return ", ".join([f"{num_classes}, {dim}", *(f"{name}={value}" for name, value in self.numbers.items())])
