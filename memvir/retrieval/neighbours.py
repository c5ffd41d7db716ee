"""Which images are nearest to a query, exactly, and in an order that does not depend on chunks, k or device."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from memvir.errors import UserError
from memvir.retrieval.arguments import unit_length, whole_number
from memvir.retrieval.search import GPU_MOST_NEIGHBOURS, gpu_number, search_on

if TYPE_CHECKING:
    import torch

    from memvir.retrieval.arguments import Array
    from memvir.retrieval.search import Search

CHUNK_QUERIES = 4096  # as many as faiss multiplies at a time: more gain nothing, fewer read the gallery more often
CHUNK_NEIGHBOURS = 1 << 22  # queries x neighbours held at once; with faiss's own buffers about 80 bytes each
SPARE = 8  # neighbours fetched beyond those asked for
ROUNDING = 2 * np.finfo(np.float32).eps  # times the root of D: how far a float32 sum of D products may be off
DEEP_SHARE = 16  # beyond this part of the gallery, sorting all of it beat faiss, 3,000 to 60,000 images alike


def nearest_neighbours(
    embeddings: "Array", k: int, *, query: "Array | None" = None, device: "torch.device | str | None" = None
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest images of each query, nearest first: similarities (Q, k) and indices into `embeddings` (Q, k).

    Without a `query` every image is one, and not its own neighbour. Similarities are summed in float64 and rounded to
    float32; those that are equal then are in the order of the images.
    """
    neighbours = Neighbours.of(embeddings, query, device)
    k = whole_number(k, "k")
    if k > neighbours.available:
        raise UserError(f"{k} neighbours asked for; there are from 1 to {neighbours.available} for a query")
    similarities = np.empty((len(neighbours.query), k), np.float32)
    indices = np.empty((len(neighbours.query), k), np.int64)
    size = chunk_size(k)
    for start in range(0, len(neighbours.query), size):
        rows = np.arange(start, min(start + size, len(neighbours.query)))
        _, indices[rows] = neighbours.nearest(rows, k)
        similarities[rows] = neighbours.similarities(rows, indices[rows])
    return similarities, indices


def chunk_size(k: int) -> int:
    return max(1, min(CHUNK_QUERIES, CHUNK_NEIGHBOURS // k))


@dataclass(frozen=True)
class Neighbours:
    """Which gallery images are nearest to a query, exactly, the query itself left out."""

    gallery: np.ndarray  # (G, D) float32 of length 1
    query: np.ndarray  # (Q, D) likewise
    is_gallery: bool  # the queries are the gallery images
    gpu: int | None
    search: "Search"

    @classmethod
    def of(cls, gallery: "Array", query: "Array | None", device: "torch.device | str | None") -> "Neighbours":
        if device is None and hasattr(gallery, "detach"):
            device = gallery.device  # type: ignore[union-attr]
        gpu = None if device is None else gpu_number(device)
        gallery = unit_length(gallery, "embeddings")
        queries = gallery if query is None else unit_length(query, "query embeddings")
        if gallery.shape[1] != queries.shape[1]:
            raise UserError(
                f"query embeddings have {queries.shape[1]} dimensions, those of the gallery {gallery.shape[1]}; "
                "both must come from one model"
            )
        return cls(gallery, queries, query is None, *search_on(gallery, gpu))

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

        How a float32 sum is rounded depends on k, chunk, device and on where an image stands, so what is almost equally
        similar is compared anew, in float64.
        """
        if self._is_deep(k):
            return self._rank_all(rows, k)
        fetched = min(k + SPARE, len(self.gallery))  # to see whether the last place is in doubt
        similarities, indices = self.search(self.query[rows], fetched)
        close = similarities[:, :-1] - similarities[:, 1:] <= ROUNDING * np.sqrt(self.gallery.shape[1])
        with_doubts = np.flatnonzero(close.any(axis=1))
        if len(with_doubts):
            doubtful = np.zeros((len(with_doubts), fetched), bool)
            doubtful[:, 1:] = close[with_doubts]
            doubtful[:, :-1] |= close[with_doubts]
            found = np.where(
                doubtful,
                self.similarities(rows[with_doubts], indices[with_doubts], doubtful),
                similarities[with_doubts],
            )
            similarities[with_doubts], indices[with_doubts] = _unpack(
                np.sort(_packed(found, indices[with_doubts]), axis=1)
            )
        similarities, indices = similarities[:, :k], indices[:, :k]
        if fetched < len(self.gallery):
            undecided = np.flatnonzero(close[:, k - 1 :].all(axis=1))
            if len(undecided):
                similarities[undecided], indices[undecided] = self._rank_all(rows[undecided], k)
        return similarities, indices

    def similarities(self, rows: np.ndarray, indices: np.ndarray, which: np.ndarray | None = None) -> np.ndarray:
        """(rows, k) float32 similarities of queries and images, summed in float64; where `which` is False, zero."""
        exact = np.zeros(indices.shape, np.float32)
        row, place = np.nonzero(np.ones(indices.shape, bool) if which is None else which)
        size = max(1, CHUNK_NEIGHBOURS // self.gallery.shape[1])
        for start in range(0, len(row), size):
            i, j = row[start : start + size], place[start : start + size]
            queries, images = self.query[rows[i]].astype(np.float64), self.gallery[indices[i, j]].astype(np.float64)
            exact[i, j] = np.einsum("nd,nd->n", queries, images)
        return exact

    def _is_deep(self, k: int) -> bool:
        """Whether so much of the gallery is asked for that sorting all of it is faster than faiss's heaps."""
        return k > len(self.gallery) // DEEP_SHARE and (self.gpu is None or k + 1 > GPU_MOST_NEIGHBOURS)

    def _rank_all(self, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """As `_rank`, from the similarities to the whole gallery, summed in float64."""
        packed = np.empty((len(rows), k), np.int64)
        size = max(1, CHUNK_NEIGHBOURS // len(self.gallery))
        gallery = self.gallery.astype(np.float64).T
        for start in range(0, len(rows), size):
            similarities = self.query[rows[start : start + size]].astype(np.float64) @ gallery  # (size, G)
            everything = _packed(similarities.astype(np.float32), np.arange(len(self.gallery)))
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
