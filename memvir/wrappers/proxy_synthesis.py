"""Proxy Synthesis: virtual classes between two classes of the batch (Gu, Ko, Kim, AAAI 2021)."""

import math
from numbers import Real

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memvir.errors import UserError
from memvir.losses.checks import check_counts, checked_labels
from memvir.losses.logsumexp import without_autocast
from memvir.losses.proxy_loss import ProxyLoss
from memvir.wrappers.wrapper import LossWrapper


class ProxySynthesis(LossWrapper):
    """A loss over mu B more embeddings and as many more classes, each between two of the batch.

    With l ~ Beta(alpha, alpha), one for the batch, the i-th virtual class is between row i and the next one, j:

        x~ = unit(l x_i + (1 - l) x_j)    p~ = unit(l p_{y_i} + (1 - l) p_{y_j})    of the class C + i

    Gradients flow through both. For every loss that compares directions; not for SoftMax, whose vectors have lengths.

    Args:
        seed: of the l; they are a function of it and of the step, so that several processes draw the same. By default
            the one that torch.manual_seed was last given.
    """

    saved = ("in_use", "seed", "step")

    def __init__(self, loss: nn.Module, alpha: float = 0.4, mu: float = 1.0, seed: int | None = None) -> None:
        super().__init__(loss)
        if not isinstance(loss, ProxyLoss) or not loss.normalised:
            raise UserError(
                "Proxy Synthesis needs a loss of memvir.losses that normalises embeddings and proxies, not "
                f"{type(loss).__name__}"
            )
        if not all(isinstance(number, Real) and number > 0 for number in (alpha, mu)) or alpha == math.inf or mu > 1:
            raise UserError(f"Proxy Synthesis needs an alpha above 0 and a mu above 0, at most 1; not {alpha} and {mu}")
        self.alpha, self.mu = float(alpha), float(mu)
        self.seed = torch.initial_seed() if seed is None else seed
        check_counts("Proxy Synthesis", 0, seed=self.seed)
        self.seed = int(self.seed)
        self.step = 0

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        num_classes = len(self.proxies)
        labels = checked_labels(embeddings, labels, self.proxies, num_classes)
        if not self.active:
            self.in_use = (0, 0)
            return self.loss(embeddings, labels)
        count = max(1, round(self.mu * len(embeddings)))  # mu B
        share = self._share()
        with without_autocast(embeddings.device):
            rows, proxies = self.loss.inputs(embeddings, self.proxies)  # (B, D), (C, D)

            def mixed(vectors: Tensor) -> Tensor:  # (B, D) -> (mu B, D)
                return F.normalize(share * vectors + (1 - share) * vectors.roll(-1, 0))[:count]

            value = self.loss.mean(
                torch.cat([rows, mixed(rows)]),
                torch.cat([proxies, mixed(proxies.index_select(0, labels))]),
                torch.cat([labels, num_classes + torch.arange(count, device=labels.device)]),
            )
        self.step, self.in_use = self.step + 1, (count, count)
        return value

    def _share(self) -> float:
        """l of this step, rounded to the same float32 on every processor."""
        random = np.random.Generator(np.random.PCG64([self.seed, self.step]))
        return float(np.float32(random.beta(self.alpha, self.alpha)))

    def _settings(self) -> dict[str, float]:
        return {"alpha": self.alpha, "mu": self.mu}

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, mu={self.mu}"
