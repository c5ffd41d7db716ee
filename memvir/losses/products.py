"""Matrix products with the same bits on AMD and Intel."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from memvir.losses.logsumexp import first_derivative_alone, without_autocast

BLOCK = 128
"""Terms of a sum that MKL adds up one by one on AMD and on Intel; of more it makes blocks, which differ."""
ROWS, COLUMNS = 4, 12
"""A product of fewer rows or columns MKL adds up otherwise, and otherwise on AMD than on Intel."""


def product(a: Tensor, b: Tensor) -> Tensor:
    """a (m, k) @ b (k, n), on a CPU as a sum over blocks of k, in order; without a gradient of its own.

    MKL blocks long sums too, by the processor's caches. Here the blocks are always the same, and cost as little. Zeros
    make a small product larger.
    """
    if a.device.type != "cpu":
        return a @ b
    rows, columns = len(a), b.shape[1]
    if rows < ROWS or columns < COLUMNS:
        larger = product(pad(a, (0, 0, 0, max(ROWS - rows, 0))), pad(b, (0, max(COLUMNS - columns, 0))))
        return larger[:rows, :columns].contiguous()
    if a.shape[1] <= BLOCK:
        return a @ b
    total = a[:, :BLOCK] @ b[:BLOCK]
    for start in range(BLOCK, a.shape[1], BLOCK):
        total.addmm_(a[:, start : start + BLOCK], b[start : start + BLOCK])
    return total


class Similarities(torch.autograd.Function):
    """The inner products of anchors (A, D) with others (K, D) -> (A, K), with their gradients."""

    @staticmethod
    def forward(ctx, anchors: Tensor, others: Tensor) -> Tensor:
        ctx.save_for_backward(anchors, others)
        return product(anchors, others.T)

    @staticmethod
    @first_derivative_alone
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        anchors, others = ctx.saved_tensors
        by_anchors, by_others = ctx.needs_input_grad
        with without_autocast(gradient.device):
            return (
                product(gradient, others) if by_anchors else None,  # (A, K) @ (K, D)
                product(gradient.T, anchors) if by_others else None,  # (K, A) @ (A, D)
            )
