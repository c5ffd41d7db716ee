"""Whether the search on the GPU gives the CPU's metrics, and what it saves."""

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from benchmarks.gpu_check.machine import choose
from memvir import evaluate
from memvir.retrieval.arguments import unit_length
from memvir.retrieval.search import search_on, torch_on_gpu

SIZES = {"8,131 x 512 (CARS196)": (8131, 98, 512), "60,502 x 512 (SOP)": (60502, 11316, 512)}
SMALL = {"2,000 x 64": (2000, 98, 64)}


def check(device: str) -> Iterator[dict[str, Any]]:
    target = choose(device)
    rows = []
    cases = {name: clustered(*size) for name, size in (SIZES if target.type == "cuda" else SMALL).items()}
    cases["with every image twice"] = tuple(np.concatenate([part, part]) for part in clustered(800, 20, 32))
    cases["one class of 2,600 (k above faiss's 2,048 on a GPU)"] = clustered(2600, 1, 16)[0], np.arange(2600) // 2590
    for name, (embeddings, labels) in cases.items():
        seconds, metrics = {}, {}
        for place in ("cpu", target):
            start = time.perf_counter()
            metrics[str(place)] = evaluate(embeddings, labels, device=place)
            seconds[str(place)] = time.perf_counter() - start
        ours, theirs = metrics[str(target)], metrics["cpu"]
        difference = max(abs(ours[key] - theirs[key]) for key in theirs)
        assert difference < 1e-4, f"{name}: metrics differ by {difference}: {ours}, {theirs}"
        times = {f"seconds, {place}": f"{taken:.2f}" for place, taken in seconds.items()}
        rows.append({"embeddings": name, **times, "largest difference": f"{difference:.1e}"})
        yield {"Recall@k, RP and MAP": rows}
    large = next(iter(reversed(SIZES))) if target.type == "cuda" else next(iter(SMALL))
    yield in_place_of_faiss(cases[large][0], target)
    if target.type == "cuda":
        yield short_of_memory(*cases["with every image twice"], target)


def in_place_of_faiss(embeddings: np.ndarray, device: torch.device) -> dict[str, Any]:
    """torch's search, for a GPU that faiss cannot use, against faiss on the CPU."""
    gallery = unit_length(embeddings, "embeddings")
    similarities, indices = search_on(gallery, None)[1](gallery, 9)
    start = time.perf_counter()
    found = torch_on_gpu(gallery, str(device))(gallery, 9)
    seconds = time.perf_counter() - start
    difference = np.abs(found[0] - similarities).max()
    assert difference < 1e-5, f"torch's similarities differ by {difference}"
    same = f"{(found[1] == indices).mean():.4%}"
    return {"torch in place of faiss": f"of 9 neighbours {same} are the same, in {seconds:.2f} s"}


def short_of_memory(embeddings: np.ndarray, labels: np.ndarray, device: torch.device) -> dict[str, Any]:
    """The metrics while torch holds all of the GPU but 256 MiB: the CPU's, and no process dies."""
    expected = evaluate(embeddings, labels, device="cpu")
    held = torch.empty(torch.cuda.mem_get_info(device)[0] - (256 << 20), dtype=torch.uint8, device=device)
    found = evaluate(embeddings, labels, device=device)
    del held
    assert found == expected, f"short of memory the metrics are {found}, not {expected}"
    return {"with 256 MiB of the GPU free": "the same, by search elsewhere"}


def clustered(count: int, classes: int, dim: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    labels = np.arange(count) % classes
    embeddings = random.normal(size=(classes, dim))[labels] + 2 * random.normal(size=(count, dim))
    return embeddings.astype(np.float32), labels
