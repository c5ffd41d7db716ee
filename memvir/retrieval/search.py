"""faiss on the CPU or on one GPU; where it cannot, one line says so, and torch or the CPU gives the same answer.

Where faiss is not installed torch searches, without a line.
"""

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from memvir.errors import UserError

try:
    import faiss
except ImportError:  # as where only what a GPU needs is installed: torch finds the same
    faiss = None  # type: ignore[assignment]

if TYPE_CHECKING:
    import torch

    Search = Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]

log = logging.getLogger("memvir")

GPU_MOST_NEIGHBOURS = 2048  # faiss's limit on a GPU
GPU_TEMPORARY_BYTES = 128 << 20  # faiss reserves 1.5 GB unless told, beside a training process (faiss issue 2155)
GPU_SPARE_BYTES = 1 << 30  # cuBLAS, the context and faiss's tiles; faiss aborts the process where cuBLAS finds no room
TORCH_SIMILARITIES = 1 << 26  # held at once: 256 MB
KMEANS_ITERATIONS = 20
KMEANS_SEED = 1234


class NoRoom(Exception):
    """The GPU's memory is taken."""


def search_on(gallery: np.ndarray, gpu: int | None) -> "tuple[int | None, Search]":
    """The GPU that faiss uses after all, and a function of queries (Q, D) and k: similarities and indices (Q, k).

    Where faiss cannot use the GPU, torch searches there; where it cannot either, faiss on the CPU.
    """

    def on_cpu(queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        if faiss is None:
            return torch_on_gpu(gallery, "cpu")(queries, k)
        return faiss.knn(queries, gallery, k, metric=faiss.METRIC_INNER_PRODUCT)  # reads the gallery where it lies

    if gpu is None:
        return None, on_cpu
    untried = [("faiss", faiss_on_gpu)] if faiss is not None else []
    untried += [("torch", torch_on_gpu)] if _torch_sees(gpu) else []
    library = ""

    def next_search() -> "Search":
        nonlocal library
        while untried:
            library, search = untried.pop(0)
            try:
                return search(gallery, gpu)
            except Exception as error:  # whatever an absent or busy GPU raises: the next gives the same answer
                if isinstance(error, NoRoom):
                    untried.clear()
                say_instead(error)
        library = ""
        return on_cpu

    def say_instead(error: Exception) -> None:
        then = f"{untried[0][0]} searches there" if untried else "it searches on the CPU"
        _say_instead(library, gpu, error, then)

    current = next_search()

    def on_gpu(queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        nonlocal current
        while current is not on_cpu and k <= GPU_MOST_NEIGHBOURS:
            try:
                return current(queries, k)
            except Exception as error:
                current = on_cpu  # the GPU is free of the gallery before another way is tried there
                say_instead(error)
                current = next_search()
        return on_cpu(queries, k)

    return (gpu if library == "faiss" else None), on_gpu


def faiss_on_gpu(gallery: np.ndarray, gpu: int) -> "Search":
    index = _gpu_index(gallery.shape[1], gpu, faiss.METRIC_INNER_PRODUCT, len(gallery))
    index.add(gallery)
    return index.search


def torch_on_gpu(gallery: np.ndarray, gpu: "int | str") -> "Search":
    """The same by one matrix product for some queries at a time, in full float32. `gpu` may be any device of torch."""
    import torch

    tensor = torch.from_numpy(gallery).to(gpu)

    def search(queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        found = []
        matmul = torch.backends.cuda.matmul
        setting, full = ("fp32_precision", "ieee") if hasattr(matmul, "fp32_precision") else ("allow_tf32", False)
        before = getattr(matmul, setting)
        setattr(matmul, setting, full)
        try:
            with torch.autocast(tensor.device.type, enabled=False):
                for part in torch.from_numpy(queries).to(gpu).split(max(1, TORCH_SIMILARITIES // len(gallery))):
                    values, indices = (part @ tensor.T).topk(k)
                    found.append((values.cpu().numpy(), indices.cpu().numpy()))
        finally:
            setattr(matmul, setting, before)
        similarities, indices = zip(*found, strict=True)
        return np.concatenate(similarities), np.concatenate(indices)

    return search


def cluster(gallery: np.ndarray, num_clusters: int, gpu: int | None) -> np.ndarray:
    """(G,) the k-means cluster of each image. Raises UserError if there is no faiss."""
    if faiss is None:
        raise UserError("nmi: the clusters are faiss's, which is not installed; pip install faiss-cpu")

    def cluster_with(index: Any) -> np.ndarray:
        clustering = faiss.Clustering(gallery.shape[1], num_clusters)
        clustering.niter, clustering.seed = KMEANS_ITERATIONS, KMEANS_SEED
        clustering.min_points_per_centroid, clustering.max_points_per_centroid = 1, len(gallery)
        clustering.train(gallery, index)  # leaves the centroids in the index
        return index.search(gallery, 1)[1][:, 0]

    if gpu is not None:
        try:
            return cluster_with(_gpu_index(gallery.shape[1], gpu, faiss.METRIC_L2, num_clusters))
        except Exception as error:
            _say_instead("faiss", gpu, error, "it clusters on the CPU")
    return cluster_with(faiss.IndexFlatL2(gallery.shape[1]))


def _gpu_index(dim: int, gpu: int, metric: int, vectors: int) -> Any:
    """An empty faiss index on that GPU and no other; the exception says why there can be none."""
    import torch

    if gpu >= faiss.get_num_gpus():
        raise RuntimeError(f"faiss {faiss.__version__} sees {faiss.get_num_gpus()} GPUs")
    needed = vectors * dim * 4 + GPU_TEMPORARY_BYTES + GPU_SPARE_BYTES
    if torch.cuda.mem_get_info(gpu)[0] < needed:
        torch.cuda.empty_cache()  # what torch keeps from finished batches
        free = torch.cuda.mem_get_info(gpu)[0]
        if free < needed:
            raise NoRoom(f"{free >> 20} MiB of its memory are free, {needed >> 20} are needed")
    resources = faiss.StandardGpuResources()
    resources.setTempMemory(GPU_TEMPORARY_BYTES)
    resources.setPinnedMemory(0)  # serves searches paged from host memory; a chunk of queries is small
    config = faiss.GpuIndexFlatConfig()
    config.device = gpu
    return faiss.GpuIndexFlat(resources, dim, metric, config)


def _say_instead(library: str, gpu: int, error: Exception, then: str) -> None:
    reason = str(error).strip().splitlines() or [type(error).__name__]
    log.warning("%s cannot use GPU %d (%s); %s instead", library, gpu, reason[-1].strip(), then)


def _torch_sees(gpu: int) -> bool:
    import torch

    return gpu < torch.cuda.device_count()


def gpu_number(device: "torch.device | str | int") -> int | None:
    """The number of the GPU that `device` names; None is the CPU."""
    import torch

    try:
        device = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise UserError(f"device: torch knows no {device!r}; use 'cpu' or 'cuda:0'") from error
    if device.type != "cuda":
        return None
    if device.index is None:
        return torch.cuda.current_device() if torch.cuda.is_available() else 0
    return device.index
