"""A training step of BN-Inception at 224 on the CPU, part by part, and what the published recipe takes at a given rate.

    python -m benchmarks.training_step [--batch-size 16] [--threads 1] [--steps 3]

The steps are those of params.yaml's cars196 recipe, on random images and from random weights, which cost the same. With
MemVir its memory is full: all N sets of virtual classes are in use. A part's time is that of its forward and backward
pass, the median over the steps; a part starts from copies of the part before, so that each is timed alone and their sum
is the step.
"""

import argparse
import platform
import statistics
import time
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from memvir.experiment.optimizer import build_optimizer
from memvir.experiment.settings import Run
from memvir.experiment.training import build_run_loss
from memvir.memory import MemVir
from memvir.models import Embedder, build_embedder
from memvir.params import load_params

NUM_CLASSES = 98
TRAIN_IMAGES = 8054
PARTS = ("backbone", "pooling and embedding layer", "loss", "optimiser")
COMPARED = ("norm_softmax", "memvir_norm_softmax")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=16, help="images in a step (the recipe has 128)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--steps", type=int, default=3, help="steps timed, after one that is not")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    params = load_params()
    runs = {variant: params.run("cars196", variant, 1) for variant in COMPARED}
    times = time_parts(runs, arguments.batch_size, arguments.steps)
    print(
        f"### A training step of BN-Inception at 224, batch {arguments.batch_size}\n\n"
        f"{processor()}, {arguments.threads} thread(s), torch {torch.__version__}, fp32; "
        f"median of {arguments.steps} steps.\n"
    )
    print(parts_table(times))
    rate = arguments.batch_size / sum(times["memvir_norm_softmax"].values())
    print("\n### How long a run takes\n")
    print(
        f"epochs x images / rate, with {TRAIN_IMAGES:,} images an epoch and the rate in images per second; reading "
        "images and\nevaluating come on top. Measure the rate where you train: it is in the progress line. The last "
        "column is the rate\nmeasured above.\n"
    )
    print(duration_table({name: params.run("cars196", name, 1) for name in params.variants}, rate))


def time_parts(runs: dict[str, Run], batch_size: int, steps: int) -> dict[str, dict[str, float]]:
    """Seconds of each of PARTS in one training step of each run; the runs take turns, so that noise falls on all."""
    seconds: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in runs}
    trained = {name: build(run, batch_size) for name, run in runs.items()}
    for _ in range(steps + 1):
        for name, run in runs.items():
            images = torch.randn(batch_size, 3, run.images.size, run.images.size) * 50
            labels = torch.randint(NUM_CLASSES, (batch_size,))
            for part, taken in time_step(*trained[name], images, labels).items():
                seconds[name][part].append(taken)
    return {
        name: {part: statistics.median(taken[1:]) for part, taken in parts.items()} for name, parts in seconds.items()
    }


def build(
    run: Run, batch_size: int, device: torch.device | None = None
) -> tuple[Embedder, nn.Module, torch.optim.Optimizer]:
    """A run's embedder, loss and optimiser, with MemVir's memory full."""
    torch.manual_seed(0)
    embedder = build_embedder(run.model.model_copy(update={"pretrained": "none"}), in_channels=3, weights=None)
    embedder, loss = embedder.to(device), build_run_loss(run, NUM_CLASSES).to(device)
    if isinstance(loss, MemVir):
        fill(loss, batch_size, run.model.embedding_dim)
    return embedder, loss, build_optimizer(run.training.optimizer, embedder, loss)


def fill(loss: MemVir, batch_size: int, dim: int) -> None:
    """As many steps as it takes until one uses all N past steps."""
    device = loss.proxies.device
    while loss.num_virtual_classes < loss.num_steps * NUM_CLASSES:
        embeddings = F.normalize(torch.randn(batch_size, dim, device=device))
        loss(embeddings, torch.randint(NUM_CLASSES, (batch_size,), device=device)).detach()


def time_step(
    embedder: Embedder, loss: nn.Module, optimizer: torch.optim.Optimizer, images: torch.Tensor, labels: torch.Tensor
) -> dict[str, float]:
    """One optimiser step, with the backward pass cut where the parts meet."""
    marks = [time.perf_counter()]

    def mark() -> None:
        marks.append(time.perf_counter())

    optimizer.zero_grad(set_to_none=True)
    features = embedder.backbone(images)
    mark()
    features_copy = features.detach().requires_grad_()
    embeddings = embedder.embedding(embedder.pool(features_copy))
    mark()
    embeddings_copy = embeddings.detach().requires_grad_()
    loss(embeddings_copy, labels).backward()
    mark()
    embeddings.backward(embeddings_copy.grad)
    mark()
    features.backward(features_copy.grad)
    mark()
    optimizer.step()
    mark()
    forward, embedding, whole_loss, embedding_back, backward, update = (end - start for start, end in pairwise(marks))
    return dict(zip(PARTS, (forward + backward, embedding + embedding_back, whole_loss, update), strict=True))


def parts_table(times: dict[str, dict[str, float]]) -> str:
    header = ["part", *(f"{variant}, ms" for variant in times)]
    rows = [[part, *(f"{parts[part] * 1000:,.1f}" for parts in times.values())] for part in PARTS]
    totals = [sum(parts.values()) for parts in times.values()]
    outside = [1 - parts["backbone"] / total for parts, total in zip(times.values(), totals, strict=True)]
    rows.append(["**step**", *(f"{total * 1000:,.1f}" for total in totals)])
    rows.append(["**outside the backbone**", *(f"{share:.1%}" for share in outside)])
    return markdown(header, rows)


def duration_table(runs: dict[str, Run], rate: float) -> str:
    header = ["variant", "epochs", "images", "seconds at rate R", f"here, at {rate:.1f} images/s"]
    rows = []
    for name, run in runs.items():
        images = run.training.epochs * TRAIN_IMAGES
        days = images / rate / 86_400
        rows.append([name, f"{run.training.epochs:,}", f"{images:,}", f"{images:,} / R", f"{days:,.1f} days"])
    return markdown(header, rows)


def markdown(header: list[str], rows: list[list[str]]) -> str:
    rule = ["---", *("---:" for _ in header[1:])]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))


def processor() -> str:
    """The CPU's name as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


if __name__ == "__main__":
    main()
