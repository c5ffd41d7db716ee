from typing import TYPE_CHECKING

import torch

from memvir.losses.logsumexp import MASKED, LogSumExp, log_one_plus_exp
from memvir.losses.products import Similarities
from memvir.losses.proxy_loss import ProxyLoss

if TYPE_CHECKING:
    from memvir.sections import NonNegative, Positive


class ProxyAnchor(ProxyLoss):
    """Two terms per proxy w, whose positives P_w and negatives N_w are embeddings (Kim et al., CVPR 2020).

        mean over proxies with positives of   log(1 + sum over e in P_w of exp(-alpha * (<e, w> - delta)))
      + mean over all proxies of              log(1 + sum over e in N_w of exp(+alpha * (<e, w> + delta)))

    With virtual classes it is this loss over all (N+1)C proxies and (N+1)B embeddings: the embeddings of another step
    are negatives of every proxy, and a past proxy has the positives that it had when it was current.
    """

    display_name = "Proxy-Anchor"
    initialisation = "normal_c"  # Kaiming-normal, fan_out, of the (C, D) matrix
    anchors_are_proxies = True

    def __init__(self, num_classes: int, dim: int, alpha: "Positive" = 32.0, delta: "NonNegative" = 0.1, **kwargs):
        super().__init__(num_classes, dim, **kwargs)
        self.alpha, self.delta = alpha, delta

    @property
    def factor(self):
        return self.alpha

    def block(self, embeddings, proxies, labels):
        similarity = Similarities.apply(proxies, embeddings)  # (C, B)
        own = labels == torch.arange(len(proxies), device=labels.device)[:, None]  # (C, B)
        negatives = (self.alpha * similarity).masked_fill(own, MASKED)
        positives = (-self.alpha * (similarity - self.delta)).masked_fill(~own, MASKED)
        return LogSumExp.apply(negatives), log_one_plus_exp(LogSumExp.apply(positives)), own.any(1).to(similarity.dtype)

    def combine(self, logsumexp, positive, counted):
        exponent = logsumexp + self.alpha * self.delta
        share = counted / counted.sum()
        return (share * positive).sum() + log_one_plus_exp(exponent).mean(), exponent.sigmoid() / len(exponent), share
