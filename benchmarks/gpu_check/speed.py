"""How fast CARS196's lines train, what feeds them, and what the rest of a run takes."""

import itertools
import multiprocessing
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import training_step
from benchmarks.gpu_check import crops
from benchmarks.gpu_check.machine import choose, wait
from memvir import evaluate
from memvir.models.embedder import mixed_precision
from memvir.params import load_params

TRAIN_IMAGES, TEST_IMAGES = 8054, 8131
LINES = ("norm_softmax", "memvir_norm_softmax", "proxy_nca", "memvir_proxy_nca")
WAYS = {  # precision, TF32, channels_last, how compiled
    "fp32": (torch.float32, False, False, None),
    "TF32": (torch.float32, True, False, None),
    "bf16": (torch.bfloat16, True, False, None),
    "bf16, channels_last": (torch.bfloat16, True, True, None),
    "bf16, channels_last, compiled": (torch.bfloat16, True, True, "default"),
    "bf16, channels_last, CUDA graphs": (torch.bfloat16, True, True, "reduce-overhead"),
}
PLAIN = "bf16, channels_last"
"""The way that the other parts take; fp32 on a CPU."""


class Step:
    """A training step of a line on random images, its memory full."""

    def __init__(self, line: str, device: torch.device, way: str) -> None:
        self.device, (self.precision, tf32, channels_last, compiled) = device, WAYS[way]
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        on_gpu = device.type == "cuda"
        self.batch, self.size = (128, 224) if on_gpu else (8, 64)
        run = load_params().run("cars196", line, 1)
        if not on_gpu and run.memvir:
            run = run.model_copy(update={"memvir": run.memvir.model_copy(update={"num_steps": 3, "step_gap": 2})})
        embedder, loss, _ = training_step.build(run, self.batch)
        self.embedder, self.loss = embedder.to(device).train(), loss.to(device)
        if channels_last:
            self.embedder.to(memory_format=torch.channels_last)
        self.optimizer = training_step.build_optimizer(run.training.optimizer, self.embedder, self.loss)
        self.forward: Callable[[torch.Tensor], torch.Tensor] = (
            torch.compile(embedder, mode=compiled) if compiled else embedder
        )
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self.images = (torch.randn(self.batch, 3, self.size, self.size) * 50).to(device).to(memory_format=layout)
        self.labels = torch.randint(training_step.NUM_CLASSES, (self.batch,)).to(device)

    def __call__(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with mixed_precision(self.device, self.precision):
            embeddings = self.forward(self.images)
        self.loss(embeddings.float(), self.labels).backward()
        self.optimizer.step()

    def seconds(self, what: Callable[[], Any], budget: float) -> float:
        """The median time of a call, after two that warm up, as many as the budget allows."""
        for _ in range(2):
            what()
        wait(self.device)
        times: list[float] = []
        while len(times) < 3 or (sum(times) < budget and len(times) < 50):
            start = time.perf_counter()
            what()
            wait(self.device)
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    def loss_alone(self) -> None:
        embeddings = torch.randn(self.batch, self.embedder.embedding.out_features, device=self.device)
        self.loss(embeddings.requires_grad_(), self.labels).backward()

    def synchronisations(self) -> int:
        """How often a step makes the CPU wait for the GPU."""
        if self.device.type != "cuda":
            return 0
        self()
        wait(self.device)
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self()
        torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(warning.message) for warning in caught)


def steps(device: str) -> Iterator[dict[str, Any]]:
    target = choose(device)
    on_gpu = target.type == "cuda"
    ways = WAYS if on_gpu else {"fp32": WAYS["fp32"]}
    rows, rates = [], {}
    for way, line in itertools.product(ways, LINES if on_gpu else LINES[:2]):
        if way not in (PLAIN, "fp32") and line not in LINES[:2]:
            continue  # the two losses cost the same
        try:
            rows.append(measure(line, target, way, rates))
        except torch.OutOfMemoryError as error:
            rows.append({"line": line, "way": way, "images/s": f"out of memory: {str(error)[:60]}"})
        except Exception as error:  # a compiler that is missing, say
            rows.append({"line": line, "way": way, "images/s": f"{type(error).__name__}: {str(error)[:80]}"})
        if on_gpu:
            torch.cuda.empty_cache()
        yield {"Steps": rows}
    ratios = [
        {"way": way, "MemVir / baseline": f"{rates[LINES[0], way] / rates[LINES[1], way]:.3f}"}
        for way in ways
        if {(LINES[0], way), (LINES[1], way)} <= rates.keys()
    ]
    yield {"Time of a step, MemVir to baseline (goal at most 1.05)": ratios}
    yield roofline(target, rates)


def measure(line: str, device: torch.device, way: str, rates: dict[tuple[str, str], float]) -> dict[str, Any]:
    step = Step(line, device, way)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    whole, alone = step.seconds(step, budget=3.0), step.seconds(step.loss_alone, budget=0.5)
    update = step.seconds(step.optimizer.step, budget=0.3)
    rates[line, way] = step.batch / whole
    row = {"line": line, "way": way, "images/s": f"{step.batch / whole:,.0f}", "step, ms": f"{whole * 1e3:.1f}"}
    row |= {"of it network, ms": f"{(whole - alone - update) * 1e3:.1f}"}
    row |= {"loss, ms": f"{alone * 1e3:.1f}", "optimiser, ms": f"{update * 1e3:.1f}", "waits": step.synchronisations()}
    if device.type == "cuda":
        row["peak memory, GiB"] = f"{torch.cuda.max_memory_allocated() / 2**30:.2f}"
    return row


def roofline(device: torch.device, rates: dict[tuple[str, str], float]) -> dict[str, Any]:
    """What share of a large matrix product's rate the network reaches, by the operations that it needs."""
    way = PLAIN if device.type == "cuda" else "fp32"
    step = Step(LINES[0], device, way)
    with FlopCounterMode(display=False) as counter:
        step()
    side = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(side, side, device=device, dtype=step.precision) for _ in range(2))
    seconds = step.seconds(lambda: left @ right, budget=1.0)
    reached = counter.get_total_flops() / step.batch * rates[LINES[0], way]
    possible = 2 * side**3 / seconds
    return {
        f"Operations of {LINES[0]}, {way}": f"{reached / 1e12:.2f} of {possible / 1e12:.2f} TFLOP/s that a matrix "
        f"product of {side} reaches, {reached / possible:.0%}"
    }


def feeding(device: str) -> Iterator[dict[str, Any]]:
    """Images/s of the loaders, with one process and with all, and of crops on the device, against those of a step."""
    import pandas as pd

    from benchmarks.images import write_photographs
    from memvir.images.batches import LoadedImages, epoch_batches
    from memvir.images.pixels import open_images
    from memvir.libraries import available_cores

    target = choose(device)
    on_gpu = target.type == "cuda"
    settings = load_params().recipe("cars196").images
    count = 512 if on_gpu else 64
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        files = write_photographs(Path(folder) / "images", min(count, 128))
        files = list(itertools.islice(itertools.cycle(files), count))
        index = pd.DataFrame({"file": files, "md5": files})
        pixels = open_images(index, Path(folder) / "images", "bgr", None, "check", Path(folder) / "scratch")
        labels = np.zeros(count, np.int64)
        for workers in sorted({1, min(8, available_cores()), min(16, available_cores())}):
            loaded = LoadedImages(pixels, labels, settings, 0, target, workers, on_gpu)
            batches = epoch_batches(labels, 64, 1, 0, 1)
            seconds = []
            for epoch in (1, 2, 3):
                start = time.perf_counter()
                for _ in loaded.batches(batches, epoch):
                    pass
                wait(target)
                seconds.append(time.perf_counter() - start)
            rows.append({"from": f"{workers} loader processes", "images/s": f"{count / min(seconds[1:]):,.0f}"})
            yield {"Feeding": rows}
    step = Step(LINES[0], target, PLAIN if on_gpu else "fp32")
    yield {"a step of the baseline takes, images/s": f"{step.batch / step.seconds(step, budget=3.0):,.0f}"}
    resident = crops.Resident(count=step.batch, height=480, width=640, device=target)
    seconds_of_crops = step.seconds(lambda: resident.batch(step.size), budget=1.0)
    rows.append(
        {"from": "crops on the device, of pixels that stay there", "images/s": f"{step.batch / seconds_of_crops:,.0f}"}
    )
    yield {"Feeding": rows}


def rest(device: str) -> Iterator[dict[str, Any]]:
    """Evaluation and checkpoints as shares of the time of a published MemVir run, and how long all lines take."""
    from memvir.experiment.checkpoint import Checkpoint

    target = choose(device)
    on_gpu = target.type == "cuda"
    way = PLAIN if on_gpu else "fp32"
    step = Step(LINES[1], target, way)
    rate = step.batch / step.seconds(step, budget=3.0)

    @torch.inference_mode()
    def embed() -> None:
        with mixed_precision(target, step.precision):
            step.embedder(step.images)

    count = TEST_IMAGES if on_gpu else 500
    embedding = step.seconds(embed, budget=1.0) / step.batch * count
    random = np.random.default_rng(0)
    embeddings = random.normal(size=(count, 512)).astype(np.float32)
    start = time.perf_counter()
    evaluate(embeddings, np.arange(count) % 98, (1,), device=target)
    search = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        parts: tuple[tuple[str, Any], ...] = (("embedder", step.embedder), ("loss", step.loss))
        state = {name: part.state_dict() for name, part in (*parts, ("optimizer", step.optimizer))}
        start = time.perf_counter()
        checkpoint = Checkpoint(Path(folder), {"run": "check"})
        checkpoint.save(state)
        saving = time.perf_counter() - start
        checkpoint.flush()
        writing = time.perf_counter() - start
    run = load_params().run("cars196", LINES[1], 1).training
    training = run.epochs * TRAIN_IMAGES / rate
    evaluations = run.epochs / run.check_epoch * (embedding * TEST_IMAGES / count + search)
    hours = {line: load_params().run("cars196", line, 1).training.epochs * TRAIN_IMAGES / rate / 3600 for line in LINES}
    yield {
        "one evaluation, s": f"{embedding:.2f} embedding, {search:.2f} search ({count} images)",
        "one checkpoint, s": f"{saving:.2f} in which the run waits, {writing:.2f} until it is on the disk",
        "evaluations, share of a published MemVir run": f"{evaluations / (training + evaluations):.1%}",
        "a checkpoint every ten minutes, share": f"{saving / 600:.2%}",
        "hours of training, one run": ", ".join(f"{line} {value:,.1f}" for line, value in hours.items()),
        "hours of four lines, five seeds": f"{5 * sum(hours.values()):,.0f}",
    }
    together = sum(side_by_side(2, device))
    yield {
        "two runs on one device, images/s": f"{together:,.0f} together, {rate:,.0f} alone",
        "hours of four lines, five seeds, with `gpus: 0.5`": f"{5 * sum(hours.values()) * rate / together:,.0f}",
    }


def side_by_side(count: int, device: str) -> list[float]:
    """Images/s of so many processes that train at once, each with its own step."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, context) as pool:
        barrier = context.Manager().Barrier(count)
        return list(pool.map(_rate, [device] * count, [barrier] * count))


def _rate(device: str, barrier: Any) -> float:
    target = choose(device)
    step = Step(LINES[1], target, PLAIN if target.type == "cuda" else "fp32")
    step()
    barrier.wait(60)
    return step.batch / step.seconds(step, budget=3.0)
