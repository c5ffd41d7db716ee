"""All metrics against the faiss search they rest on, and against pytorch-metric-learning.

    python -m benchmarks.retrieval [--large] [--skip-pml] [--threads 2] [--rounds 5]

CARS196's test set has 8,131 images in 98 classes of 48 to 136; --large adds one of SOP's size, 60,502 images in 11,316
classes of 2 to 12. The embeddings are random, of 512 dimensions and length 1, the same for all. The search alone is an
exact faiss index filled and asked for as many neighbours as the largest class needs; pytorch-metric-learning computes
precision@1, R-precision and MAP@R. Each measurement is a process of its own, so that its peak memory (all of the
process: interpreter, libraries, input) is its own too. The sides take turns and each keeps its best round: other work
on the machine only ever adds time. On a busy one read the CPU seconds, with --threads 1: waiting threads count as well.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from memvir.images.annotation import read_annotation

CARS196_ANNOTATION = Path(__file__).parents[1] / "dataset/cars196/source/annotation.csv"
DIM = 512
SEARCH_ALONE, EVALUATE, PML = "faiss search alone", "memvir.retrieval.evaluate", "pytorch-metric-learning"
SHARED_METRICS = {"recall_at_1": "precision_at_1", "rp": "r_precision", "map": "mean_average_precision_at_r"}

Measurement = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", action="store_true", help="also 60,502 images, for minutes (one round)")
    parser.add_argument("--skip-pml", action="store_true", help="leave pytorch-metric-learning out")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each side")
    parser.add_argument("--measure", nargs=2, metavar=("SIDE", "SIZE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        side, size = arguments.measure
        print(json.dumps(measure(SIDES[side], class_sizes(size))))
        return
    sides = [side for side in SIDES if side != PML or not arguments.skip_pml]
    print(f"{arguments.threads} thread(s); best of {arguments.rounds} rounds, of 1 for the large set.\n")
    print("| images, classes | | seconds | / search alone | CPU seconds | / search alone | peak memory, MiB |")
    print("|---|---|--:|--:|--:|--:|--:|")
    for size in ("cars196", "sop") if arguments.large else ("cars196",):
        rounds = [
            {side: in_a_process(side, size, arguments.threads) for side in sides}
            for _ in range(arguments.rounds if size == "cars196" else 1)
        ]
        best = {side: best_of([done[side] for done in rounds]) for side in sides}
        if PML in best:
            check_agreement(best[EVALUATE]["metrics"], best[PML]["metrics"])
        print("\n".join(table_rows(class_sizes(size), best)), flush=True)


def best_of(results: list[Measurement]) -> Measurement:
    least = {name: min(result[name] for result in results) for name in ("seconds", "cpu_seconds", "peak_mib")}
    return least | {"metrics": results[0]["metrics"]}


def table_rows(sizes: np.ndarray, best: dict[str, Measurement]) -> list[str]:
    return [
        f"| {sizes.sum():,}, {len(sizes):,} | {side} "
        f"| {result['seconds']:.3f} | {result['seconds'] / best[SEARCH_ALONE]['seconds']:.2f} "
        f"| {result['cpu_seconds']:.3f} | {result['cpu_seconds'] / best[SEARCH_ALONE]['cpu_seconds']:.2f} "
        f"| {result['peak_mib']:,.0f} |"
        for side, result in best.items()
    ]


def check_agreement(ours: dict[str, float], theirs: dict[str, float]) -> None:
    """Two that do not compute the same are not worth comparing."""
    for name, their_name in SHARED_METRICS.items():
        assert abs(ours[name] - theirs[their_name]) < 1e-4, (name, ours[name], theirs[their_name])


def in_a_process(side: str, size: str, threads: int) -> Measurement:
    variables = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.retrieval", "--measure", side, size],
        env=os.environ | {variable: str(threads) for variable in variables},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    return json.loads(result.stdout)


def measure(side: Callable[[np.ndarray, np.ndarray], dict[str, float]], sizes: np.ndarray) -> Measurement:
    embeddings, labels = embeddings_of(sizes)
    side(embeddings[:500].copy(), np.arange(500) % 50)  # whatever is imported or allocated once
    start, cpu_start = time.perf_counter(), time.process_time()
    metrics = side(embeddings, labels)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "metrics": metrics,
        "peak_mib": peak / (1 << 20 if sys.platform == "darwin" else 1 << 10),
    }


def class_sizes(size: str) -> np.ndarray:
    """Images of each test class: CARS196's own, or as many classes and images as SOP's."""
    if size == "cars196":
        return np.array([len(c.images) for c in read_annotation(CARS196_ANNOTATION) if c.split == "test"])
    sizes = np.full(11_316, 2)
    extra = np.random.default_rng(0).permutation(np.repeat(np.arange(11_316), 10))[: 60_502 - sizes.sum()]
    return sizes + np.bincount(extra, minlength=len(sizes))


def embeddings_of(sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Noise around one point per class, so that the metrics are neither 0 nor 1; unit length; in random order."""
    random = np.random.default_rng(0)
    labels = random.permutation(np.repeat(np.arange(len(sizes)), sizes))
    embeddings = random.standard_normal((len(labels), DIM), np.float32)
    embeddings += 0.4 * random.standard_normal((len(sizes), DIM), np.float32)[labels]
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    return embeddings, labels


def search_alone(embeddings: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    import faiss

    index = faiss.IndexFlatIP(embeddings.shape[1])
    index.add(embeddings)
    index.search(embeddings, int(np.bincount(labels).max()))  # the query itself and the others of its class
    return {}


def evaluate(embeddings: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    from memvir import retrieval

    return retrieval.evaluate(embeddings, labels)


def pytorch_metric_learning(embeddings: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    import torch
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

    calculator = AccuracyCalculator(
        include=tuple(SHARED_METRICS.values()), k="max_bin_count", device=torch.device("cpu")
    )
    return calculator.get_accuracy(torch.from_numpy(embeddings), torch.from_numpy(labels))


SIDES = {SEARCH_ALONE: search_alone, EVALUATE: evaluate, PML: pytorch_metric_learning}

if __name__ == "__main__":
    main()
