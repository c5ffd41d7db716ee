import warnings
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib.font_manager import fontManager
from PIL import Image

from memvir import retrieval
from memvir.errors import UserError
from memvir.images.decode import decode
from memvir.reporting import curves, figures, neighbours, tsne
from memvir.reporting.results import Line
from memvir.wrappers import WRAPPERS

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


# ----------------------------------------------------------------------------------------------------------- fonts


@pytest.fixture
def only_bundled_fonts(monkeypatch):
    """A machine without any fonts but those that Matplotlib brings."""
    bundled = [font for font in fontManager.ttflist if Path(font.fname).is_relative_to(matplotlib.get_data_path())]
    monkeypatch.setattr(fontManager, "ttflist", bundled)
    monkeypatch.setattr(figures, "_look_for_new_fonts", lambda: None)


def install_font(path: Path, family: str, letters: str) -> None:
    """A typeface whose letters, and a capital A besides, are boxes."""
    pen = TTGlyphPen(None)
    pen.moveTo((100, 0))
    for corner in ((100, 700), (800, 700), (800, 0)):
        pen.lineTo(corner)
    pen.closePath()
    names = [".notdef", *(f"uni{ord(letter):04X}" for letter in "A" + letters)]
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({ord(letter): f"uni{ord(letter):04X}" for letter in "A" + letters})
    builder.setupGlyf(dict.fromkeys(names, pen.glyph()))
    builder.setupHorizontalMetrics(dict.fromkeys(names, (900, 100)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": family, "styleName": "Regular", "psName": family.replace(" ", "")})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)
    fontManager.addfont(path)


def write(stem: Path, *texts: str) -> bytes:
    """The SVG of a figure with some texts; a warning is an error."""
    with warnings.catch_warnings(), figures.house_style():
        warnings.simplefilter("error")
        figure = figures.new_figure(3, 1)
        for number, text in enumerate(texts):
            figure.text(0.1, 0.1 + 0.2 * number, text)
        figures.save_figure(figure, stem)
    return stem.with_suffix(".svg").read_bytes()


def test_what_the_bundled_font_lacks_is_drawn_in_installed_ones(only_bundled_fonts, tmp_path):
    install_font(tmp_path / "han.ttf", "Test Han", "中文")
    install_font(tmp_path / "few.ttf", "Test A Few", "中")
    install_font(tmp_path / "hindi.ttf", "Test Hindi", "ह")
    assert figures.legible("中文 ह A") == "中文 ह A"
    svg = write(tmp_path / "figure", "中文 ह A")
    assert all(font in svg for font in (b"TestHan-", b"TestHindi-", b"DejaVuSans-")) and b"TestAFew-" not in svg


def test_text_that_the_bundled_font_covers_is_the_same_bytes_whatever_is_installed(only_bundled_fonts, tmp_path):
    texts = ["A name, naïve", "Кириллица, ελληνικά", "عربى", "✓ 100 %"]
    before = write(tmp_path / "before", *texts)
    install_font(tmp_path / "han.ttf", "A Test Han", "中")
    assert write(tmp_path / "after", *texts) == before
    assert (tmp_path / "after.png").read_bytes() == (tmp_path / "before.png").read_bytes()


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("北京", "\\u5317\\u4eac"),
        ("हि", "\\u0939\\u093f"),
        ("🦄 x", "\\U0001f984 x"),
        ("a\u3000b\u202fc", "a b\u202fc"),  # an ideographic space, and a narrow one, which the font has
        ("Ame\u0301lie", "Amélie"),
        ("\udcff", "\\udcff"),  # a byte of a file name that is not UTF-8
        ("a\x07b\u2066c", "abc"),
        ("a\nb", "a\nb"),
        ("$x_1$", "$x_1$"),
        ("", ""),
    ],
)
def test_what_no_font_has_is_escaped_without_a_warning(only_bundled_fonts, tmp_path, name, shown):
    assert figures.legible(name) == shown
    assert write(tmp_path / "a", name) == write(tmp_path / "b", shown)


def test_a_font_that_was_installed_after_matplotlib_looked_is_found(only_bundled_fonts, tmp_path, monkeypatch):
    install_font(tmp_path / "han.ttf", "Test Late", "中")
    monkeypatch.undo()
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    monkeypatch.setattr(fontManager, "ttflist", [f for f in fontManager.ttflist if "DejaVu" in f.name])
    monkeypatch.setattr(figures, "findSystemFonts", lambda: [str(path) for path in tmp_path.glob("*.ttf")])
    figures._look_for_new_fonts.cache_clear()
    assert figures.legible("中文") == "中\\u6587"
    figures._look_for_new_fonts.cache_clear()


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


def test_growth_of_embeddings_alone_and_of_virtual_classes_of_a_batch_is_drawn(tmp_path, monkeypatch):
    lines = [Line("plain", "X", "X", None), *(Line(name, f"{name} + X", f"{name} + X", "plain") for name in ("A", "B"))]
    columns = ["step", "num_virtual_classes", "num_virtual_embeddings"]
    growths = {("A", 1): [(0, 0, 0), (3, 0, 8), (4, 0, 9)], ("B", 1): [(0, 0, 0), (1, 128, 128)]}
    growths = {run: pd.DataFrame(rows, columns=columns) for run, rows in growths.items()}
    histories = {run: pd.DataFrame({"step": [10]}) for run in growths}
    said = []
    monkeypatch.setattr(curves.Axes, "annotate", lambda axes, text, *_, **__: said.append(text))
    curves.draw_growth(growths, histories, lines, tmp_path / "growth")
    assert said == ["128, to the last step (10)", "none before step 1"]


def test_each_wrapper_of_a_loss_has_its_own_dash_and_the_colour_of_the_loss():
    wrapped = [f"{wrapper.title} + X" for wrapper in WRAPPERS.values()]
    lines = [Line(name, name, name, None) for name in ("X", "X (control)", *wrapped)]
    styles = figures.line_styles(lines)
    assert len({style["color"] for style in styles.values()}) == 1
    assert len({style["linestyle"] for style in styles.values()}) == len(lines)


def test_each_control_of_a_loss_has_its_own_dash():
    lines = [Line("X", "X", "X", None), *(Line(name, name, f"X{figures.CONTROL}", "X") for name in "abcd")]
    styles = figures.line_styles(lines)
    assert len({style["linestyle"] for style in styles.values()}) == 5


@pytest.mark.parametrize(("count", "rows"), [(2, 1), (12, 6), (24, 24)])
def test_a_legend_is_no_wider_than_its_figure(count, rows):
    with figures.house_style():
        figure = figures.new_figure(6.4, 6.4)
        axes = figure.subplots()
        for number in range(count):
            axes.plot([0, 1], label=f"Norm-SoftMax (control of wrapper {number})" + " and more" * 3 * (count == 24))
        legend = figures.add_legend(figure, axes, "outside lower center", 2 if count > 2 else count)
        figure.draw_without_rendering()
    assert figure.legends == [legend]
    box = legend.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.width
    assert len({round(text.get_window_extent().y0) for text in legend.get_texts()}) == rows


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


@pytest.mark.parametrize(
    "points",
    [
        np.linspace(-1, 1, 20)[:, None],  # one dimension
        np.ones((20, 1)),
        np.ones((20, 4)),  # all the same
        np.zeros((20, 4)),  # none with a direction
        np.eye(4)[[0, 0, 0, 1, 1, 1]],  # two places
        np.concatenate([np.zeros((1, 4)), np.eye(4)]),
        np.eye(2),  # two points
        np.eye(3),
    ],
    ids=lambda points: f"{len(np.unique(points, axis=0))} of {points.shape}",
)
def test_a_map_of_degenerate_embeddings_has_a_place_for_each(points):
    places = tsne.embed_in_two_dimensions(points, 30.0, seed=0, iterations=(5, 5))
    assert places.shape == (len(points), 2) and np.isfinite(places).all()


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


def test_queries_apart_from_a_gallery_find_gallery_images():
    embeddings = {"A": np.eye(6)[[0, 1, 2, 0, 1, 2]] + 0.01}
    labels, is_query = np.array([7, 8, 9, 7, 8, 9]), np.array([False, False, False, True, True, True])
    queries, (ranking,) = neighbours.rank(embeddings, labels, is_query, per_kind=1, num_neighbours=9)
    assert queries == [("best", 3), ("typical", 5), ("worst", 4)]
    assert ranking.neighbours.shape == (3, 3) and ranking.neighbours[:, 0].tolist() == [0, 2, 1]
    assert ranking.average_precision.tolist() == [1, 1, 1]


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


def test_a_picture_is_shown_as_the_networks_are_decoded(tmp_path):
    random = np.random.default_rng(0)
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(random.integers(0, 256, (30, 20, 3), dtype=np.uint8)).save(tmp_path / "turned.png", exif=turned)
    wide = random.integers(0, 65536, (20, 20), dtype=np.uint16)
    Image.fromarray(wide).save(tmp_path / "wide.png")
    Image.fromarray(random.integers(0, 256, (20, 20, 4), dtype=np.uint8)).save(tmp_path / "transparent.png")
    turned_square, wide_square, transparent_square = (
        neighbours._thumbnail(tmp_path / f"{name}.png") for name in ("turned", "wide", "transparent")
    )
    np.testing.assert_array_equal(turned_square[5:25], decode(tmp_path / "turned.png", "rgb"))
    assert (turned_square[:5] == 255).all() and (turned_square[25:] == 255).all()
    np.testing.assert_array_equal(wide_square, np.rint(wide / 257))
    np.testing.assert_array_equal(transparent_square, decode(tmp_path / "transparent.png", "rgb"))
    (tmp_path / "damaged.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"damaged\.png: the file is empty"):
        neighbours._thumbnail(tmp_path / "damaged.png")


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("Acura_TL/Type-S", "Acura TL Type-S"),
        (
            "a class name that goes on and on for more than three lines of it",
            "a class name\nthat goes on and\non for more …",
        ),
        ("x" * 250, f"{'x' * 16}\n{'x' * 16}\n…"),
        ("中" * 40, f"{'中' * 8}\n{'中' * 8}\n…"),
        ("two\nlines\tof\u3000words", "two lines of\nwords"),
        ("___", "___"),
        (" \n", ""),
    ],
)
def test_a_class_name_takes_three_lines_at_most(only_bundled_fonts, tmp_path, name, shown):
    install_font(tmp_path / "han.ttf", "Test Han", "中")
    assert neighbours._short(name) == shown


def test_a_run_without_embeddings_is_an_error_that_names_the_file(tmp_path):
    with pytest.raises(UserError, match=r"test_embeddings\.npz: not found"):
        neighbours.read_embeddings(tmp_path / "test_embeddings.npz")
