"""What sizes and batches must be: labels that fit the embeddings and the classes, and rows of finite length."""

from numbers import Integral

import torch
from torch import Tensor

from memvir.errors import UserError

INTEGERS = {torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int16, torch.int32, torch.int64}


def checked_labels(embeddings: Tensor, labels: Tensor, proxies: Tensor, num_classes: int) -> Tensor:
    """The labels (B,) as int64, or UserError where they and the embeddings (B, D) are no batch of so many classes.

    Shapes, types and devices are always looked at. A label out of range is a UserError on the CPU, and on a GPU an
    assertion on the device, because reading labels would wait for it. On `meta` there are none to look at.
    """
    dense = torch.is_tensor(embeddings) and embeddings.layout == torch.strided
    if not dense or not embeddings.is_floating_point() or embeddings.ndim != 2:
        raise UserError(f"embeddings must be a tensor (B, D) of floating-point numbers, not {_described(embeddings)}")
    batch_size, dim = embeddings.shape
    if dim != proxies.shape[1]:
        raise UserError(f"embeddings have {dim} dimensions, the loss has {proxies.shape[1]}; build it with dim={dim}")
    if batch_size == 0:
        raise UserError("the batch is empty, and the mean loss of no embeddings is not defined; leave such batches out")
    if not torch.is_tensor(labels) or labels.dtype not in INTEGERS or labels.shape != (batch_size,):
        raise UserError(
            f"labels must be a tensor ({batch_size},) of integers, a class number for each embedding, "
            f"not {_described(labels)}"
        )
    if not embeddings.device == labels.device == proxies.device:
        raise UserError(
            f"embeddings are on {embeddings.device}, labels on {labels.device} and the loss on {proxies.device}; "
            "move them to one device, the loss by its .to(device)"
        )
    labels = labels.to(torch.int64)
    message = f"labels must be from 0 to {num_classes - 1}, as the loss has {num_classes} classes"
    try:
        torch._assert_async((labels == labels.clamp(0, num_classes - 1)).all(), message)
    except NotImplementedError:
        pass  # a kind of device that has no such assertion
    except RuntimeError as error:
        lowest, highest = (int(label) for label in labels.aminmax())
        raise UserError(f"{message}; these are from {lowest} to {highest}") from error
    return labels


def check_counts(owner: str, least: int = 1, **counts: object) -> None:
    """UserError unless all are whole numbers from `least`."""
    for name, value in counts.items():
        if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
            raise UserError(f"{owner}: {name} must be a whole number from {least}, not {value!r}")


def _described(value: object) -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    layout = "" if value.layout == torch.strided else f", {value.layout}"
    return f"{tuple(value.shape)} of {value.dtype}{layout}"


class FiniteRows(torch.autograd.Function):
    """Embeddings and proxies, zeros for the rows of no finite length, and 1, or nan if there are such rows.

    Multiplied by the latter, the loss and all its gradients are nan if they must be, without waiting for a GPU to say
    so. It is the length that counts, because no inner product of two rows of finite length overflows.
    """

    @staticmethod
    def forward(ctx, *matrices: Tensor) -> tuple[Tensor, ...]:
        finite = [rows.norm(dim=1, keepdim=True).isfinite().to(rows.dtype) for rows in matrices]
        cleaned = (rows.nan_to_num(0, 0, 0).mul_(whole) for rows, whole in zip(matrices, finite, strict=True))
        least = torch.cat(finite).amin()  # 1 or 0
        one = least / least
        ctx.mark_non_differentiable(one)
        return *cleaned, one

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        return gradients[:-1]
