"""BroadFace: past embeddings, moved along with their proxies, train the proxies (Kim, Park, Shin, ECCV 2020)."""

import torch
from torch import Tensor, nn

from memvir.errors import UserError
from memvir.losses.checks import FiniteRows, check_counts, checked_labels
from memvir.losses.logsumexp import without_autocast
from memvir.losses.proxy_loss import ProxyLoss
from memvir.wrappers.wrapper import LossWrapper


class BroadFace(LossWrapper):
    """A queue of the last `queue_size` embeddings x, each with its label and its proxy p_then as it was then.

    Such an embedding is compensated by how its proxy has moved since, x^ = x + ||x|| / ||p_then|| (p_now - p_then), and

        loss = L(batch, proxies held fixed) + L(batch and queue held fixed, proxies)

    so that the embedder learns from the batch alone, and the proxies from far more: memory without virtual classes, in
    O(queue_size C) per step. While the queue is empty the gradients are those of the plain loss, and the value is twice
    its. For every loss. The batch is remembered after its step; rows that are not finite are remembered as zeros.
    """

    saved = ("in_use", "cursor", "filled")
    past_embeddings: Tensor
    past_proxies: Tensor
    past_labels: Tensor

    def __init__(self, loss: nn.Module, queue_size: int) -> None:
        super().__init__(loss)
        if not isinstance(loss, ProxyLoss):
            raise UserError(f"BroadFace needs a loss of memvir.losses, not {type(loss).__name__}")
        check_counts("BroadFace", queue_size=queue_size)
        self.queue_size = int(queue_size)
        self.cursor = self.filled = 0  # where the next embedding goes, and how many there are
        rows = self.proxies.new_zeros(self.queue_size, self.proxies.shape[1], dtype=self.dtype)
        self.register_buffer("past_embeddings", rows)
        self.register_buffer("past_proxies", rows.clone())
        self.register_buffer("past_labels", torch.zeros(self.queue_size, dtype=torch.int64, device=rows.device))

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        labels = checked_labels(embeddings, labels, self.proxies, len(self.proxies))
        if not self.active:
            self.in_use = (0, 0)
            return self.loss(embeddings, labels)
        with without_autocast(embeddings.device):
            embeddings, proxies, one = FiniteRows.apply(embeddings.to(self.dtype), self.proxies.to(self.dtype))
            rows, proxies = self.loss.inputs(embeddings, proxies)  # (B, D), (C, D)
            fixed, past_labels = rows.detach(), self.past_labels[: self.filled]
            past = self._compensated(proxies.detach(), past_labels)  # (n, D)
            value = self.loss.mean(rows, proxies.detach(), labels)
            value = value + self.loss.mean(torch.cat([fixed, past]), proxies, torch.cat([labels, past_labels]))
        self.in_use = (0, self.filled)
        self._remember(fixed, proxies.detach().index_select(0, labels), labels)
        return value * one

    def _compensated(self, proxies: Tensor, past_labels: Tensor) -> Tensor:
        past, then = (rows[: self.filled].to(proxies.dtype) for rows in (self.past_embeddings, self.past_proxies))
        now = proxies.index_select(0, past_labels)
        ratio = past.norm(dim=1, keepdim=True) / then.norm(dim=1, keepdim=True).clamp(min=1e-12)  # of lengths, (n, 1)
        return self.loss.inputs(past + ratio * (now - then), proxies)[0]

    @torch.no_grad()
    def _remember(self, *batch: Tensor) -> None:
        """Embeddings, their proxies and labels, over the oldest; of a batch longer than the queue its end."""
        count = min(len(batch[-1]), self.queue_size)
        places = (self.cursor + torch.arange(count, device=batch[-1].device)) % self.queue_size
        for queue, rows in zip((self.past_embeddings, self.past_proxies, self.past_labels), batch, strict=True):
            queue.index_copy_(0, places, rows[-count:].to(queue.dtype))
        self.cursor = (self.cursor + count) % self.queue_size
        self.filled = min(self.filled + count, self.queue_size)

    def _settings(self) -> dict[str, str | int]:
        return {"queue_size": self.queue_size, "loss": type(self.loss).__name__}  # of vectors with lengths or without

    def extra_repr(self) -> str:
        return f"queue_size={self.queue_size}"
