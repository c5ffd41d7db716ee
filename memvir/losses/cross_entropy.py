"""The form that all losses but Proxy-Anchor share."""

import torch
from torch import Tensor

from memvir.losses.logsumexp import LogSumExp
from memvir.losses.products import Similarities
from memvir.losses.proxy_loss import ProxyLoss


class CrossEntropyLoss(ProxyLoss):
    """-log(exp z_y / sum_c exp z_c) with logits z_c = factor * <e, w_c>, averaged over the embeddings."""

    def positive(self, similarity: Tensor) -> Tensor:
        """What stands in place of an embedding's similarity with its own class: the margin losses change it."""
        return similarity

    def block(self, embeddings, proxies, labels):
        similarity = Similarities.apply(embeddings, proxies)  # (B, C)
        own = labels[:, None]  # (B, 1)
        unchanged = similarity.gather(1, own)
        positive = self.positive(unchanged)
        if positive is not unchanged:
            similarity = similarity.scatter(1, own, positive)
        positive = self.factor * positive[:, 0]
        return LogSumExp.apply(self.factor * similarity), positive, torch.ones_like(positive)

    def combine(self, logsumexp, positive, counted):
        share = counted / counted.sum()
        return (share * (logsumexp - positive)).sum(), share, -share
