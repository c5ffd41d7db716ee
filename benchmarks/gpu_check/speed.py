"""How fast CARS196's lines train, what feeds them, and what the rest of a run takes."""

import gc
import itertools
import multiprocessing
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import training_step
from benchmarks.gpu_check import crops
from benchmarks.gpu_check.machine import choose, wait
from memvir import evaluate
from memvir.experiment.checkpoint import Checkpoint
from memvir.experiment.environment import set_up_device
from memvir.experiment.settings import Runtime
from memvir.experiment.training import embed
from memvir.images.batches import TestImages
from memvir.models.embedder import mixed_precision
from memvir.params import load_params

TRAIN_IMAGES, TEST_IMAGES = 8054, 8131
LINES = ("norm_softmax", "memvir_norm_softmax", "proxy_nca", "memvir_proxy_nca")


class Way(NamedTuple):
    precision: torch.dtype
    deterministic: bool = False
    tf32: bool = True
    channels_last: bool = True
    compiled: str | None = None


AS_RUN, FAST = "fp32, deterministic", "bf16"
WAYS = {
    AS_RUN: Way(torch.float32, deterministic=True, tf32=False),
    "fp32": Way(torch.float32, tf32=False),
    "TF32": Way(torch.float32),
    FAST: Way(torch.bfloat16),
    "bf16, channels first": Way(torch.bfloat16, channels_last=False),
    "bf16, compiled": Way(torch.bfloat16, compiled="default"),
    "bf16, CUDA graphs": Way(torch.bfloat16, compiled="reduce-overhead"),
}
"""The first is CARS196's recipe as params.yaml has it; channels last, where nothing else is said."""


class Step:
    """A training step of a line on random images, its memory full."""

    def __init__(self, line: str, device: torch.device, way: str) -> None:
        self.device, self.way = device, WAYS[way]
        set_up_device(Runtime(device=device.type, deterministic=self.way.deterministic, tf32=self.way.tf32))
        on_gpu = device.type == "cuda"
        self.batch, self.size = (128, 224) if on_gpu else (8, 64)
        self.run = run = load_params().run("cars196", line, 1)
        if not on_gpu and run.memvir:
            run = run.model_copy(update={"memvir": run.memvir.model_copy(update={"num_steps": 3, "step_gap": 2})})
        embedder, self.loss, _ = training_step.build(run, self.batch, device)
        self.embedder = embedder.train()
        if self.way.channels_last:
            self.embedder.to(memory_format=torch.channels_last)
        self.optimizer = training_step.build_optimizer(run.training.optimizer, self.embedder, self.loss)
        self.forward: Callable[[torch.Tensor], torch.Tensor] = (
            torch.compile(embedder, mode=self.way.compiled) if self.way.compiled else embedder
        )
        layout = torch.channels_last if self.way.channels_last else torch.contiguous_format
        self.images = (torch.randn(self.batch, 3, self.size, self.size) * 50).to(device).to(memory_format=layout)
        self.labels = torch.randint(training_step.NUM_CLASSES, (self.batch,)).to(device)

    def __call__(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with mixed_precision(self.device, self.way.precision):
            embeddings = self.forward(self.images)
        self.loss(embeddings.float(), self.labels).backward()
        self.optimizer.step()

    def seconds(self, what: Callable[[], Any], budget: float) -> float:
        """The median time of a call, after two that warm up, as many as the budget allows.

        A GPU is waited for after every five: while it is at work on one, the next are launched, as in a run.
        """
        calls = 5 if self.device.type == "cuda" else 1
        for _ in range(2):
            what()
        wait(self.device)
        times: list[float] = []
        while len(times) < 3 or (sum(times) * calls < budget and len(times) < 50):
            start = time.perf_counter()
            for _ in range(calls):
                what()
            wait(self.device)
            times.append((time.perf_counter() - start) / calls)
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
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                self()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(warning.message) for warning in caught)


def steps(device: str) -> Iterator[dict[str, Any]]:
    target = choose(device)
    ways = WAYS if target.type == "cuda" else {AS_RUN: WAYS[AS_RUN]}
    rows: list[dict[str, Any]] = []
    rates: dict[tuple[str, str], float] = {}
    for compiled in (False, True):  # those that compile come last, as they may take longest
        for way in [name for name, way in ways.items() if bool(way.compiled) == compiled]:
            for line in LINES if way in (AS_RUN, FAST) and target.type == "cuda" else LINES[:2]:
                rows.append(measure_or_say_why(line, target, way, rates))
                yield {"Steps": rows}
        yield {"Time of a step, MemVir to baseline (goal at most 1.05)": ratios(rates)}
        if not compiled:
            yield roofline(target, rates)


def ratios(rates: dict[tuple[str, str], float]) -> list[dict[str, Any]]:
    return [
        {"way": way, "MemVir / baseline": f"{rates[LINES[0], way] / rates[LINES[1], way]:.3f}"}
        for way in WAYS
        if {(LINES[0], way), (LINES[1], way)} <= rates.keys()
    ]


def measure_or_say_why(
    line: str, device: torch.device, way: str, rates: dict[tuple[str, str], float]
) -> dict[str, Any]:
    if device.type == "cuda":
        gc.collect()  # an earlier step refers to itself
        torch.cuda.empty_cache()
    try:
        return measure(line, device, way, rates)
    except torch.OutOfMemoryError as error:
        return {"line": line, "way": way, "images/s": f"out of memory: {str(error)[:60]}"}
    except Exception as error:  # a compiler that is missing, say
        return {"line": line, "way": way, "images/s": f"{type(error).__name__}: {str(error)[:80]}"}


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
    way = FAST if device.type == "cuda" else AS_RUN
    step = Step(LINES[0], device, way)
    with FlopCounterMode(display=False) as counter:
        step()
    side = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(side, side, device=device, dtype=step.way.precision) for _ in range(2))
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
    count, turns = (512, 25) if on_gpu else (64, 4)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        files = write_photographs(Path(folder) / "images", min(count, 128))
        files = list(itertools.islice(itertools.cycle(files), count))
        index = pd.DataFrame({"file": files, "md5": files})
        pixels = open_images(index, Path(folder) / "images", "bgr", None, "check", Path(folder) / "scratch")
        labels = np.zeros(count, np.int64)
        for workers in sorted({1, min(8, available_cores()), min(16, available_cores())}):
            loaded = LoadedImages(pixels, labels, settings, 0, target, workers, on_gpu)
            batches = list(itertools.islice(itertools.cycle(epoch_batches(labels, 64, 1, 0, 1)), turns * workers))
            arriving = iter(loaded.batches(batches, 1))
            for _ in range(2 * workers):  # the processes start, and have two batches ready each
                next(arriving)
            wait(target)
            start = time.perf_counter()
            images = sum(len(batch) for batch, _ in arriving)
            wait(target)
            rate = images / (time.perf_counter() - start)
            rows.append({"from": f"loader processes: {workers}", "images/s": f"{rate:,.0f}"})
            yield {"Feeding": rows}
    for way in (AS_RUN, FAST) if on_gpu else (AS_RUN,):
        step = Step(LINES[0], target, way)
        rate = step.batch / step.seconds(step, budget=3.0)
        yield {f"a step of the baseline takes, {way}, images/s": f"{rate:,.0f}"}
    resident = crops.Resident(count=step.batch, height=480, width=640, device=target)
    seconds_of_crops = step.seconds(lambda: resident.batch(step.size), budget=1.0)
    rows.append(
        {"from": "crops on the device, of pixels that stay there", "images/s": f"{step.batch / seconds_of_crops:,.0f}"}
    )
    yield {"Feeding": rows}


def rest(device: str) -> Iterator[dict[str, Any]]:
    """Evaluation and checkpoints as shares of the time of a published MemVir run, and how long all lines take."""
    target = choose(device)
    on_gpu = target.type == "cuda"
    step = Step(LINES[1], target, AS_RUN)
    rate = step.batch / step.seconds(step, budget=3.0)
    count = TEST_IMAGES if on_gpu else 200
    embedding, search = evaluation_seconds(step, count)
    run = step.run.training
    training = run.epochs * TRAIN_IMAGES / rate
    evaluations = run.epochs / run.check_epoch * (embedding * TEST_IMAGES / count + search)
    yield {
        "one evaluation, s": f"{embedding:.2f} embedding, {search:.2f} search ({count} images)",
        "evaluations, share of a published MemVir run": f"{evaluations / (training + evaluations):.1%}",
    }
    yield checkpoint_seconds(step)
    rates = {AS_RUN: rate}
    if on_gpu:
        fast = Step(LINES[1], target, FAST)
        rates[FAST] = fast.batch / fast.seconds(fast, budget=3.0)
    epochs = {line: load_params().run("cars196", line, 1).training.epochs for line in LINES}
    for way, images_per_second in rates.items():
        hours = {line: many * TRAIN_IMAGES / images_per_second / 3600 for line, many in epochs.items()}
        yield {
            f"hours of training, one run, {way}": ", ".join(f"{line} {value:,.1f}" for line, value in hours.items()),
            f"hours of four lines, five seeds, {way}": f"{5 * sum(hours.values()):,.0f}",
        }
    together = sum(side_by_side(2, device))
    all_hours = 5 * sum(epochs.values()) * TRAIN_IMAGES / together / 3600
    yield {
        f"two runs on one device, {AS_RUN}, images/s": f"{together:,.0f} together, {rate:,.0f} alone",
        f"hours of four lines, five seeds, with `gpus: 0.5`, {AS_RUN}": f"{all_hours:,.0f}",
    }


def evaluation_seconds(step: Step, count: int) -> tuple[float, float]:
    """Of embedding test images, cropped already, and of the search; the second time of each."""
    random = np.random.default_rng(0)
    pictures = list(random.integers(0, 256, (64, step.size, step.size, 3), dtype=np.uint8))
    images = TestImages([pictures[i % 64] for i in range(count)], step.run.images, step.device)
    embeddings = random.normal(size=(count, 512)).astype(np.float32)
    times = []
    for _ in range(2):
        start = time.perf_counter()
        embed(step.embedder, images, step.way.precision)
        middle = time.perf_counter()
        evaluate(embeddings, np.arange(count) % 98, (1,), device=step.device)
        times = [middle - start, time.perf_counter() - middle]
    step.embedder.train()
    return times[0], times[1]


def checkpoint_seconds(step: Step) -> dict[str, Any]:
    """Of the second one: the first finds no pinned memory yet."""
    parts: tuple[tuple[str, Any], ...] = (("embedder", step.embedder), ("loss", step.loss))
    state = {name: part.state_dict() for name, part in (*parts, ("optimizer", step.optimizer))}
    saving = writing = 0.0
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Checkpoint(Path(folder), {"run": "check"})
        for _ in range(2):
            wait(step.device)
            start = time.perf_counter()
            checkpoint.save(state)
            saving = time.perf_counter() - start
            checkpoint.flush()
            writing = time.perf_counter() - start
    return {
        "one checkpoint, s": f"{saving:.2f} in which the run waits, {writing:.2f} until it is on the disk",
        "a checkpoint every ten minutes, share": f"{saving / 600:.2%}",
    }


def side_by_side(count: int, device: str) -> list[float]:
    """Images/s of so many processes that train at once, each with its own step."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, context) as pool:
        barrier = context.Manager().Barrier(count)
        return list(pool.map(_rate, [device] * count, [barrier] * count))


def _rate(device: str, barrier: Any) -> float:
    target = choose(device)
    step = Step(LINES[1], target, AS_RUN)
    step()
    barrier.wait(60)
    return step.batch / step.seconds(step, budget=3.0)
