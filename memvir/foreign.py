"""Losses that know nothing of MemVir, such as pytorch-metric-learning's: called with other proxies than their own."""

import copy
from numbers import Integral

import torch
import torch.nn.functional as F
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
    is_number = isinstance(num_classes, Integral) and not isinstance(num_classes, bool)
    return int(num_classes) if is_number and num_classes > 0 and num_proxies % num_classes == 0 else num_proxies


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

    And unless it is a mean over them all, in which the proxies of a class are those side by side. Copies of it are
    called, and random numbers taken back, so that it does not notice.
    """
    proxies, name = proxies_of(loss, parameter).detach(), type(loss).__name__
    if proxies.is_meta:
        return
    device, rows, dtype = proxies.device, len(proxies), torch.promote_types(proxies.dtype, torch.float32)
    generator = torch.Generator(device).manual_seed(0)
    drawn = torch.randn(2 * rows + 3, proxies.shape[1], dtype=dtype, device=device, generator=generator)
    proxies, embeddings = F.normalize(drawn).split([2 * rows, 3])
    embeddings = embeddings - 2 * proxies[[0, rows, -1]]  # far from their own classes: no term is lost in rounding
    classes = torch.arange(2 * num_classes, device=device)
    labels = classes[[0, num_classes, -1]]

    def called(proxies: Tensor, embeddings: Tensor, labels: Tensor) -> Tensor:
        return call_with(proxies, len(classes), copy.deepcopy(loss), parameter, embeddings, labels)

    def unchanged(proxies: Tensor, embeddings: Tensor, labels: Tensor) -> bool:
        return torch.allclose(called(proxies, embeddings, labels), mean, rtol=1e-4, atol=1e-5)

    with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            mean = called(proxies, embeddings, labels)
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"MemVir calls {name} with more classes than it was built with, and it fails ({reason}); let it take "
                f"their number from `{parameter}`, or keep it as `num_classes`"
            ) from error
        if not isinstance(mean, Tensor) or mean.numel() != 1:
            raise UserError(f"MemVir needs the mean loss, one number; {name} returns {mean!r}")
        if mean == 0 or not unchanged(proxies, embeddings, labels):
            return  # of a loss that is 0 or nan here, or draws at random, no more can be said
        if unchanged(torch.cat([proxies[:rows], -proxies[rows:]]), embeddings, labels):
            raise UserError(f"MemVir needs a loss over all the proxies that it is given; {name} leaves out those added")
        swapped = classes.clone()
        swapped[[0, num_classes]] = swapped[[num_classes, 0]]
        exchanged = proxies.unflatten(0, (len(classes), -1))[swapped].flatten(0, 1)
        if not unchanged(exchanged, embeddings, swapped[labels]):
            raise UserError(
                f"MemVir needs a loss that takes all classes alike, the proxies of each side by side; {name} does not"
            )
        twice = called(proxies, embeddings.repeat(2, 1), labels.repeat(2))
        if torch.allclose(twice, 2 * mean, rtol=1e-4):
            raise UserError(f"MemVir needs the mean loss; {name} adds up the losses of its embeddings")
