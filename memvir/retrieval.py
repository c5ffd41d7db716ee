"""Nearest neighbours by faiss, and the metrics that rank them: Recall@k, R-precision and MAP@R.

Every image is a query against all others, or, with a gallery of its own, every query image against the gallery.
Similarity is the inner product of L2-normalised embeddings; of equally similar images the one with the lower index
comes first. A query is left out of its own neighbours by its index, wherever it ranks: among exact duplicates it need
not rank first. Symbols: Q queries, G gallery images, D dimensions, R images of a query's class to find in the gallery.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import faiss
import numpy as np

from memvir.errors import UserError

if TYPE_CHECKING:
    import torch

    Array = np.ndarray | torch.Tensor | Sequence[Any]
    Search = Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]

logger = logging.getLogger("memvir")

CHUNK_QUERIES = 4096  # as many as faiss multiplies at a time: more gain nothing, fewer read the gallery more often
CHUNK_NEIGHBOURS = 1 << 22  # queries x neighbours held at once; with faiss's own buffers about 80 bytes each
DEEP_SHARE = 16  # beyond this part of the gallery, sorting all of it beat faiss, 3,000 to 60,000 images alike
GPU_MOST_NEIGHBOURS = 2048  # faiss's limit on a GPU
GPU_TEMPORARY_BYTES = 128 << 20  # faiss reserves 1.5 GB unless told, beside a training process (faiss issue 2155)
GPU_SPARE_BYTES = 1 << 30  # cuBLAS, the context and faiss's tiles; faiss aborts the process where cuBLAS finds no room
KMEANS_ITERATIONS = 20
KMEANS_SEED = 1234


def evaluate(
    embeddings: "Array",
    labels: "Array",
    recall_at: Sequence[int] = (1, 2, 4, 8),
    *,
    query: "Array | None" = None,
    query_labels: "Array | None" = None,
    nmi: bool = False,
    device: "torch.device | str | None" = None,
) -> dict[str, float]:
    """Retrieval metrics in [0, 1], averaged over the queries: recall_at_1 ..., rp, map and, if asked for, nmi.

    With R other images of its class, a query's Recall@k says whether any of them is among the k nearest; its
    R-precision is their share of the R nearest; its average precision (MAP@R, https://arxiv.org/abs/2003.08505) is
    1/R times the sum, over the ranks i <= R that hold one, of their share of the i nearest. A query without other
    images of its class has none of these: it is left out of every average, with a warning that counts them.

    Args:
        embeddings: (G, D) the images, or the gallery if there is a `query`; arrays or tensors, of any length.
        labels: (G,) their classes, as any values in any order.
        recall_at: the k of each Recall@k.
        query, query_labels: (Q, D) and (Q,), images that are not in the gallery.
        nmi: also cluster `embeddings` by k-means, as many clusters as classes, always from the same seed, and give
            the normalised mutual information of clusters and classes.
        device: faiss searches on this GPU; default: where `embeddings` is. Without faiss for GPU it says so and uses
            the CPU.

    Raises:
        UserError: shapes that do not fit, embeddings that are not finite, k beyond the gallery, nothing to find.
    """
    for k in recall_at:
        if k != int(k) or k < 1:
            raise UserError(f"recall_at: {k} is not a number of neighbours; use whole numbers from 1")
    neighbours = _Neighbours.of(embeddings, query, device)
    gallery_classes, query_classes, relevant = _classes(neighbours, labels, query_labels)
    if recall_at and max(recall_at) > neighbours.available:
        raise UserError(
            f"recall_at: {max(recall_at)} is more than the {neighbours.available} gallery images that a query is "
            "compared with; use a smaller k"
        )
    scores = _score(neighbours, gallery_classes, query_classes, relevant, max(recall_at, default=1))
    counted = relevant > 0
    if not counted.all():
        logger.warning(
            "%d of %d queries have no other image of their class in the gallery; the metrics are averages over the "
            "remaining %d",
            len(counted) - counted.sum(),
            len(counted),
            counted.sum(),
        )
    metrics = {f"recall_at_{k}": float(np.mean(scores.first_hit[counted] <= k)) for k in recall_at}
    metrics["rp"] = float(np.mean(scores.precision[counted]))
    metrics["map"] = float(np.mean(scores.average_precision[counted]))
    if nmi:
        from sklearn.metrics import normalized_mutual_info_score  # takes a second to import

        clusters = _cluster(neighbours.gallery, len(np.unique(gallery_classes)), neighbours.gpu)
        metrics["nmi"] = float(np.clip(normalized_mutual_info_score(gallery_classes, clusters), 0, 1))
    return metrics


def average_precision(
    embeddings: "Array",
    labels: "Array",
    *,
    query: "Array | None" = None,
    query_labels: "Array | None" = None,
    device: "torch.device | str | None" = None,
) -> np.ndarray:
    """(Q,) the average precision of each query, whose mean is evaluate's `map`; NaN for those it leaves out."""
    neighbours = _Neighbours.of(embeddings, query, device)
    return _score(neighbours, *_classes(neighbours, labels, query_labels), 1).average_precision


def nearest_neighbours(
    embeddings: "Array", k: int, *, query: "Array | None" = None, device: "torch.device | str | None" = None
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest images of each query, nearest first: similarities (Q, k) and indices into `embeddings` (Q, k).

    Without a `query` every image is one, and not its own neighbour.
    """
    neighbours = _Neighbours.of(embeddings, query, device)
    if not 1 <= k <= neighbours.available:
        raise UserError(f"{k} neighbours asked for; there are from 1 to {neighbours.available} for a query")
    similarities = np.empty((len(neighbours.query), k), np.float32)
    indices = np.empty((len(neighbours.query), k), np.int64)
    size = _chunk_size(k)
    for start in range(0, len(neighbours.query), size):
        rows = np.arange(start, min(start + size, len(neighbours.query)))
        similarities[rows], indices[rows] = neighbours.nearest(rows, k)
    return similarities, indices


# ---------------------------------------------------------------------------------------------------------- metrics


@dataclass(frozen=True)
class _Scores:
    """What a query's ranking is worth, for each of Q queries; NaN where the gallery holds nothing to find."""

    first_hit: np.ndarray  # rank of the nearest image of its class, from 1; inf if beyond the neighbours looked at
    precision: np.ndarray  # among the R nearest
    average_precision: np.ndarray


def _classes(
    neighbours: "_Neighbours", labels: "Array", query_labels: "Array | None"
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Classes of the gallery (G,) and of the queries (Q,), counted from 0, and each query's R."""
    if neighbours.is_gallery != (query_labels is None):
        raise UserError("query and query_labels belong together: give both or neither")
    gallery_labels = _label_array(labels, len(neighbours.gallery), "labels", "embeddings")
    if query_labels is None:
        classes = gallery_classes = query_classes = np.unique(gallery_labels, return_inverse=True)[1]
    else:
        both = [gallery_labels, _label_array(query_labels, len(neighbours.query), "query_labels", "query embeddings")]
        classes = np.unique(np.concatenate(both), return_inverse=True)[1]
        gallery_classes, query_classes = np.split(classes, [len(gallery_labels)])
    relevant = np.bincount(gallery_classes, minlength=classes.max() + 1)[query_classes] - neighbours.is_gallery
    if not relevant.any():
        raise UserError("no query has another image of its class in the gallery, so there is nothing to find")
    return gallery_classes, query_classes, relevant


def _score(
    neighbours: "_Neighbours",
    gallery_classes: np.ndarray,
    query_classes: np.ndarray,
    relevant: np.ndarray,
    recall_depth: int,
) -> _Scores:
    """Rank the gallery for every query as deep as the query needs: its own R, but at least `recall_depth`."""
    scores = _Scores(*(np.full(len(relevant), np.nan) for _ in range(3)))
    for rows, k in _chunks(relevant, recall_depth):
        _, indices = neighbours.nearest(rows, k)
        hits = gallery_classes[indices] == query_classes[rows, None]  # (chunk, k)
        scores.first_hit[rows] = np.where(hits.any(axis=1), hits.argmax(axis=1) + 1, np.inf)
        depth = relevant[rows].max()
        ranks = np.arange(1, depth + 1)
        hits = hits[:, :depth] & (ranks <= relevant[rows, None])
        scores.precision[rows] = hits.sum(axis=1) / relevant[rows]
        precision_at_rank = np.cumsum(hits, axis=1, dtype=np.float64)
        precision_at_rank /= ranks
        precision_at_rank *= hits
        scores.average_precision[rows] = precision_at_rank.sum(axis=1) / relevant[rows]
    return scores


def _chunks(relevant: np.ndarray, recall_depth: int) -> Iterator[tuple[np.ndarray, int]]:
    """Queries with something to find, those with the largest classes first, and the neighbours that a chunk needs.

    So one class of thousands of images does not make all queries fetch thousands of neighbours.
    """
    order = np.argsort(-relevant, kind="stable")[: np.count_nonzero(relevant)]
    start = 0
    while start < len(order):
        k = max(int(relevant[order[start]]), recall_depth)
        yield order[start : start + _chunk_size(k)], k
        start += _chunk_size(k)


def _chunk_size(k: int) -> int:
    return max(1, min(CHUNK_QUERIES, CHUNK_NEIGHBOURS // k))


def _cluster(gallery: np.ndarray, num_clusters: int, gpu: int | None) -> np.ndarray:
    """(G,) the k-means cluster of each image."""

    def cluster(index: Any) -> np.ndarray:
        clustering = faiss.Clustering(gallery.shape[1], num_clusters)
        clustering.niter, clustering.seed = KMEANS_ITERATIONS, KMEANS_SEED
        clustering.min_points_per_centroid, clustering.max_points_per_centroid = 1, len(gallery)
        clustering.train(gallery, index)  # leaves the centroids in the index
        return index.search(gallery, 1)[1][:, 0]

    if gpu is not None:
        try:
            return cluster(_gpu_index(gallery.shape[1], gpu, faiss.METRIC_L2, num_clusters))
        except Exception as error:
            _say_cpu_instead(gpu, error)
    return cluster(faiss.IndexFlatL2(gallery.shape[1]))


# ------------------------------------------------------------------------------------------------------- neighbours


@dataclass(frozen=True)
class _Neighbours:
    """Which gallery images are nearest to a query, exactly, the query itself left out."""

    gallery: np.ndarray  # (G, D) float32 of length 1
    query: np.ndarray  # (Q, D) likewise
    is_gallery: bool  # the queries are the gallery images
    gpu: int | None
    search: "Search"

    @classmethod
    def of(cls, gallery: "Array", query: "Array | None", device: "torch.device | str | None") -> "_Neighbours":
        gpu = _gpu_number(gallery if device is None else None, device)
        gallery = _unit_length(gallery, "embeddings")
        queries = gallery if query is None else _unit_length(query, "query embeddings")
        if gallery.shape[1] != queries.shape[1]:
            raise UserError(
                f"query embeddings have {queries.shape[1]} dimensions, those of the gallery {gallery.shape[1]}; "
                "both must come from one model"
            )
        return cls(gallery, queries, query is None, *_search_on(gallery, gpu))

    @property
    def available(self) -> int:
        """How many images a query is compared with."""
        return len(self.gallery) - self.is_gallery

    def nearest(self, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Similarities and indices, (rows, k) each, of the queries numbered `rows`, nearest first."""
        if not self.is_gallery:
            return self._rank(rows, k)
        similarities, indices = self._rank(rows, k + 1)
        is_self = indices == rows[:, None]
        # Where so many duplicates tie with the query that it is not among them, the last is one too many.
        own_place = np.where(is_self.any(axis=1), is_self.argmax(axis=1), k)
        others = np.arange(k)
        others = others + (others >= own_place[:, None])  # (rows, k)
        return np.take_along_axis(similarities, others, axis=1), np.take_along_axis(indices, others, axis=1)

    def _rank(self, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """As `nearest`, the queries not left out; equally similar images by index.

        Which of them faiss keeps, and in what order, depends on k and on the device, so rows with ties are gone over.
        """
        if self._is_deep(k):
            return self._rank_all(rows, k)
        fetched = min(k + 1, len(self.gallery))  # one more, to see whether the last place is tied
        similarities, indices = self.search(self.query[rows], fetched)
        tied = similarities[:, 1:] == similarities[:, :-1]
        with_ties = np.flatnonzero(tied.any(axis=1))
        if len(with_ties):
            similarities[with_ties], indices[with_ties] = _unpack(
                np.sort(_packed(similarities[with_ties], indices[with_ties]), axis=1)
            )
        similarities, indices = similarities[:, :k], indices[:, :k]
        if fetched > k:
            undecided = np.flatnonzero(tied[:, k - 1])
            if len(undecided):
                similarities[undecided], indices[undecided] = self._rank_all(rows[undecided], k)
        return similarities, indices

    def _is_deep(self, k: int) -> bool:
        """Whether so much of the gallery is asked for that sorting all of it is faster than faiss's heaps."""
        return k > len(self.gallery) // DEEP_SHARE and (self.gpu is None or k + 1 > GPU_MOST_NEIGHBOURS)

    def _rank_all(self, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """As `_rank`, from the similarities to the whole gallery."""
        packed = np.empty((len(rows), k), np.int64)
        size = max(1, CHUNK_NEIGHBOURS // len(self.gallery))
        for start in range(0, len(rows), size):
            queries = self.query[rows[start : start + size]]
            everything = _packed(queries @ self.gallery.T, np.arange(len(self.gallery)))  # (size, G)
            packed[start : start + size] = np.partition(everything, k - 1, axis=1)[:, :k]
        packed.sort(axis=1)
        return _unpack(packed)


def _packed(similarities: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """int64 that sort as (similarity descending, index ascending): one sort of integers, which NumPy vectorises."""
    bits = (similarities + np.float32(0)).view(np.int32)  # adding 0 makes -0 equal to 0
    return (~_in_order(bits)).astype(np.int64) << 32 | indices


def _unpack(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Similarities and indices of `_packed` numbers."""
    return _in_order(~(packed >> 32).astype(np.int32)).view(np.float32), packed & 0xFFFFFFFF


def _in_order(bits: np.ndarray) -> np.ndarray:
    """The bits of float32 numbers as integers that compare as the numbers do; its own inverse."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _search_on(gallery: np.ndarray, gpu: int | None) -> "tuple[int | None, Search]":
    """The GPU that is used after all, and a function of queries (Q, D) and k: similarities and indices (Q, k)."""

    def on_cpu(queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        return faiss.knn(queries, gallery, k, metric=faiss.METRIC_INNER_PRODUCT)  # reads the gallery where it lies

    if gpu is None:
        return None, on_cpu
    try:
        index = _gpu_index(gallery.shape[1], gpu, faiss.METRIC_INNER_PRODUCT, len(gallery))
        index.add(gallery)
    except Exception as error:  # whatever an absent or busy GPU raises: the CPU gives the same answer
        _say_cpu_instead(gpu, error)
        return None, on_cpu

    def on_gpu(queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        nonlocal index
        if index is None or k > GPU_MOST_NEIGHBOURS:
            return on_cpu(queries, k)
        try:
            return index.search(queries, k)
        except Exception as error:
            _say_cpu_instead(gpu, error)
            index = None
            return on_cpu(queries, k)

    return gpu, on_gpu


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
            raise RuntimeError(f"{free >> 20} MiB of its memory are free, {needed >> 20} are needed")
    resources = faiss.StandardGpuResources()
    resources.setTempMemory(GPU_TEMPORARY_BYTES)
    resources.setPinnedMemory(0)  # serves searches paged from host memory; a chunk of queries is small
    config = faiss.GpuIndexFlatConfig()
    config.device = gpu
    return faiss.GpuIndexFlat(resources, dim, metric, config)


def _say_cpu_instead(gpu: int, error: Exception) -> None:
    reason = str(error).strip().splitlines() or [type(error).__name__]
    logger.warning("faiss cannot use GPU %d (%s); it searches on the CPU instead", gpu, reason[-1].strip())


def _gpu_number(embeddings: "Array | None", device: "torch.device | str | None") -> int | None:
    """The number of the GPU that `device` names, or that holds the embeddings; None is the CPU."""
    device = device if embeddings is None else getattr(embeddings, "device", None)
    if device is None or not str(device).startswith("cuda"):
        return None
    import torch

    number = torch.device(device).index
    if number is None:
        number = torch.cuda.current_device() if torch.cuda.is_available() else 0
    return number


# ------------------------------------------------------------------------------------------------------------ input


def _unit_length(embeddings: "Array", what: str) -> np.ndarray:
    """(rows, D) float32 of length 1, the same bytes for the same row; a row of zeros stays one."""
    array = _array(embeddings)
    if array.ndim != 2 or not array.size:
        raise UserError(f"{what} must have the shape (images, dimensions), not {array.shape}")
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


def _label_array(labels: "Array", count: int, what: str, labelled: str) -> np.ndarray:
    array = _array(labels)
    if array.shape != (count,):
        raise UserError(f"{what} must have the shape ({count},), one per row of the {labelled}, not {array.shape}")
    return array


def _array(values: "Array") -> np.ndarray:
    """`values` as an array on the CPU; a tensor is recognised without importing torch."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        if values.is_floating_point() and values.dtype.itemsize < 4:
            values = values.float()  # NumPy has no bfloat16
        values = values.numpy()
    return np.asarray(values)
