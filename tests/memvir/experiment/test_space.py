import itertools
import math

import numpy as np
import pytest

from memvir.experiment.space import embedding_space


def naive(embeddings: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    rows = [row / math.sqrt(sum(value**2 for value in row)) for row in embeddings.astype(float)]
    classes = {label: [row for row, own in zip(rows, labels, strict=True) if own == label] for label in labels}
    within = [
        np.mean([math.dist(a, b) for a, b in itertools.combinations(members, 2)])
        for members in classes.values()
        if len(members) > 1
    ]
    centres = [sum(members) / len(members) for members in classes.values()]
    intra = np.mean(within)
    inter = np.mean([math.dist(a, b) for a, b in itertools.combinations(centres, 2)])
    eigenvalues = np.linalg.eigvalsh(np.stack(rows).T @ np.stack(rows))
    singular = [math.sqrt(max(value, 0)) for value in eigenvalues]
    uniform = 1 / len(singular)
    decay = sum(uniform * math.log(uniform / max(value / sum(singular), 1e-12)) for value in singular)
    return {
        "intra_class_distance": intra,
        "inter_class_distance": inter,
        "distance_ratio": intra / inter,
        "spectral_decay": decay,
    }


@pytest.mark.parametrize("seed", range(5))
def test_measures_are_those_of_pairs_written_out(seed):
    random = np.random.default_rng(seed)
    labels = random.permutation(np.repeat(np.arange(7), [1, 2, 3, 4, 5, 6, 7]))
    embeddings = random.normal(size=(28, 5)).astype(np.float32)
    assert embedding_space(embeddings, labels) == pytest.approx(naive(embeddings, labels), abs=2e-6)


def test_directions_used_alike_decay_by_nothing_and_few_by_more():
    alike = np.concatenate([np.eye(4), -np.eye(4)])
    labels = np.array([0, 0, 1, 1, 2, 2, 3, 3])
    assert embedding_space(alike, labels)["spectral_decay"] == 0
    few = np.concatenate([np.eye(4)[:2], -np.eye(4)[:2]] * 2)
    assert embedding_space(few, labels)["spectral_decay"] > 5


def test_a_collapsed_model_has_no_ratio_of_distances():
    space = embedding_space(np.ones((6, 1)), np.arange(6) // 2)
    assert space["intra_class_distance"] == space["inter_class_distance"] == 0 and np.isnan(space["distance_ratio"])


def test_many_images_are_compared_block_by_block():
    embeddings = np.random.default_rng(0).normal(size=(2500, 3))
    labels = np.zeros(2500, int)
    labels[:2] = 1
    pairs = naive(embeddings[2:302], labels[2:302] * 0 + np.arange(300) % 2)
    assert pairs == pytest.approx(embedding_space(embeddings[2:302], np.arange(300) % 2), abs=2e-6)
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    distances = np.linalg.norm(unit[2:, None] - unit[None, 2:], axis=-1)
    expected = (distances.sum() / (2498 * 2497) + np.linalg.norm(unit[0] - unit[1])) / 2
    assert embedding_space(embeddings, labels)["intra_class_distance"] == pytest.approx(expected, abs=2e-6)
