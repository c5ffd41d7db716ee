"""Proxy losses for deep metric learning: one class each, whose code shows its formula.

Every class c has a trainable proxy w_c, a row of `.proxies` (C, D); `forward(embeddings (B, D), labels (B,))` is the
mean loss. Embeddings and proxies are L2-normalised by the loss itself (SoftMax excepted), in at least float32.

Each loss is an *anchor-wise* one: it looks at one anchor at a time (an embedding, or for Proxy-Anchor a proxy) and
compares it with all the others (proxies, or embeddings) through a log-sum-exp over them. That is what lets
`memvir.memory.MemVir` add virtual classes in O(N): see there. `block` computes the log-sum-exp over the others at hand,
and `combine` makes the loss of it, so that the plain loss is `combine` of one `block`.
"""

import math
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memvir.errors import UserError
from memvir.loss_names import DISPLAY_NAMES, OPTIONS, canonical_name

__all__ = [
    "DISPLAY_NAMES",
    "LOSSES",
    "ArcFace",
    "CosFace",
    "NormSoftMax",
    "ProxyAnchor",
    "ProxyLoss",
    "ProxyNCA",
    "SoftMax",
    "build_loss",
    "canonical_name",
]

MASKED = -1e30  # a logit that takes no part; finite, because the gradient of a log-sum-exp of -inf alone is nan


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Losses exponentiate scaled similarities, which half precision does not carry: autocast stays outside."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


class ProxyLoss(nn.Module):
    """What the six losses share. A subclass sets `factor` and defines `initialise`, `block` and `combine`."""

    display_name: str
    normalised = True
    anchors_are_proxies = False
    factor: float
    """What multiplies the similarity <e, w> in the log-sum-exps."""

    def __init__(self, num_classes: int, dim: int, generator: torch.Generator | None = None):
        super().__init__()
        self.proxies = nn.Parameter(torch.empty(num_classes, dim))
        with torch.no_grad():
            self.initialise(generator)

    def initialise(self, generator: torch.Generator | None) -> None:
        """Kaiming-uniform (a = sqrt 5) of the (D, C) matrix."""
        bound = 1 / math.sqrt(len(self.proxies))
        self.proxies.uniform_(-bound, bound, generator=generator)

    def inputs(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings (B, D) and proxies (C, D) as the formula takes them."""
        dtype = torch.promote_types(self.proxies.dtype, torch.float32)
        embeddings, proxies = embeddings.to(dtype), self.proxies.to(dtype)
        return (F.normalize(embeddings), F.normalize(proxies)) if self.normalised else (embeddings, proxies)

    def block(self, embeddings: Tensor, proxies: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For each of the A anchors: log-sum-exp over the others, its positive's term, and 1 if that counts, else 0."""
        raise NotImplementedError

    def combine(self, logsumexp: Tensor, positive: Tensor, counted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The mean loss of any number of anchors, given what `block` returns, and its derivatives by the first two."""
        raise NotImplementedError

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        with without_autocast(embeddings.device):
            return self.combine(*self.block(*self.inputs(embeddings), labels))[0]

    def extra_repr(self) -> str:
        num_classes, dim = self.proxies.shape
        options = (f"{name}={value:g}" for name, value in vars(self).items() if type(value) in (int, float))
        return ", ".join([f"{num_classes}, {dim}", *options])


class CrossEntropyLoss(ProxyLoss):
    """-log(exp z_y / sum_c exp z_c) with logits z_c = factor * <e, w_c>, averaged over the embeddings."""

    def positive(self, similarity: Tensor) -> Tensor:
        """What stands in place of an embedding's similarity with its own class: the margin losses change it."""
        return similarity

    def block(self, embeddings, proxies, labels):
        similarity = embeddings @ proxies.T  # (B, D) @ (D, C) -> (B, C)
        own = labels[:, None]  # (B, 1)
        unchanged = similarity.gather(1, own)
        positive = self.positive(unchanged)
        if positive is not unchanged:
            similarity = similarity.scatter(1, own, positive)
        positive = self.factor * positive[:, 0]
        return (self.factor * similarity).logsumexp(1), positive, torch.ones_like(positive)

    def combine(self, logsumexp, positive, counted):
        share = counted / counted.sum()
        return share.dot(logsumexp - positive), share, -share


class NormSoftMax(CrossEntropyLoss):
    """Cross-entropy of s * <e, w> (Zhai and Wu, "Classification is a Strong Baseline for Deep Metric Learning")."""

    display_name = "Norm-SoftMax"

    def __init__(self, num_classes: int, dim: int, scale: float = 23.0, **kwargs):
        super().__init__(num_classes, dim, **kwargs)
        self.scale = scale
        self.factor = scale


class ProxyNCA(CrossEntropyLoss):
    """Cross-entropy of -s * ||e - w||^2, the positive in the denominator (Movshovitz-Attias et al.; Teh et al.).

    On unit vectors -s * ||e - w||^2 = 2s * <e, w> - 2s, and the constant drops out of the cross-entropy.
    """

    display_name = "Proxy-NCA"

    def __init__(self, num_classes: int, dim: int, scale: float = 12.0, **kwargs):
        super().__init__(num_classes, dim, **kwargs)
        self.scale = scale
        self.factor = 2 * scale

    def initialise(self, generator):
        """Kaiming-normal, fan_out, of the (D, C) matrix."""
        self.proxies.normal_(0, math.sqrt(2 / self.proxies.shape[1]), generator=generator)


class SoftMax(CrossEntropyLoss):
    """Cross-entropy of the plain inner product <e, w>; nothing is normalised."""

    display_name = "SoftMax"
    normalised = False
    factor = 1.0


class CosFace(CrossEntropyLoss):
    """Cross-entropy of s * cos, for the positive s * (cos - m) (Wang et al., CVPR 2018)."""

    display_name = "CosFace"

    def __init__(self, num_classes: int, dim: int, scale: float = 64.0, margin: float = 0.35, **kwargs):
        super().__init__(num_classes, dim, **kwargs)
        self.scale, self.margin = scale, margin
        self.factor = scale

    def positive(self, similarity):
        return similarity - self.margin


class ArcFace(CrossEntropyLoss):
    """Cross-entropy of s * cos(theta), for the positive s * cos(theta + m), m in radians (Deng et al., CVPR 2019).

    Where theta + m exceeds pi, cos(theta) - m * sin(m) instead, as its authors do, so that it keeps falling.
    """

    display_name = "ArcFace"

    def __init__(self, num_classes: int, dim: int, scale: float = 64.0, margin: float = 0.5, **kwargs):
        super().__init__(num_classes, dim, **kwargs)
        self.scale, self.margin = scale, margin
        self.factor = scale

    def positive(self, similarity):
        sine = (1 - similarity**2).clamp(min=1e-12).sqrt()  # away from 0, where the root's gradient is infinite
        beyond = similarity < -math.cos(self.margin)
        return torch.where(
            beyond,
            similarity - self.margin * math.sin(self.margin),
            similarity * math.cos(self.margin) - sine * math.sin(self.margin),
        )


class ProxyAnchor(ProxyLoss):
    """Two terms per proxy w, whose positives P_w and negatives N_w are embeddings (Kim et al., CVPR 2020).

        mean over proxies with positives of   log(1 + sum over e in P_w of exp(-alpha * (<e, w> - delta)))
      + mean over all proxies of              log(1 + sum over e in N_w of exp(+alpha * (<e, w> + delta)))

    With virtual classes it is this loss over all (N+1)C proxies and (N+1)B embeddings: the embeddings of another step
    are negatives of every proxy, and a past proxy has the positives that it had when it was current.
    """

    display_name = "Proxy-Anchor"
    anchors_are_proxies = True

    def __init__(self, num_classes: int, dim: int, alpha: float = 32.0, delta: float = 0.1, **kwargs):
        super().__init__(num_classes, dim, **kwargs)
        self.alpha, self.delta = alpha, delta
        self.factor = alpha

    def initialise(self, generator):
        """Kaiming-normal, fan_out, of the (C, D) matrix."""
        self.proxies.normal_(0, math.sqrt(2 / len(self.proxies)), generator=generator)

    def block(self, embeddings, proxies, labels):
        similarity = proxies @ embeddings.T  # (C, D) @ (D, B) -> (C, B)
        own = labels == torch.arange(len(proxies), device=labels.device)[:, None]  # (C, B)
        negatives = (self.alpha * similarity).masked_fill(own, MASKED)
        positives = (-self.alpha * (similarity - self.delta)).masked_fill(~own, MASKED)
        return negatives.logsumexp(1), log_one_plus_exp(positives.logsumexp(1)), own.any(1).to(similarity.dtype)

    def combine(self, logsumexp, positive, counted):
        exponent = logsumexp + self.alpha * self.delta
        share = counted / counted.sum()
        return share.dot(positive) + log_one_plus_exp(exponent).mean(), exponent.sigmoid() / len(exponent), share


def log_one_plus_exp(exponent: Tensor) -> Tensor:
    """log(1 + exp x). torch's softplus is linear above 20, which is 1e-10 off in float64."""
    return torch.logaddexp(exponent, torch.zeros_like(exponent))


LOSSES: dict[str, type[ProxyLoss]] = {
    "norm_softmax": NormSoftMax,
    "proxy_nca": ProxyNCA,
    "softmax": SoftMax,
    "cosface": CosFace,
    "arcface": ArcFace,
    "proxy_anchor": ProxyAnchor,
}


def build_loss(name: str, num_classes: int, dim: int, **options) -> ProxyLoss:
    """A loss over `num_classes` proxies of `dim` numbers each; case and separators in its name are ignored.

    Options are the loss's own (`scale`, `margin`, `alpha`, `delta`), and `generator` for its initialisation.
    Raises UserError for a loss or an option that there is not.
    """
    key = canonical_name(name)
    for option in options:
        if option not in (*OPTIONS[key], "generator"):
            raise UserError(
                f"{DISPLAY_NAMES[key]} has no option {option!r}; it has: {', '.join(OPTIONS[key]) or 'none'}"
            )
    return LOSSES[key](num_classes, dim, **options)
