"""Recall@k, R-precision and MAP@R of rankings, and the mutual information of classes and clusters."""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from memvir.errors import UserError
from memvir.extras import require
from memvir.retrieval.arguments import class_numbers, label_array, recall_depths
from memvir.retrieval.neighbours import Neighbours, chunk_size
from memvir.retrieval.search import cluster

if TYPE_CHECKING:
    import torch

    from memvir.retrieval.arguments import Array

log = logging.getLogger("memvir")


def evaluate(
    embeddings: "Array",
    labels: "Array",
    recall_at: "Iterable[int] | int" = (1, 2, 4, 8),
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
        labels: (G,) their classes, as any values in any order, equal where Python calls them equal.
        recall_at: the k of each Recall@k, or the only k.
        query, query_labels: (Q, D) and (Q,), images that are not in the gallery.
        nmi: also cluster `embeddings` by k-means, as many clusters as classes, always from the same seed, and give
            the normalised mutual information of clusters and classes.
        device: faiss searches on this GPU; default: where `embeddings` is. Where it cannot, it says so, and torch
            searches there, or faiss on the CPU.

    Raises:
        UserError: shapes that do not fit, embeddings that are not finite numbers, labels that are missing, k beyond the
            gallery, nothing to find.
    """
    depths = recall_depths(recall_at)
    neighbours = Neighbours.of(embeddings, query, device)
    gallery_classes, query_classes, relevant = _classes(neighbours, labels, query_labels)
    if depths and max(depths) > neighbours.available:
        raise UserError(
            f"recall_at: {max(depths)} is more than the {neighbours.available} gallery images that a query is "
            "compared with; use a smaller k"
        )
    scores = _score(neighbours, gallery_classes, query_classes, relevant, max(depths, default=1))
    counted = relevant > 0
    if not counted.all():
        log.warning(
            "%d of %d queries have no other image of their class in the gallery; the metrics are averages over the "
            "remaining %d",
            len(counted) - counted.sum(),
            len(counted),
            counted.sum(),
        )
    metrics = {f"recall_at_{k}": float(np.mean(scores.first_hit[counted] <= k)) for k in depths}
    metrics["rp"] = float(np.mean(scores.precision[counted]))
    metrics["map"] = float(np.mean(scores.average_precision[counted]))
    if nmi:
        require("experiment", "sklearn")
        from sklearn.metrics import normalized_mutual_info_score  # takes a second to import

        clusters = cluster(neighbours.gallery, len(np.unique(gallery_classes)), neighbours.gpu)
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
    neighbours = Neighbours.of(embeddings, query, device)
    return _score(neighbours, *_classes(neighbours, labels, query_labels), 1).average_precision


@dataclass(frozen=True)
class _Scores:
    """What a query's ranking is worth, for each of Q queries; NaN where the gallery holds nothing to find."""

    first_hit: np.ndarray  # rank of the nearest image of its class, from 1; inf if beyond the neighbours looked at
    precision: np.ndarray  # among the R nearest
    average_precision: np.ndarray


def _classes(
    neighbours: Neighbours, labels: "Array", query_labels: "Array | None"
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Classes of the gallery (G,) and of the queries (Q,), counted from 0, and each query's R."""
    if neighbours.is_gallery != (query_labels is None):
        raise UserError("query and query_labels belong together: give both or neither")
    gallery_labels = label_array(labels, len(neighbours.gallery), "labels", "embeddings")
    numbers: dict[Any, int] = {}
    gallery_classes = query_classes = class_numbers(gallery_labels, numbers, "labels")
    if query_labels is not None:
        query_labels = label_array(query_labels, len(neighbours.query), "query_labels", "query embeddings")
        query_classes = class_numbers(query_labels, numbers, "query_labels")
    relevant = np.bincount(gallery_classes, minlength=len(numbers))[query_classes] - neighbours.is_gallery
    if not relevant.any():
        raise UserError("no query has another image of its class in the gallery, so there is nothing to find")
    return gallery_classes, query_classes, relevant


def _score(
    neighbours: Neighbours,
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
        yield order[start : start + chunk_size(k)], k
        start += chunk_size(k)
