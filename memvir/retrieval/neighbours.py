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
DEEP_SHARE = 16  # beyond this part of the gallery, sorting all of it beat faiss, 3,000 to 60,000 images alike


def nearest_neighbours(
    embeddings: "Array", k: int, *, query: "Array | None" = None, device: "torch.device | str | None" = None
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest images of each query, nearest first: similarities (Q, k) and indices into `embeddings` (Q, k).

    Without a `query` every image is one, and not its own neighbour.
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
        similarities[rows], indices[rows] = neighbours.nearest(rows, k)
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
