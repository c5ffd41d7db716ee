"""Metrics and neighbours against a naive loop in float64 and against pytorch-metric-learning; ties, input, GPU."""

import logging
import sys

import faiss
import numpy as np
import pandas
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

from memvir.errors import UserError
from memvir.retrieval import average_precision, evaluate, metrics, nearest_neighbours, neighbours, search

by_example = settings(derandomize=True, deadline=None, max_examples=60)
FAISS_ALWAYS, AS_MEASURED = 1, neighbours.DEEP_SHARE
by_faiss_and_by_sorting = pytest.mark.parametrize("deep_share", [FAISS_ALWAYS, AS_MEASURED])


def naive_neighbours(embeddings, query=None):
    """Every query's ranking of the whole gallery, itself left out, equal similarities in the order of the gallery."""
    gallery = np.array([row / np.linalg.norm(row) for row in np.asarray(embeddings, np.float64)])
    queries = gallery if query is None else [row / np.linalg.norm(row) for row in np.asarray(query, np.float64)]
    rankings = []
    for q, embedding in enumerate(queries):
        others = [i for i in range(len(gallery)) if query is not None or i != q]
        # Rounded, so that duplicates tie in float64 as well.
        rankings.append(sorted(others, key=lambda i: (-round(float(embedding @ gallery[i]), 9), i)))
    return rankings


def naive_metrics(embeddings, labels, recall_at, query=None, query_labels=None):
    rows = []
    for q, ranking in enumerate(naive_neighbours(embeddings, query)):
        label = labels[q] if query is None else query_labels[q]
        hits = [labels[i] == label for i in ranking]
        r = sum(hits)
        if r:
            recalls = [float(any(hits[:k])) for k in recall_at]
            precision = sum(hits[:r]) / r
            precisions_at_hits = [sum(hits[: i + 1]) / (i + 1) for i in range(r) if hits[i]]
            rows.append([*recalls, precision, sum(precisions_at_hits) / r])
    names = [*(f"recall_at_{k}" for k in recall_at), "rp", "map"]
    return dict(zip(names, np.mean(rows, axis=0).tolist(), strict=True))


def random_images(seed, images, classes, dim=8):
    """Labels far from contiguous, shuffled, the classes of very different sizes; embeddings that know them a little."""
    random = np.random.default_rng(seed)
    class_of = np.minimum(random.geometric(2 / (classes + 1), size=images), classes) - 1
    class_of[:2] = 0  # at least one query has something to find
    random.shuffle(class_of)
    labels = random.permutation(10 * classes)[:classes][class_of] - 5
    embeddings = random.normal(size=(classes, dim))[class_of] + random.normal(size=(images, dim))
    return embeddings.astype(np.float32), labels


def images_full_of_ties(seed, images, classes):
    """Corners of a cube: lengths and similarities are exact in float32, and many corners are taken more than once."""
    random = np.random.default_rng(seed)
    _, labels = random_images(seed, images, classes)
    return random.choice([-3.0, 3.0], size=(images, 4)).astype(np.float32), labels


@by_faiss_and_by_sorting
@by_example
@given(
    seed=st.integers(0, 10_000),
    images=st.integers(3, 80),
    classes=st.integers(1, 30),
    make=st.sampled_from([random_images, images_full_of_ties]),
)
def test_metrics_equal_a_naive_loop_for_classes_of_any_size_and_among_ties(deep_share, seed, images, classes, make):
    embeddings, labels = make(seed, images, classes)
    recall_at = sorted({1, min(3, images - 1), images - 1})
    expected = naive_metrics(embeddings, labels, recall_at)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbours, "DEEP_SHARE", deep_share)
        assert evaluate(embeddings, labels, recall_at) == pytest.approx(expected, abs=1e-12)


@by_faiss_and_by_sorting
@by_example
@given(
    seed=st.integers(0, 10_000),
    images=st.integers(4, 60),
    classes=st.integers(1, 10),
    queries=st.integers(2, 40),
    make=st.sampled_from([random_images, images_full_of_ties]),
)
def test_metrics_of_a_query_set_against_a_gallery_equal_a_naive_loop(deep_share, seed, images, classes, queries, make):
    everything, labels = make(seed, images + queries, classes)
    labels[images] = labels[0]
    gallery, query = everything[:images], everything[images:]
    gallery_labels, query_labels = labels[:images], labels[images:]
    expected = naive_metrics(gallery, gallery_labels, (1, 4), query, query_labels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbours, "DEEP_SHARE", deep_share)
        measured = evaluate(gallery, gallery_labels, (1, 4), query=query, query_labels=query_labels)
    assert measured == pytest.approx(expected, abs=1e-12)


@by_faiss_and_by_sorting
@by_example
@given(seed=st.integers(0, 10_000), images=st.integers(2, 80), share=st.floats(0, 1))
def test_neighbours_are_those_of_a_naive_loop_for_every_k(deep_share, seed, images, share):
    embeddings, _ = images_full_of_ties(seed, images, 5)
    k = max(1, round(share * (images - 1)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbours, "DEEP_SHARE", deep_share)
        similarities, indices = nearest_neighbours(embeddings, k)
    assert indices.tolist() == [ranking[:k] for ranking in naive_neighbours(embeddings)]
    unit = embeddings / 6
    np.testing.assert_array_equal(similarities, np.take_along_axis(unit @ unit.T, indices, axis=1))


@pytest.mark.parametrize("seed", range(3))
def test_metrics_equal_those_of_pytorch_metric_learning(seed):
    embeddings, labels = random_images(seed, 1000, 60, dim=32)
    names = ("precision_at_1", "r_precision", "mean_average_precision_at_r")
    unit = torch.nn.functional.normalize(torch.from_numpy(embeddings))
    calculator = AccuracyCalculator(include=names, k="max_bin_count", device=torch.device("cpu"))
    expected = calculator.get_accuracy(unit, torch.from_numpy(labels))
    measured = evaluate(embeddings, labels)
    assert [measured[name] for name in ("recall_at_1", "rp", "map")] == pytest.approx(
        [expected[name] for name in names], abs=1e-6
    )


def test_metrics_of_a_query_set_equal_those_of_pytorch_metric_learning():
    everything, labels = random_images(3, 1000, 20, dim=32)
    names = ("precision_at_1", "r_precision", "mean_average_precision_at_r")
    unit = torch.nn.functional.normalize(torch.from_numpy(everything))
    calculator = AccuracyCalculator(include=names, k="max_bin_count", device=torch.device("cpu"))
    expected = calculator.get_accuracy(
        unit[:300], torch.from_numpy(labels[:300]), unit[300:], torch.from_numpy(labels[300:])
    )
    measured = evaluate(everything[300:], labels[300:], query=everything[:300], query_labels=labels[:300])
    assert [measured[name] for name in ("recall_at_1", "rp", "map")] == pytest.approx(
        [expected[name] for name in names], abs=1e-6
    )


# ------------------------------------------------------------------------------------------------------- duplicates


@by_faiss_and_by_sorting
def test_a_query_is_left_out_even_if_more_duplicates_tie_with_it_than_are_fetched(deep_share, monkeypatch):
    monkeypatch.setattr(neighbours, "DEEP_SHARE", deep_share)
    embeddings = np.ones((50, 4), np.float32)
    _, indices = nearest_neighbours(embeddings, 3)
    assert indices[:5].tolist() == [[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2], [0, 1, 2]]
    assert (indices[4:] == [0, 1, 2]).all()


@by_faiss_and_by_sorting
@pytest.mark.parametrize("copies", [101, 3])
def test_duplicates_rank_in_the_order_of_the_images_however_a_product_rounds_them(copies, deep_share, monkeypatch):
    monkeypatch.setattr(neighbours, "DEEP_SHARE", deep_share)
    random = np.random.default_rng(0)
    embeddings = np.tile(random.normal(size=(303 // copies, 37)).astype(np.float32), (copies, 1))
    similarities, indices = nearest_neighbours(embeddings, 20)
    assert indices.tolist() == [ranking[:20] for ranking in naive_neighbours(embeddings)]
    assert (similarities[:, : min(20, copies - 1)] == similarities[:, :1]).all()


def test_a_ranking_does_not_depend_on_how_many_neighbours_or_queries_are_asked_for():
    random = np.random.default_rng(1)
    embeddings, labels = random.choice([-1.0, 1.0], size=(1000, 100)), random.integers(0, 100, 1000)
    _, indices = nearest_neighbours(embeddings, 200)
    for k in (1, 2, 50, 62, 63):  # from 63 on, the whole gallery is sorted
        assert np.array_equal(nearest_neighbours(embeddings, k)[1], indices[:, :k])
    some = slice(0, 1000, 100)
    alone = nearest_neighbours(embeddings, 12, query=embeddings[some])
    together = nearest_neighbours(embeddings, 12, query=embeddings)
    assert all(np.array_equal(found[some], few) for found, few in zip(together, alone, strict=True))
    expected = naive_metrics(embeddings[:300], labels[:300], (1,))["map"]
    assert [evaluate(embeddings[:300], labels[:300], (1, k))["map"] for k in (2, 50, 200)] == pytest.approx(
        [expected] * 3
    )


@by_faiss_and_by_sorting
def test_a_duplicate_of_another_class_counts_as_a_miss_and_the_query_never_as_a_hit(deep_share, monkeypatch):
    monkeypatch.setattr(neighbours, "DEEP_SHARE", deep_share)
    # Pairs of equal images of different classes: leaving out the first neighbour, whichever it is, finds the query.
    embeddings = np.repeat(np.eye(4, dtype=np.float32), 2, axis=0)
    labels = np.array([0, 1, 0, 1, 0, 1, 0, 1])
    metrics = evaluate(embeddings, labels, recall_at=(1, 2))
    assert metrics["recall_at_1"] == 0
    assert metrics == pytest.approx(naive_metrics(embeddings, labels, (1, 2)), abs=1e-12)


@by_faiss_and_by_sorting
def test_duplicates_of_one_class_find_each_other(deep_share, monkeypatch):
    monkeypatch.setattr(neighbours, "DEEP_SHARE", deep_share)
    embeddings, labels = random_images(0, 120, 15, dim=64)
    order = np.random.default_rng(0).permutation(360)
    embeddings, labels = np.repeat(embeddings, 3, axis=0)[order], np.repeat(np.arange(120), 3)[order]
    assert evaluate(embeddings, labels) == {f"recall_at_{k}": 1.0 for k in (1, 2, 4, 8)} | {"rp": 1.0, "map": 1.0}


def test_a_query_that_is_also_in_the_gallery_finds_itself():
    embeddings, _ = random_images(1, 40, 4)
    similarities, indices = nearest_neighbours(embeddings, 1, query=embeddings[5:25])
    assert indices[:, 0].tolist() == list(range(5, 25))
    assert similarities == pytest.approx(1, abs=1e-6)


@by_faiss_and_by_sorting
def test_collapsed_embeddings_rank_the_images_in_their_order(deep_share, monkeypatch):
    monkeypatch.setattr(neighbours, "DEEP_SHARE", deep_share)
    labels = np.arange(300) % 7
    embeddings = np.full((300, 16), 0.25, np.float32)
    assert evaluate(embeddings, labels) == pytest.approx(naive_metrics(embeddings, labels, (1, 2, 4, 8)), abs=1e-12)


# ------------------------------------------------------------------------------------------------- what is counted


def test_queries_with_nothing_to_find_are_left_out_and_counted_in_a_warning(caplog):
    embeddings, _ = random_images(2, 30, 5)
    labels = np.array([0] * 20 + [1] * 7 + [2, 3, 4])
    with caplog.at_level(logging.WARNING, "memvir"):
        metrics = evaluate(embeddings, labels)
    assert metrics == pytest.approx(naive_metrics(embeddings, labels, (1, 2, 4, 8)), abs=1e-12)
    assert caplog.messages == [
        "3 of 30 queries have no other image of their class in the gallery; the metrics are averages over the "
        "remaining 27"
    ]


def test_nothing_is_said_when_every_query_counts(caplog):
    evaluate(random_images(2, 30, 5)[0], np.arange(30) % 5)
    assert not caplog.messages


def test_average_precision_is_given_for_each_query_and_its_mean_is_map():
    embeddings, labels = random_images(4, 90, 12)
    labels[17] = 999
    precisions = average_precision(embeddings, labels)
    assert np.isnan(precisions[17])
    assert np.nanmean(precisions) == pytest.approx(evaluate(embeddings, labels)["map"], abs=1e-12)
    query = average_precision(embeddings[:60], labels[:60], query=embeddings[60:], query_labels=labels[60:])
    assert query.shape == (30,)


def test_metrics_do_not_depend_on_how_queries_are_cut_into_chunks(monkeypatch):
    embeddings, labels = random_images(5, 200, 12)
    whole = evaluate(embeddings, labels), nearest_neighbours(embeddings, 20)[1].tolist()
    monkeypatch.setattr(neighbours, "CHUNK_NEIGHBOURS", 500)
    assert (evaluate(embeddings, labels), nearest_neighbours(embeddings, 20)[1].tolist()) == whole
    monkeypatch.setattr(neighbours, "CHUNK_QUERIES", 1)
    assert evaluate(embeddings, labels) == pytest.approx(whole[0], abs=1e-12)


def test_queries_of_small_classes_do_not_fetch_as_many_neighbours_as_those_of_large_ones():
    relevant = np.array([1] * 9000 + [2999] * 3000 + [0] * 5)
    chunks = list(metrics._chunks(relevant, recall_depth=8))
    assert sorted(np.concatenate([rows for rows, _ in chunks]).tolist()) == list(range(12_000))
    assert all(len(rows) * k <= neighbours.CHUNK_NEIGHBOURS for rows, k in chunks)
    assert [k for _, k in chunks][-2:] == [8, 8]


def test_classes_of_thousands_of_images_work():
    random = np.random.default_rng(6)
    labels = np.arange(3000) % 2
    embeddings = random.normal(size=(3000, 8)).astype(np.float32)
    embeddings[:, 0] = labels - 0.5
    embeddings[:, 1:] *= 1e-3
    assert evaluate(embeddings, labels)["map"] == 1.0


def test_sorting_whole_rows_and_faiss_find_the_same(monkeypatch):
    embeddings, _ = random_images(18, 400, 12)
    sorted_out = nearest_neighbours(embeddings, 60)
    monkeypatch.setattr(neighbours, "DEEP_SHARE", FAISS_ALWAYS)
    by_faiss = nearest_neighbours(embeddings, 60)
    np.testing.assert_allclose(sorted_out[0], by_faiss[0], atol=1e-6)
    assert (sorted_out[1] == by_faiss[1]).mean() > 0.999  # rounding may swap two that are all but equal


def test_signs_of_zero_are_no_reason_to_reorder_ties():
    similarities = np.array([[0.0, -0.0, 0.5, -0.5, -0.0, 0.0]], np.float32)
    ordered, indices = neighbours._unpack(np.sort(neighbours._packed(similarities, np.arange(6))))
    assert indices.tolist() == [[2, 0, 1, 4, 5, 3]]
    assert ordered.tolist() == [[0.5, 0, 0, 0, 0, -0.5]]


def test_the_same_input_gives_the_same_bytes():
    embeddings, labels = random_images(7, 500, 20)
    first, second = (nearest_neighbours(embeddings, 30) for _ in range(2))
    assert [array.tobytes() for array in first] == [array.tobytes() for array in second]
    assert evaluate(embeddings, labels, nmi=True) == evaluate(embeddings, labels, nmi=True)


def test_nmi_is_one_for_separate_classes_and_low_for_noise():
    labels = np.arange(400) % 10
    noise = np.random.default_rng(8).normal(size=(400, 16))
    assert evaluate(np.eye(16)[labels] + 0.01 * noise, labels, nmi=True)["nmi"] == pytest.approx(1)
    assert evaluate(noise, labels, nmi=True)["nmi"] < 0.3
    assert "nmi" not in evaluate(noise, labels)


# ------------------------------------------------------------------------------------------------------------ input


def test_arrays_tensors_and_lists_of_any_type_and_length_give_the_same_metrics():
    embeddings, labels = random_images(9, 60, 6)
    expected = evaluate(embeddings, labels)
    names = [f"car {label}" for label in labels]
    lengths = np.geomspace(1e-30, 1e30, 60)[:, None]
    coarse = torch.from_numpy(embeddings).bfloat16()
    for same_embeddings, same_labels in [
        (torch.from_numpy(embeddings).requires_grad_(), torch.from_numpy(labels)),
        (embeddings.tolist(), labels.tolist()),
        (embeddings.astype(np.float64) * lengths, names),
        ((embeddings * lengths).astype(np.float32), labels),
        (np.asfortranarray(embeddings)[:, ::-1], labels.astype(np.float64)),
    ]:
        assert evaluate(same_embeddings, same_labels) == pytest.approx(expected, abs=1e-12)
    assert evaluate(coarse, labels) == evaluate(coarse.float().numpy(), labels)
    assert all(type(value) is float for value in expected.values())
    assert list(expected) == ["recall_at_1", "recall_at_2", "recall_at_4", "recall_at_8", "rp", "map"]


GOOD = np.ones((10, 4), np.float32)
TWO_CLASSES = np.arange(10) % 2
LABELS = [3, 1, 3, 2, 1, 2, 3, 1, 2, 1]
TEXTS = [f"c{label}" for label in LABELS]


@pytest.mark.parametrize(
    "labels",
    [
        np.array(LABELS, np.uint8),
        np.array(LABELS, np.float16),
        np.array(LABELS, object),
        np.array(TEXTS),
        np.array(TEXTS, "S"),
        np.array(TEXTS, object),
        np.array(LABELS, "M8[D]"),
        TEXTS,
        tuple(TEXTS),
        (text for text in TEXTS),
        [text.encode() for text in TEXTS],
        [("make", label) for label in LABELS],
        [np.int32(label) for label in LABELS],
        [torch.tensor(label) for label in LABELS],
        torch.tensor(LABELS, dtype=torch.uint16),
        torch.tensor(LABELS, dtype=torch.bfloat16),
        pandas.Series(LABELS, index=range(50, 40, -1)),
        pandas.Series(LABELS, dtype="Int64"),
        pandas.Series(TEXTS, index=list("jihgfedcba")),
        pandas.Series(TEXTS, dtype="category"),
        pandas.Series(TEXTS, dtype="string"),
        pandas.Categorical(TEXTS, categories=["c3", "unused", "c1", "c2"]),
        pandas.Index(TEXTS),
        [1 if label == 1 else "1" if label == 2 else 1.5 for label in LABELS],  # of which NumPy would make texts
        [2**63 + label if label > 1 else -1 for label in LABELS],  # of which NumPy would make float64
        [float("inf") if label == 3 else label for label in LABELS],
    ],
    ids=lambda labels: f"{type(labels).__name__} {getattr(labels, 'dtype', '')}",
)
def test_labels_of_every_type_are_the_same_classes(labels):
    embeddings = np.random.default_rng(20).normal(size=(10, 4))
    assert evaluate(embeddings, labels) == pytest.approx(evaluate(embeddings, LABELS), abs=1e-12)


BEYOND = 2**53  # from here on float64 leaves out every other whole number
ONE_AND_THE_NEXT = [BEYOND, BEYOND + 1] * 5


@pytest.mark.parametrize(
    ("gallery_labels", "query_labels"),
    [
        (np.array(ONE_AND_THE_NEXT, np.int64), np.array([BEYOND + 1] * 2, np.uint64)),
        (np.array(ONE_AND_THE_NEXT, np.uint64), torch.tensor([BEYOND + 1] * 2)),
        (np.array(ONE_AND_THE_NEXT, np.int64), [BEYOND + 1.0 + 1, BEYOND + 1]),
        (ONE_AND_THE_NEXT, np.array([BEYOND + 1] * 2)),
        (np.array(ONE_AND_THE_NEXT, object), np.array([BEYOND + 1] * 2, np.uint64)),
    ],
)
def test_whole_numbers_of_gallery_and_queries_are_compared_exactly_whatever_their_types(gallery_labels, query_labels):
    gallery = np.random.default_rng(21).normal(size=(10, 4))
    query = gallery[:2] + 0.01  # next to a class of its own (the first) and to its class (the second)
    python = [int(label) for label in query_labels]
    expected = naive_metrics(gallery, ONE_AND_THE_NEXT, (1, 2), query, python)
    assert evaluate(gallery, gallery_labels, (1, 2), query=query, query_labels=query_labels) == pytest.approx(expected)


@pytest.mark.parametrize("gallery_type", [np.int8, np.uint64, np.float32, bool, object])
@pytest.mark.parametrize("query_type", [np.int64, np.float64, bool, object])
def test_equal_labels_of_two_types_are_one_class(gallery_type, query_type):
    gallery, labels = random_images(22, 20, 2)
    labels = (labels == labels[0]).astype(int)
    options = {"query": gallery[:6] + 0.1}
    expected = evaluate(gallery, labels, query_labels=labels[:6], **options)
    assert (
        evaluate(gallery, labels.astype(gallery_type), query_labels=labels[:6].astype(query_type), **options)
        == expected
    )


@pytest.mark.parametrize(
    "recall_at",
    [[1, 4], (1, 4), np.array([1, 4]), torch.tensor([1, 4]), (k for k in (1, 4)), {1: "", 4: ""}, [np.int8(1), 4, 1]],
    ids=lambda value: type(value).__name__,
)
def test_recall_at_is_any_collection_of_whole_numbers(recall_at):
    embeddings, labels = random_images(23, 30, 4)
    assert evaluate(embeddings, labels, recall_at) == evaluate(embeddings, labels, [1, 4])


def test_recall_at_may_be_one_number_or_none_at_all_and_keeps_its_order():
    embeddings, labels = random_images(23, 30, 4)
    assert list(evaluate(embeddings, labels, 4)) == list(evaluate(embeddings, labels, np.int64(4)))
    assert list(evaluate(embeddings, labels, 4)) == ["recall_at_4", "rp", "map"]
    assert list(evaluate(embeddings, labels, ())) == ["rp", "map"]
    assert list(evaluate(embeddings, labels, (4, 1))) == ["recall_at_4", "recall_at_1", "rp", "map"]


@pytest.mark.parametrize("k", [2.0, 0, -1, True, "2", None, np.float32(2), float("nan"), [2]])
def test_a_number_of_neighbours_that_is_none_is_refused(k):
    for call in (lambda: evaluate(GOOD, TWO_CLASSES, [1, k]), lambda: nearest_neighbours(GOOD, k)):
        with pytest.raises(UserError, match="is not a number of neighbours; use whole numbers from 1"):
            call()


@pytest.mark.parametrize("recall_at", [2.0, True, None, "12", [[1, 2]], np.array([[1], [2]]), np.array([1.0])])
def test_a_recall_at_that_is_no_collection_of_whole_numbers_is_refused(recall_at):
    with pytest.raises(UserError, match=r"recall_at: .* is not a number of neighbours"):
        evaluate(GOOD, TWO_CLASSES, recall_at)


@pytest.mark.parametrize("missing", [None, float("nan"), np.nan, pandas.NA, pandas.NaT, np.datetime64("NaT"), [1], {}])
@pytest.mark.parametrize("container", [list, lambda labels: np.fromiter(labels, object), pandas.Series])
def test_a_label_that_is_missing_is_refused_and_not_a_class(missing, container):
    labels = ["a", "b"] * 4 + [missing, missing]
    with pytest.raises(UserError, match=r"labels hold .*, which is not a class; leave out the images that have none"):
        evaluate(GOOD, container(labels))
    with pytest.raises(UserError, match=r"query_labels hold .*, which is not a class"):
        evaluate(GOOD, ["a", "b"] * 5, query=GOOD, query_labels=container(labels))


@pytest.mark.parametrize(
    "labels",
    [
        np.array([0.0, np.nan] * 5),
        torch.tensor([0.0, float("nan")] * 5),
        np.array([1, "NaT"] * 5, "M8[ns]"),
        pandas.Series([1, None] * 5),
        pandas.Series([1, None] * 5, dtype="Int64"),
        pandas.Series(["a", None] * 5),
        pandas.Categorical(["a", None] * 5),
        [torch.tensor([1, 2])] * 10,
        [np.zeros(2)] * 10,
    ],
    ids=lambda labels: f"{type(labels).__name__} {getattr(labels, 'dtype', '')}",
)
def test_arrays_with_missing_labels_are_refused(labels):
    with pytest.raises(UserError, match=r"labels hold .*, which is not a class"):
        average_precision(GOOD, labels)


@pytest.mark.parametrize(
    ("embeddings", "message"),
    [
        (GOOD.astype(complex), "embeddings must be real numbers, not complex128"),
        (GOOD.astype(str), "embeddings must be real numbers, not <U"),
        (GOOD.astype(object), "embeddings must be real numbers, not object"),
        (GOOD.astype("M8[s]"), "embeddings must be real numbers, not datetime64"),
        ([[1.0, 2.0], [1.0]], r"embeddings cannot be read as an array \(.*inhomogeneous"),
        (torch.ones(10, 4).to_sparse(), r"embeddings cannot be read as an array \("),
        (torch.ones(10, 4, device="meta"), r"embeddings cannot be read as an array \("),
        (torch.ones(10, 4, dtype=torch.complex64), "embeddings must be real numbers, not complex64"),
        (np.ma.masked_less(GOOD, 2), "embeddings hold masked values"),
        ("images.npy", r"embeddings must have the shape \(images, dimensions\), not \(\)"),
    ],
)
def test_embeddings_that_are_no_real_numbers_are_refused(embeddings, message):
    for call in (lambda: evaluate(embeddings, TWO_CLASSES), lambda: nearest_neighbours(GOOD, 1, query=embeddings)):
        with pytest.raises(UserError, match=message.removeprefix("embeddings")) as refusal:
            call()
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("labels", [5, "aabbaabbcc", None, np.ma.masked_equal(TWO_CLASSES, 1)])
def test_labels_that_are_no_collection_are_refused(labels):
    with pytest.raises(UserError, match="labels"):
        evaluate(GOOD, labels)


def test_embeddings_of_whole_numbers_data_frames_and_half_precision_are_taken_as_they_are():
    embeddings = np.random.default_rng(24).integers(-9, 9, size=(30, 4))
    labels = np.arange(30) % 3
    expected = evaluate(embeddings.astype(np.float32), labels)
    for same in (
        embeddings,
        embeddings.astype(np.int8),
        embeddings.astype(np.float16),
        embeddings.astype(np.longdouble),
        torch.from_numpy(embeddings).half(),
        torch.from_numpy(embeddings).bfloat16().requires_grad_(),
        torch.from_numpy(embeddings),
        [torch.from_numpy(row) for row in embeddings],
        pandas.DataFrame(embeddings, index=range(30, 0, -1)),
    ):
        assert evaluate(same, labels) == pytest.approx(expected, abs=1e-12)


def test_the_input_is_left_as_it_was():
    embeddings, labels = random_images(10, 40, 4)
    before = embeddings.copy(), labels.copy()
    evaluate(embeddings, labels)
    np.testing.assert_array_equal(embeddings, before[0])
    np.testing.assert_array_equal(labels, before[1])


def with_value(value, rows):
    embeddings = np.ones((10, 4), np.float32)
    embeddings[rows, 1] = value
    return embeddings


@pytest.mark.parametrize(
    ("embeddings", "labels", "options", "message"),
    [
        (with_value(np.nan, [1, 7]), TWO_CLASSES, {}, "2 of 10 embeddings hold NaN or infinite values"),
        (with_value(-np.inf, [3]), TWO_CLASSES, {}, "1 of 10 embeddings hold NaN or infinite values"),
        (GOOD, TWO_CLASSES[:9], {}, r"labels must have the shape \(10,\), one per row of the embeddings, not \(9,\)"),
        (GOOD, np.eye(10), {}, r"labels must have the shape \(10,\).*not \(10, 10\)"),
        (GOOD[0], TWO_CLASSES, {}, r"embeddings must have the shape \(images, dimensions\), not \(4,\)"),
        (GOOD[:0], TWO_CLASSES[:0], {}, r"embeddings must have the shape \(images, dimensions\), not \(0, 4\)"),
        (GOOD, np.arange(10), {}, "no query has another image of its class"),
        (GOOD, TWO_CLASSES, {"recall_at": (1, 10)}, "recall_at: 10 is more than the 9 gallery images"),
        (GOOD, TWO_CLASSES, {"recall_at": (0, 1)}, "recall_at: 0 is not a number of neighbours"),
        (GOOD, TWO_CLASSES, {"query": GOOD}, "query and query_labels belong together"),
        (GOOD, TWO_CLASSES, {"query_labels": TWO_CLASSES}, "query and query_labels belong together"),
        (
            GOOD,
            TWO_CLASSES,
            {"query": GOOD[:, :3], "query_labels": TWO_CLASSES},
            "query embeddings have 3 dimensions, those of the gallery 4",
        ),
        (GOOD, TWO_CLASSES, {"query": GOOD, "query_labels": [1]}, "query_labels must have the shape"),
        (GOOD, TWO_CLASSES, {"query": GOOD, "query_labels": TWO_CLASSES + 5}, "no query has another image"),
        (
            GOOD,
            TWO_CLASSES,
            {"query": with_value(np.inf, [0]), "query_labels": TWO_CLASSES},
            "1 of 10 query embeddings hold NaN",
        ),
    ],
)
def test_input_that_makes_no_sense_is_refused_in_one_sentence(embeddings, labels, options, message):
    with pytest.raises(UserError, match=message) as refusal:
        evaluate(embeddings, labels, **options)
    assert "\n" not in str(refusal.value)


def test_more_neighbours_than_there_are_is_refused():
    with pytest.raises(UserError, match="10 neighbours asked for; there are from 1 to 9"):
        nearest_neighbours(GOOD, 10)
    assert nearest_neighbours(GOOD, 10, query=GOOD[:2])[1].shape == (2, 10)


# -------------------------------------------------------------------------------------------------------------- GPU


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "", 1.5, ["cuda"]])
def test_a_device_that_there_is_not_is_refused(device):
    with pytest.raises(UserError, match=r"device: torch knows no .*; use 'cpu' or 'cuda:0'"):
        nearest_neighbours(GOOD, 1, device=device)
    assert nearest_neighbours(GOOD, 1, device="cpu")[1].shape == (10, 1)


def test_without_a_gpu_the_cpu_is_used_and_one_line_says_so(monkeypatch, caplog):
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    embeddings, labels = random_images(11, 60, 6)
    assert evaluate(embeddings, labels, device="cuda:0") == evaluate(embeddings, labels)
    notices = [message for message in caplog.messages if "GPU" in message]
    assert len(notices) == 1
    assert notices[0].startswith("faiss cannot use GPU 0 (") and "CPU instead" in notices[0]
    assert "\n" not in notices[0]


def test_faiss_built_without_gpu_support_is_a_notice_too(monkeypatch, caplog):
    fake_gpus(monkeypatch)
    monkeypatch.delattr(faiss, "StandardGpuResources")
    embeddings, labels = random_images(11, 60, 6)
    assert evaluate(embeddings, labels, device=torch.device("cuda")) == evaluate(embeddings, labels)
    assert any("CPU instead" in message for message in caplog.messages)


class FakeResources:
    def setTempMemory(self, size):  # noqa: N802
        self.temporary = size

    def setPinnedMemory(self, size):  # noqa: N802
        pass


class FakeGpuIndex:
    """A flat index that behaves like faiss's on a GPU: few neighbours at a time, and broken when told to be."""

    fails_at = None  # the search that finds no memory

    def __init__(self, resources, dim, metric, config):
        self.resources, self.config, self.asked = resources, config, []
        self.index = faiss.IndexFlat(dim, metric)
        made.append(self)

    def add(self, vectors):
        self.index.add(vectors)

    def search(self, queries, k):
        if len(self.asked) == self.fails_at:
            raise RuntimeError("Error in virtual void* allocMemory:\n  cudaMalloc error out of memory")
        assert k <= 2048
        self.asked.append((len(queries), k))
        return self.index.search(queries, k)


class FakeConfig:
    device = 0


made: list[FakeGpuIndex] = []


def fake_gpus(monkeypatch, count=2, free=8 << 30):
    made.clear()
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: count)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda gpu: (free, 16 << 30))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(faiss, "StandardGpuResources", FakeResources, raising=False)
    monkeypatch.setattr(faiss, "GpuIndexFlatConfig", FakeConfig, raising=False)
    monkeypatch.setattr(faiss, "GpuIndexFlat", FakeGpuIndex, raising=False)


def test_the_gpu_asked_for_is_searched_with_little_temporary_memory(monkeypatch, caplog):
    fake_gpus(monkeypatch)
    embeddings, labels = random_images(12, 300, 10)
    assert evaluate(embeddings, labels, device="cuda:1") == evaluate(embeddings, labels)
    assert [index.config.device for index in made] == [1]
    assert made[0].resources.temporary == search.GPU_TEMPORARY_BYTES
    assert sum(queries for queries, _ in made[0].asked) == 300
    assert not [message for message in caplog.messages if "GPU" in message]


@by_faiss_and_by_sorting
def test_more_neighbours_than_a_gpu_can_find_are_left_to_the_cpu(deep_share, monkeypatch, caplog):
    fake_gpus(monkeypatch)
    monkeypatch.setattr(neighbours, "DEEP_SHARE", deep_share)
    gallery = np.random.default_rng(13).normal(size=(2600, 4)).astype(np.float32)
    gallery_labels = np.array([0] * 2500 + [1] * 100)
    queries = {"query": gallery[::50] + 0.1, "query_labels": gallery_labels[::50]}
    assert evaluate(gallery, gallery_labels, device="cuda", **queries) == pytest.approx(
        evaluate(gallery, gallery_labels, **queries), abs=1e-9
    )
    assert not [message for message in caplog.messages if "GPU" in message]  # nothing failed: it was not asked


def test_a_gpu_that_fails_in_the_middle_is_replaced_by_the_cpu_with_one_notice(monkeypatch, caplog):
    fake_gpus(monkeypatch)
    monkeypatch.setattr(neighbours, "CHUNK_QUERIES", 50)
    monkeypatch.setattr(FakeGpuIndex, "fails_at", 2)
    embeddings, labels = random_images(14, 300, 40)
    assert evaluate(embeddings, labels, device="cuda:0") == evaluate(embeddings, labels)
    assert len(made[0].asked) == 2
    assert [message for message in caplog.messages if "GPU" in message] == [
        "faiss cannot use GPU 0 (cudaMalloc error out of memory); it searches on the CPU instead"
    ]


@pytest.mark.parametrize("fails_at", [None, 0])
def test_torch_searches_on_a_gpu_that_faiss_cannot_use(fails_at, monkeypatch, caplog):
    """Here the GPU is the CPU under another name."""
    fake_gpus(monkeypatch)
    if fails_at is None:
        monkeypatch.delattr(faiss, "StandardGpuResources")
    monkeypatch.setattr(FakeGpuIndex, "fails_at", fails_at)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    on_gpu, asked = search.torch_on_gpu, []

    def on_this_cpu(gallery, gpu):
        asked.append(gpu)
        return on_gpu(gallery, "cpu")

    monkeypatch.setattr(search, "torch_on_gpu", on_this_cpu)
    monkeypatch.setattr(search, "TORCH_SIMILARITIES", 1000)  # three queries at a time
    embeddings = np.random.default_rng(14).normal(size=(300, 8)).astype(np.float32)  # without ties
    with torch.autocast("cpu", torch.bfloat16):
        found = evaluate(embeddings, np.arange(300) % 40, device="cuda:0")
    assert found == evaluate(embeddings, np.arange(300) % 40)
    assert asked == [0]
    assert [message.partition("; ")[2] for message in caplog.messages] == ["torch searches there instead"]


def test_without_faiss_torch_searches(monkeypatch):
    embeddings, labels = random_images(17, 400, 30)
    expected = evaluate(embeddings, labels), *nearest_neighbours(embeddings, 12)
    monkeypatch.setattr(search, "faiss", None)
    found = evaluate(embeddings, labels), *nearest_neighbours(embeddings, 12)
    assert found[0] == expected[0]
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_array_equal(found[2], expected[2])
    with pytest.raises(UserError, match=r"^nmi: the clusters are faiss's, which is not installed"):
        evaluate(embeddings, labels, nmi=True)


def test_a_gpu_without_room_is_not_touched(monkeypatch, caplog):
    fake_gpus(monkeypatch, free=100 << 20)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    embeddings, labels = random_images(15, 100, 5)
    assert evaluate(embeddings, labels, device="cuda:0", nmi=True) == evaluate(embeddings, labels, nmi=True)
    assert not made
    assert any("100 MiB of its memory are free" in message for message in caplog.messages)
    assert not any("torch" in message for message in caplog.messages), "it has no room there either"


@pytest.mark.skipif(not torch.cuda.is_available() or faiss.get_num_gpus() == 0, reason="no GPU")
def test_a_real_gpu_gives_the_metrics_of_the_cpu():
    embeddings, labels = random_images(16, 3000, 50, dim=64)
    on_gpu = torch.from_numpy(embeddings).cuda()
    assert evaluate(on_gpu, labels, nmi=True)["map"] == pytest.approx(evaluate(embeddings, labels)["map"], abs=1e-4)


def test_arrays_are_evaluated_without_importing_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    embeddings, labels = random_images(17, 40, 4)
    assert set(evaluate(embeddings, labels)) >= {"rp", "map"}
