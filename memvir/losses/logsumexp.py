"""Log-sum-exps, in full precision and with the same bits on every processor."""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from memvir.errors import UserError

MASKED = -1e30  # a logit that takes no part; finite, because the gradient of a log-sum-exp of -inf alone is nan


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Losses exponentiate scaled similarities, which half precision does not carry: autocast stays outside."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def first_derivative_alone(backward: Callable[..., Any]) -> Callable[..., Any]:
    """UserError where a second derivative is asked for. torch's `once_differentiable` lets it be wrong, without a word,
    where no gradient that comes in needs one: as at the end of every backward pass.
    """

    @functools.wraps(backward)
    def checked(ctx, *gradients):
        if torch.is_grad_enabled():
            raise UserError("the losses of memvir have no second derivatives; leave out create_graph=True")
        return backward(ctx, *gradients)

    return checked


def shares_and_logsumexp(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Of the last dimension of finite logits: each exponential's share of their sum, and the log-sum-exp.

    The same bits on every processor, where torch.exp, log and logsumexp take MKL's vector functions, whose last digits
    differ between AMD and Intel. Softmax is torch's own, and the few logarithms in float64 round to one float32.
    """
    shares = logits.softmax(-1)
    return shares, logits.amax(-1) - shares.amax(-1).double().log().to(logits.dtype)


class LogSumExp(torch.autograd.Function):
    """The log-sum-exp of the last dimension, with its gradient."""

    @staticmethod
    def forward(ctx, logits: Tensor) -> Tensor:
        shares, logsumexp = shares_and_logsumexp(logits)
        ctx.save_for_backward(shares)
        return logsumexp

    @staticmethod
    @first_derivative_alone
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient[..., None] * ctx.saved_tensors[0]


def log_one_plus_exp(exponent: Tensor) -> Tensor:
    """log(1 + exp x). torch's softplus is linear above 20, which is 1e-10 off in float64, and the gradient of its
    logaddexp takes MKL's exp.
    """
    return -logsigmoid(-exponent)
