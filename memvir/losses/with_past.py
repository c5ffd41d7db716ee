"""A step's loss together with that of past steps, of which only the two new strips of logits are computed.

The formula and its notation are at the top of `memvir.memory`.
"""

import torch
from torch import Tensor

from memvir.losses.logsumexp import first_derivative_alone, shares_and_logsumexp
from memvir.losses.products import product
from memvir.losses.proxy_loss import ProxyLoss


class CombinedWithPast(torch.autograd.Function):
    """The loss of all anchors, current and past, and the log-sum-exps of the two new strips, (A, n) and (n, A).

    The gradients are taken here at once, by hand: the strips are turned into their gradients in place, they are gone
    when forward returns, and nothing is kept for backward that later steps overwrite.
    """

    @staticmethod
    def forward(
        ctx,
        loss: ProxyLoss,
        own: Tensor,  # (A,)
        positive: Tensor,  # (A,)
        anchors: Tensor,  # (A, D)
        others: Tensor,  # (K, D)
        counted: Tensor,  # (A,)
        block_lse: Tensor,  # (n, A, n), and so on: the same of the past
        past_positive: Tensor,
        past_counted: Tensor,
        past_anchors: Tensor,
        past_others: Tensor,
        padding: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        n, num_anchors = len(block_lse), len(own)
        logits = product(loss.factor * anchors, past_others.T)  # (A, D) @ (D, nK) -> (A, nK)
        if padding is not None:
            logits += padding
        right, across = shares_and_logsumexp(logits.unflatten(1, (n, -1)))  # (A, n, K), (A, n)
        logits = product(past_anchors, (loss.factor * others).T)  # (nA, D) @ (D, K) -> (nA, K)
        below, down = shares_and_logsumexp(logits)  # (nA, K), (nA,)

        # what each of the R = A + nA anchors is compared with, in 1 + n blocks: the current step's others, each slot's
        current = torch.cat([own[:, None], across], 1)  # (A, 1 + n)
        past = torch.cat([down[:, None], block_lse.flatten(0, 1)], 1)  # (nA, 1 + n)
        blocks, lse = shares_and_logsumexp(torch.cat([current, past]))  # (R, 1 + n), (R,)
        value, by_lse, by_positive = loss.combine(
            lse,
            torch.cat([positive, past_positive.flatten()]),
            torch.cat([counted, past_counted.flatten()]),
        )
        if any(ctx.needs_input_grad):
            # the derivative of a log-sum-exp by a logit is its exponential's share of the sum
            by_block = blocks * by_lse[:, None]  # (R, 1 + n)
            by_logit = loss.factor * by_block
            right *= by_logit[:num_anchors, 1:, None]
            below *= by_logit[num_anchors:, :1]
            ctx.save_for_backward(
                by_block[:num_anchors, 0],
                by_positive[:num_anchors],
                product(right.flatten(1), past_others),  # (A, nK) @ (nK, D) -> (A, D)
                product(below.T, past_anchors),  # (K, nA) @ (nA, D) -> (K, D)
            )
        down = down.view(n, -1)
        ctx.mark_non_differentiable(across, down)
        ctx.set_materialize_grads(False)
        return value, across, down

    @staticmethod
    @first_derivative_alone
    def backward(ctx, gradient: Tensor, *_):
        return None, *(gradient * derivative for derivative in ctx.saved_tensors), *[None] * 8
