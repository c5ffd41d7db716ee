"""How an embedding uses its space: measures beside retrieval, which tell of classes that training has seen or not."""

import numpy as np


def embedding_space(embeddings: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Measures of embeddings (n, D) of classes `labels` (n,), after L2 normalisation, to six decimals.

    `intra_class_distance`: mean Euclidean distance of two images of a class, averaged over classes that have two.
    `inter_class_distance`: mean distance of the centres of two classes. `distance_ratio`: the first by the second.
    `spectral_decay`: the Kullback-Leibler divergence of the uniform distribution over D from the singular values of the
    embeddings, divided by their sum; 0 where all directions are used alike (Roth et al., "Revisiting Training
    Strategies and Generalization Performance in Deep Metric Learning", ICML 2020).
    """
    embeddings = embeddings.astype(np.float64)
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True).clip(1e-12)
    classes, of_class = np.unique(labels, return_inverse=True)
    members = np.split(np.argsort(of_class, kind="stable"), np.bincount(of_class).cumsum()[:-1])
    within = [_mean_distance(embeddings[rows]) for rows in members if len(rows) > 1]
    centres = np.stack([embeddings[rows].mean(0) for rows in members])
    intra = float(np.mean(within)) if within else float("nan")
    inter = _mean_distance(centres) if len(classes) > 1 else float("nan")
    values = {
        "intra_class_distance": intra,
        "inter_class_distance": inter,
        "distance_ratio": intra / inter if inter else float("nan"),
        "spectral_decay": _spectral_decay(embeddings),
    }
    return {name: round(value, 6) for name, value in values.items()}


def _mean_distance(points: np.ndarray) -> float:
    """Of the pairs of different rows of (n, D); a block of rows at a time, so that many need little memory."""
    squares = (points**2).sum(1)
    total = 0.0
    for start in range(0, len(points), 1024):
        block = slice(start, start + 1024)
        squared = squares[block, None] + squares - 2 * points[block] @ points.T
        own = np.arange(len(points))[block]
        squared[own - start, own] = 0  # rounding would leave a small distance from itself
        total += np.sqrt(squared.clip(0)).sum()
    return float(total / (len(points) * (len(points) - 1)))


def _spectral_decay(embeddings: np.ndarray) -> float:
    spectrum = np.linalg.svd(embeddings, compute_uv=False)
    share = spectrum / spectrum.sum()
    return float(-np.log(share.clip(1e-12) * len(share)).mean())
