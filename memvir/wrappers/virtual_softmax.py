"""Virtual Softmax: one more class for each embedding, in its own direction (Chen, Deng, Shen, NeurIPS 2018)."""

import torch
from torch import Tensor, nn

from memvir.errors import UserError
from memvir.losses.checks import checked_labels
from memvir.losses.cross_entropy import CrossEntropyLoss
from memvir.losses.logsumexp import LogSumExp, without_autocast
from memvir.wrappers.wrapper import LossWrapper


class VirtualSoftmax(LossWrapper):
    """Cross-entropy with a virtual class for each embedding x, whose weight is ||p_y|| x / ||x||.

    That class has the logit s ||p_y|| ||x||, which for normalised losses is the constant s: log(exp s + sum_c exp z_c)
    takes the place of log(sum_c exp z_c). It has no setting and no memory, a control for whether any virtual class
    helps. For all losses but Proxy-Anchor, which has no log-sum-exp over the classes.
    """

    def __init__(self, loss: nn.Module) -> None:
        super().__init__(loss)
        if not isinstance(loss, CrossEntropyLoss):
            raise UserError(f"Virtual Softmax needs a cross-entropy loss of memvir.losses, not {type(loss).__name__}")

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        loss = self.loss
        labels = checked_labels(embeddings, labels, self.proxies, len(self.proxies))
        if not self.active:
            self.in_use = (0, 0)
            return loss(embeddings, labels)
        with without_autocast(embeddings.device):
            rows, proxies = loss.inputs(embeddings, self.proxies)  # (B, D), (C, D)
            logsumexp, positive, counted = loss.block(rows, proxies, labels)  # (B,) each
            virtual = torch.full_like(logsumexp, loss.factor)
            if not loss.normalised:
                virtual = loss.factor * proxies.index_select(0, labels).norm(dim=1) * rows.norm(dim=1)
            value = loss.combine(LogSumExp.apply(torch.stack([logsumexp, virtual], 1)), positive, counted)[0]
        self.in_use = (len(rows), 0)
        return value
