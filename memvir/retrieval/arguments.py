"""What callers hand over, as arrays of the right shape and kind, or refused in one sentence."""

from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np

from memvir.errors import UserError

if TYPE_CHECKING:
    import torch

    Array = np.ndarray | torch.Tensor | Sequence[Any]


def unit_length(embeddings: "Array", what: str) -> np.ndarray:
    """(rows, D) float32 of length 1, the same bytes for the same row; a row of zeros stays one."""
    array = _array(embeddings, what)
    if array.ndim != 2 or not array.size:
        raise UserError(f"{what} must have the shape (images, dimensions), not {array.shape}")
    if not np.can_cast(array.dtype, np.float32, "same_kind"):
        raise UserError(f"{what} must be real numbers, not {array.dtype}")
    if array.dtype not in (np.float32, np.float64):
        array = array.astype(np.float32)
    largest = np.maximum(array.max(axis=1), -array.min(axis=1))  # NaN if any is
    broken = np.count_nonzero(~np.isfinite(largest))
    if broken:
        raise UserError(
            f"{broken} of {len(array)} {what} hold NaN or infinite values; the model that made them has diverged "
            "(try a lower learning rate)"
        )
    # Divided by the largest first, or the squares of very large and very small values leave the range of float32.
    array = (array / np.where(largest > 0, largest, 1)[:, None]).astype(np.float32, order="C", copy=False)
    lengths = np.sqrt(np.einsum("nd,nd->n", array, array))[:, None]
    array /= np.where(lengths > 0, lengths, 1)
    return array


def label_array(labels: "Array", count: int, what: str, labelled: str) -> np.ndarray:
    """(count,) of the type that they came in; of a sequence, objects: NumPy would make one type of 1, "1" and None."""
    if hasattr(labels, "__array__"):
        array = _array(labels, what)
    else:
        values = list(labels) if isinstance(labels, Iterable) and not isinstance(labels, str | bytes) else [labels]
        array = np.fromiter(values, object, len(values))
    if array.shape != (count,):
        raise UserError(f"{what} must have the shape ({count},), one per row of the {labelled}, not {array.shape}")
    return array


def class_numbers(labels: np.ndarray, numbers: dict[Any, int], what: str) -> np.ndarray:
    """(rows,) the number of each label's class by `numbers`, which new classes are added to.

    Python compares the labels, exactly; NumPy would round integers of two types to float64 for that.
    """
    distinct, places = labels, np.arange(len(labels))
    if labels.dtype != object:
        distinct, places = np.unique(labels, return_inverse=True)
    of_distinct = np.empty(len(distinct), np.int64)
    for row, value in enumerate(distinct.tolist()):
        label = value.tolist() if hasattr(value, "tolist") else value
        if not _is_label(label):
            raise UserError(f"{what} hold {label!r}, which is not a class; leave out the images that have none")
        of_distinct[row] = numbers.setdefault(label, len(numbers))
    return of_distinct[places]


def _is_label(value: Any) -> bool:
    """Whether it can be told from others: None, NaN, NaT and pandas.NA stand for nothing, and a list has no hash."""
    try:
        return value is not None and bool(value == value) and isinstance(hash(value), int)
    except (TypeError, ValueError):
        return False


def recall_depths(recall_at: "Iterable[int] | int") -> list[int]:
    values: Any = recall_at.tolist() if hasattr(recall_at, "tolist") else recall_at
    values = values if isinstance(values, Iterable) and not isinstance(values, str) else [values]
    return [whole_number(k, "recall_at") for k in values]


def whole_number(value: Any, what: str) -> int:
    number = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(number, Integral) or isinstance(number, bool) or number < 1:
        raise UserError(f"{what}: {number!r} is not a number of neighbours; use whole numbers from 1")
    return int(number)


def _array(values: "Array", what: str) -> np.ndarray:
    """`values` as an array on the CPU; a tensor is recognised without importing torch."""
    if np.ma.is_masked(values):
        raise UserError(f"{what} hold masked values; leave out the images that have none")
    try:
        if hasattr(values, "detach"):
            values = values.detach().cpu()
            if values.is_floating_point() and values.dtype.itemsize < 4:
                values = values.float()  # NumPy has no bfloat16
            values = values.numpy()
        return np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{what} cannot be read as an array ({reason}); give an array or a tensor") from error
