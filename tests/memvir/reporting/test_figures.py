from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from memvir import retrieval
from memvir.errors import UserError
from memvir.reporting import curves, figures, neighbours, tsne
from memvir.reporting.results import Line

LINES = [
    Line("plain", "Norm-SoftMax", "Norm-SoftMax", None),
    Line("memvir", "MemVir + Norm-SoftMax", "MemVir + Norm-SoftMax", "plain"),
    Line("more", "MemVir + Norm-SoftMax (9, 1)", "MemVir + Norm-SoftMax", "plain"),
    Line("nca", "Proxy-NCA", "Proxy-NCA", None),
]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def assert_no_dates(content: bytes) -> None:
    assert b"<dc:date>" not in content and b"tIME" not in content and b"Software" not in content


def test_a_loss_has_one_colour_and_is_dashed_without_memvir():
    styles = figures.line_styles(LINES)
    assert styles["plain"]["color"] == styles["memvir"]["color"] == styles["more"]["color"] != styles["nca"]["color"]
    assert [styles[name]["linestyle"] for name in ("plain", "memvir", "more", "nca")] == ["--", "-", "-.", "--"]


def test_the_users_own_matplotlib_settings_do_not_change_a_figure(tmp_path):
    import matplotlib

    def draw(stem: Path) -> None:
        with figures.house_style():
            figure = figures.new_figure(2, 1)
            figure.subplots().plot([0, 1])
            figures.save_figure(figure, stem)

    draw(tmp_path / "a" / "figure")
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "pink", "svg.hashsalt": None}):
        draw(tmp_path / "b" / "figure")
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    for content in files_of(tmp_path / "a").values():
        assert_no_dates(content)


# ---------------------------------------------------------------------------------------------------------- curves


def history(values: list[float], check_epoch: int = 2) -> pd.DataFrame:
    epochs = range(1, len(values) + 1)
    metrics = [value if epoch % check_epoch == 0 else np.nan for epoch, value in zip(epochs, values, strict=True)]
    loss = [5.0 - value for value in values]
    return pd.DataFrame(
        {
            "epoch": epochs,
            "step": [10 * e for e in epochs],
            "loss": loss,
            "recall_at_1": metrics,
            "rp": metrics,
            "map": metrics,
        }
    )


HISTORIES = {
    ("plain", 1): history([0.1, 0.2, 0.3, 0.4, 0.5, 0.5, 0.5, 0.6]),
    ("plain", 2): history([0.1, 0.4, 0.3, 0.4, 0.5, 0.7, 0.5, 0.6]),
    ("memvir", 1): history([0.1, 0.3, 0.3, 0.5, 0.5, 0.5, 0.5, 0.8]),
}
GROWTHS = {
    ("plain", 1): pd.DataFrame({"step": [0], "num_virtual_classes": [0], "num_virtual_embeddings": [0]}),
    ("memvir", 1): pd.DataFrame(
        {"step": [0, 31, 36], "num_virtual_classes": [0, 7, 14], "num_virtual_embeddings": [0, 10, 20]}
    ),
}


def test_a_mean_curve_holds_evaluated_epochs_in_per_cent():
    curve = curves.mean_curve(HISTORIES, "plain", "recall_at_1")
    assert curve["epoch"].tolist() == [2, 4, 6, 8]
    assert curve["mean"].tolist() == pytest.approx([30, 40, 60, 60])
    assert curve["std"].tolist() == pytest.approx([np.std([20, 40], ddof=1), 0, np.std([50, 70], ddof=1), 0])
    assert curves.mean_curve(HISTORIES, "plain", "loss")["mean"].iloc[0] == pytest.approx(4.9)


def test_a_run_that_stopped_early_ends_the_mean_instead_of_shifting_it():
    histories = {("plain", 1): HISTORIES["plain", 1], ("plain", 2): HISTORIES["plain", 2].head(4)}
    assert curves.mean_curve(histories, "plain", "rp")["epoch"].tolist() == [2, 4]


def test_curves_are_the_same_bytes_every_time(tmp_path):
    for name in ("first", "second"):
        curves.draw_curves(HISTORIES, LINES[:2], 2, tmp_path / name)
        curves.draw_growth(GROWTHS, HISTORIES, LINES[:2], tmp_path / name / "growth")
    first = files_of(tmp_path / "first")
    names = [f"{stem}.{suffix}" for stem in ("growth", "loss", "map", "recall_at_1", "rp") for suffix in ("png", "svg")]
    assert sorted(first) == sorted(names)
    assert first == files_of(tmp_path / "second")
    for content in first.values():
        assert_no_dates(content)


def test_the_mean_curves_come_as_a_table_in_long_form():
    rows = curves.curves_csv(HISTORIES, LINES[:2]).splitlines()
    assert rows[:2] == ["metric,loss,epoch,mean,std", "Recall@1 (%),Norm-SoftMax,2,30.0000,14.1421"]
    assert len(rows) == 1 + 3 * 2 * 4 + 2 * 8
    assert rows[-1] == "training loss,MemVir + Norm-SoftMax,8,4.2000,"


def test_runs_that_are_missing_or_differ_in_length_do_not_stop_the_curves(tmp_path):
    histories = {("plain", 1): HISTORIES["plain", 1], ("memvir", 2): HISTORIES["memvir", 1].head(4)}
    curves.draw_curves(histories, LINES, 2, tmp_path)
    assert (tmp_path / "map.png").stat().st_size > 5000


def test_growth_without_any_memvir_run_says_so(tmp_path):
    curves.draw_growth({("plain", 1): GROWTHS["plain", 1]}, HISTORIES, LINES[:1], tmp_path / "growth")
    assert (tmp_path / "growth.png").exists()


def test_missing_tables_are_left_out(tmp_path):
    HISTORIES["plain", 1].to_csv(tmp_path / "1.csv", index=False)
    found = curves.read_tables({("plain", 1): tmp_path / "1.csv", ("plain", 2): tmp_path / "2.csv"})
    assert list(found) == [("plain", 1)]


# ------------------------------------------------------------------------------------------------------------ t-SNE


def write_snapshot(path: Path, steps: int, num_classes: int = 8, per_step: int = 12) -> None:
    random = np.random.default_rng(steps)
    path.parent.mkdir(parents=True, exist_ok=True)
    proxies = random.normal(size=(num_classes, 6)).astype(np.float32)
    labels = random.integers(0, num_classes, per_step * steps)
    np.savez(
        path,
        embeddings=proxies[labels] + 0.1 * random.normal(size=(len(labels), 6)).astype(np.float32),
        labels=labels,
        step_offset=np.repeat(np.arange(steps), per_step),
        proxies=proxies,
        num_classes_in_use=num_classes * steps,
        step_gap=20,
    )


def test_embeddings_of_a_class_lie_together_and_the_map_is_the_same_every_time():
    random = np.random.default_rng(0)
    centres = np.eye(5)[np.repeat(np.arange(5), 20)] + 0.02 * random.normal(size=(100, 5))
    first = tsne.embed_in_two_dimensions(centres, perplexity=10, seed=1, iterations=(50, 100))
    assert first.shape == (100, 2)
    assert np.array_equal(first, tsne.embed_in_two_dimensions(centres, perplexity=10, seed=1, iterations=(50, 100)))
    distances = np.linalg.norm(first[:, None] - first[None], axis=2) + 1e9 * np.eye(100)
    assert (distances.argmin(axis=1) // 20 == np.arange(100) // 20).all()


def test_a_panel_per_snapshot_names_epoch_and_classes_in_use(tmp_path, monkeypatch):
    counts = []
    embed = tsne.embed_in_two_dimensions
    monkeypatch.setattr(
        tsne, "embed_in_two_dimensions", lambda points, *a: counts.append(len(points)) or embed(points, *a)
    )
    monkeypatch.setattr(figures, "STYLE", {**figures.STYLE, "svg.fonttype": "none"})
    write_snapshot(tmp_path / "snapshots" / "epoch-0010.npz", steps=1)
    write_snapshot(tmp_path / "snapshots" / "epoch-0200.npz", steps=6)
    snapshots = tsne.read_snapshots(tmp_path / "snapshots")
    for name in ("first", "second"):
        tsne.draw_tsne(snapshots, tmp_path / name / "tsne", max_points=40)
    assert files_of(tmp_path / "first") == files_of(tmp_path / "second")
    text = (tmp_path / "first" / "tsne.svg").read_text()
    for words in (
        "epoch 10: C = 8 classes",
        "epoch 200: 6C = 48 classes",
        "current step",
        "−5(M+1) = −105",
        "class weights",
    ):
        assert words in text
    assert counts == 2 * [12 + 8, 40 + 8]  # embeddings, no more than allowed, and all class weights


def test_the_steps_have_the_papers_colours_in_its_order():
    assert tsne.STEP_COLOURS == ("magenta", "cyan", "orange", "grey", "red", "blue")
    assert len({tsne._colour(k) for k in range(18)}) == 18


def test_a_run_without_snapshots_is_an_error_that_says_what_to_set(tmp_path):
    with pytest.raises(UserError, match="no snapshots; give the variant"):
        tsne.read_snapshots(tmp_path)


# ------------------------------------------------------------------------------------------------------- neighbours


def test_queries_are_chosen_by_average_precision_with_ties_by_row_and_no_class_twice():
    precision = np.array([0.9, 0.9, 0.5, 0.1, np.nan, 0.45, 0.0, 1.0])
    labels = np.array([0, 0, 1, 2, 3, 4, 5, 0])
    chosen = neighbours.choose_queries(precision, labels, per_kind=1)
    assert chosen == [("best", 7), ("typical", 2), ("worst", 6)]
    same = neighbours.choose_queries(np.ones(6), np.array([0, 0, 1, 1, 2, 2]), per_kind=1)
    assert same == [("best", 0), ("typical", 4), ("worst", 2)]


def test_too_few_classes_give_fewer_queries():
    assert len(neighbours.choose_queries(np.array([0.5, 0.4]), np.array([0, 1]), per_kind=2)) == 2


def test_ranking_agrees_with_the_retrieval_metrics():
    random = np.random.default_rng(0)
    labels = np.repeat(np.arange(6), 4)
    embeddings = {name: random.normal(size=(24, 3)).astype(np.float32) for name in ("a", "b")}
    queries, rankings = neighbours.rank(embeddings, labels, per_kind=1, num_neighbours=3)
    assert [kind for kind, _ in queries] == ["best", "typical", "worst"]
    for ranking in rankings:
        table = embeddings[ranking.title]
        precision = retrieval.average_precision(table, labels)
        unit = table / np.linalg.norm(table, axis=1, keepdims=True)
        for position, (_, row) in enumerate(queries):
            assert ranking.average_precision[position] == precision[row]
            similarity = unit @ unit[row]
            similarity[row] = -2
            assert ranking.neighbours[position].tolist() == np.argsort(-similarity)[:3].tolist()


def test_the_picture_takes_grey_and_coloured_images_of_any_shape_and_names_with_dollars(tmp_path):
    random = np.random.default_rng(0)
    rows = []
    for number in range(8):
        shape = [(20, 20), (200, 120, 3), (30, 90, 3)][number % 3]
        Image.fromarray(random.integers(0, 256, shape).astype(np.uint8)).save(tmp_path / f"{number}.png")
        rows.append(
            (
                number // 4,
                f"class $_{number // 4} with a name far too long for the width of one picture",
                f"{number}.png",
            )
        )
    images = pd.DataFrame(rows, columns=["class_id", "class_name", "file"])
    embeddings = {"A": random.normal(size=(8, 3)), "B": random.normal(size=(8, 3))}
    queries, rankings = neighbours.rank(embeddings, images["class_id"].to_numpy(), per_kind=1, num_neighbours=3)
    for name in ("first", "second"):
        neighbours.draw_neighbours(queries, rankings, images, tmp_path, tmp_path / name / "neighbours")
    assert files_of(tmp_path / "first") == files_of(tmp_path / "second")


def test_a_run_without_embeddings_is_an_error_that_names_the_file(tmp_path):
    with pytest.raises(UserError, match=r"test_embeddings\.npz: not found"):
        neighbours.read_embeddings(tmp_path / "test_embeddings.npz")
