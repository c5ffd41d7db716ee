"""Nearest neighbours by faiss, and the metrics that rank them: Recall@k, R-precision and MAP@R.

Every image is a query against all others, or, with a gallery of its own, every query image against the gallery.
Similarity is the inner product of L2-normalised embeddings; of equally similar images the one with the lower index
comes first. A query is left out of its own neighbours by its index, wherever it ranks: among exact duplicates it need
not rank first. Symbols: Q queries, G gallery images, D dimensions, R images of a query's class to find in the gallery.
"""

from memvir.retrieval.arguments import unit_length
from memvir.retrieval.metrics import average_precision, evaluate
from memvir.retrieval.neighbours import nearest_neighbours

__all__ = ["average_precision", "evaluate", "nearest_neighbours", "unit_length"]
