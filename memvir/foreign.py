"""Losses that know nothing of MemVir, such as pytorch-metric-learning's: called with other proxies than their own."""

import copy

import torch
from torch import Tensor, nn
from torch.func import functional_call

from memvir.errors import UserError

# The parameters that hold a loss's proxies, and whether as columns, as pytorch-metric-learning's `W` and `fc` do
PROXY_PARAMETERS = {"proxies": False, "W": True, "fc": True}


def proxy_parameter(loss: nn.Module) -> str:
    """The name of the parameter that holds the proxies; UserError if there is none."""
    parameters = loss.named_parameters(recurse=False) if isinstance(loss, nn.Module) else ()
    matrices = {name for name, parameter in parameters if parameter.ndim == 2}
    for name in PROXY_PARAMETERS:
        if name in matrices:
            return name
    raise UserError(
        f"MemVir needs a loss with a parameter `proxies` (C, D), or `W` or `fc` (D, C); {type(loss).__name__} has none"
    )


def proxies_of(loss: nn.Module, parameter: str) -> Tensor:
    """(C, D), or of a loss with several proxies to a class (C * as many, D)."""
    proxies = getattr(loss, parameter)
    return proxies.T if PROXY_PARAMETERS[parameter] else proxies


def number_of_classes(loss: nn.Module, parameter: str) -> int:
    """C: as many as there are proxies, or fewer if the loss says so; some keep a `num_classes` of 0."""
    num_proxies, num_classes = len(proxies_of(loss, parameter)), getattr(loss, "num_classes", 0)
    several_each = isinstance(num_classes, int) and num_classes > 0 and num_proxies % num_classes == 0
    return num_classes if several_each else num_proxies


def call_with(
    proxies: Tensor, num_classes: int, loss: nn.Module, parameter: str, embeddings: Tensor, labels: Tensor
) -> Tensor:
    """The loss with these proxies in place of its own; what it holds of their number is changed for the call."""
    known = {"num_classes": num_classes, "proxy_labels": torch.arange(num_classes, device=labels.device)}
    own = {name: value for name, value in vars(loss).items() if name in known}
    try:
        for name in own:
            setattr(loss, name, known[name])
        if PROXY_PARAMETERS[parameter]:
            proxies = proxies.T
        return functional_call(loss, {parameter: proxies}, (embeddings, labels))
    finally:
        for name, value in own.items():
            setattr(loss, name, value)


def try_more_classes(loss: nn.Module, parameter: str, num_classes: int) -> None:
    """UserError unless the loss works with twice its classes: it should not fail after hours, at the first that come.

    A copy of it is called, so that nothing which it counts has counted this.
    """
    proxies = proxies_of(loss, parameter).detach()
    if proxies.is_meta:
        return
    proxies, name = proxies.to(torch.promote_types(proxies.dtype, torch.float32)), type(loss).__name__
    labels = torch.tensor([0, 2 * num_classes - 1], device=proxies.device)
    try:
        with torch.no_grad():
            mean = call_with(
                proxies.repeat(2, 1), 2 * num_classes, copy.deepcopy(loss), parameter, proxies[[0, -1]], labels
            )
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"MemVir calls {name} with more classes than it was built with, and it fails ({reason}); let it take their "
            f"number from `{parameter}`, or keep it as `num_classes`"
        ) from error
    if not isinstance(mean, Tensor) or mean.numel() != 1:
        raise UserError(f"MemVir needs the mean loss, one number; {name} returns {mean!r}")
