"""What a GPU does to a run, each kind as one line: its memory does not suffice, or it is gone."""

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator

import torch

from memvir.errors import UserError
from memvir.experiment.settings import Run

log = logging.getLogger("memvir")

AGAIN = "run the same command again, it goes on from its last checkpoint"


@contextlib.contextmanager
def gpu_errors(run: Run, num_classes: int) -> Iterator[None]:
    """Raise UserError where a GPU has no room for the run, or fails."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(f"{run.name}: {_first_line(error)} {needs(run, num_classes)}; {AGAIN}") from None
    except RuntimeError as error:
        reason = _first_line(error)
        if "CUDA error" not in reason or "device-side assert" in reason:
            raise  # a fault of the code
        raise UserError(
            f"{run.name}: the GPU failed ({reason}); see what nvidia-smi says of it, and {AGAIN}; another GPU is "
            "chosen by runtime.device, such as cuda:1"
        ) from error


def needs(run: Run, num_classes: int) -> str:
    """What of a run takes memory, and what to change."""
    training, dim = run.training, run.model.embedding_dim
    text = f"The run has batches of {training.batch_size} images of {run.images.size} pixels in {training.precision}"
    advice = "training.precision: bf16" if training.precision == "fp32" else "a smaller training.batch_size"
    if run.memvir is not None:
        memory, strips = memvir_bytes(run, num_classes)
        text += (
            f"; MemVir with N {run.memvir.num_steps}, M {run.memvir.step_gap}, C {num_classes}, D {dim} keeps "
            f"{memory / 1e6:,.0f} MB in {run.memvir.storage_dtype} and computes {strips / 1e6:,.0f} MB of logits a step"
        )
        if run.memvir.storage_dtype == "float32" and memory > 1e9:
            advice += ", memvir.storage_dtype: bfloat16 or a smaller num_steps"
    return f"{text}. Use {advice}, or a larger share of the GPU (resources.gpus)"


def memvir_bytes(run: Run, num_classes: int) -> tuple[int, int]:
    """What MemVir keeps between steps, and the logits that one step adds: (M+1)N steps, and the two strips."""
    assert run.memvir is not None
    steps, slots = run.memvir.num_steps, (run.memvir.step_gap + 1) * run.memvir.num_steps
    batch, dim = run.training.batch_size, run.model.embedding_dim
    anchors = num_classes if run.loss.name == "proxy_anchor" else batch
    stored = 2 if run.memvir.storage_dtype == "bfloat16" else 4
    kept = slots * ((batch + num_classes) * dim * stored + anchors * (steps + 2) * 4 + batch * 8)
    return kept, 2 * steps * batch * num_classes * 4


def warn_without_gpu(where: str) -> None:
    """Say that runs whose `where` asks for a GPU will train on the CPU, if torch can use none."""
    if not torch.cuda.is_available():
        log.warning("%s asks for a GPU, and torch can use none (%s): this run trains on the CPU", where, no_gpu())


def no_gpu() -> str:
    """Why torch sees no GPU."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return "CUDA_VISIBLE_DEVICES hides all"
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.is_available()
    reason = " ".join(str(said[-1].message).split()) if said else "no driver answers"
    return reason.partition(". ")[0].removeprefix("CUDA initialization: ")


def _first_line(error: Exception) -> str:
    return " ".join((str(error).strip().splitlines() or [type(error).__name__])[0].split())
