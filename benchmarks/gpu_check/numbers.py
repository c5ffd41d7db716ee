"""Whether a GPU computes what the CPU does."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.gpu_check.machine import choose
from memvir import MemVir, build_loss
from memvir.losses import LOSSES

BATCH, CLASSES, DIM, STEPS = 64, 98, 128, 40
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def losses(device: str) -> Iterator[dict[str, Any]]:
    """The largest relative errors over steps of warm memory, of losses and of gradients.

    Embeddings come in the precision that a backbone under autocast would give; both sides get the same ones.
    """
    target = choose(device)
    torch.backends.cuda.matmul.allow_tf32 = False
    rows = []
    for name in LOSSES:
        for with_memvir in (False, True):
            row: dict[str, Any] = {"loss": ("MemVir + " if with_memvir else "") + name}
            for precision, dtype in PRECISIONS.items():
                loss_error, gradient_error = errors(name, with_memvir, dtype, target)
                row |= {f"{precision}: loss": f"{loss_error:.1e}", "gradients ": f"{gradient_error:.1e}"}
                row[f"{precision}: gradients"] = row.pop("gradients ")
                assert loss_error < 1e-4 and gradient_error < 1e-3, f"{row['loss']} in {precision} is wrong: {row}"
            rows.append(row)
            yield {f"Largest relative error over {STEPS} steps, against float64 on the CPU": rows}
    title = "Training a small network as a run does, against fp32 on the CPU"
    try:
        yield {title: list(trained(target))}
    except ImportError as missing:  # the losses need torch alone
        yield {title: f"skipped: {missing}"}


def trained(device: torch.device) -> Iterator[dict[str, Any]]:
    """Autocast, loss scaling and optimiser of a run's own loop: the losses of its first epoch, in each precision.

    Only the first loss must agree: fp16 leaves out steps until its scale fits, and is behind from then on.
    """
    reference, _ = first_losses(torch.device("cpu"), "fp32")
    for precision in PRECISIONS:
        found, scale = first_losses(device, precision)
        error = (found - reference).abs() / reference.abs()
        assert found.isfinite().all() and error[0] < 0.02, f"{precision}: losses {found}, not {reference}"
        row = {"precision": precision, "relative error of the first loss": f"{float(error[0]):.1e}"}
        yield {**row, f"of the first {len(found)} losses": f"{float(error.max()):.1e}", "last loss scale": scale}


def first_losses(device: torch.device, precision: str) -> tuple[torch.Tensor, float]:
    from benchmarks.gpu_check.small_run import Watch, make_trainer  # late: needs more packages than the losses

    trainer = make_trainer(device, precision)
    trainer.train_epoch(Watch())  # type: ignore[arg-type]
    return trainer.losses[: trainer.batch].double().cpu(), trainer.scaler.get_scale()


def errors(name: str, with_memvir: bool, dtype: torch.dtype, device: torch.device) -> tuple[float, float]:
    torch.manual_seed(0)
    loss: nn.Module = build_loss(name, CLASSES, DIM)
    loss = MemVir(loss, num_steps=3, step_gap=2) if with_memvir else loss
    reference = copy.deepcopy(loss).double()
    loss = loss.to(device)
    worst = [0.0, 0.0]
    for step in range(STEPS):
        labels = torch.randint(CLASSES, (BATCH if step % 10 else BATCH - 5,))
        embeddings = F.normalize(torch.randn(len(labels), DIM)).to(dtype)
        results = []
        for module, where, precision in ((reference, "cpu", torch.float64), (loss, device, torch.float32)):
            module.zero_grad()
            inputs = embeddings.to(where, precision).requires_grad_()
            value = module(inputs, labels.to(where))
            value.backward()
            gradients = torch.cat([inputs.grad.flatten(), module.proxies.grad.flatten()])
            results.append((value.detach().double().cpu(), gradients.double().cpu()))
        (value, gradients), (ours, our_gradients) = results
        worst[0] = max(worst[0], float((ours - value).abs() / value.abs()))
        worst[1] = max(worst[1], float((our_gradients - gradients).norm() / gradients.norm()))
        with torch.no_grad():
            loss.proxies.copy_(loss.proxies + 0.01 * torch.randn(CLASSES, DIM).to(device))
            reference.proxies.copy_(loss.proxies.double())
    return worst[0], worst[1]
