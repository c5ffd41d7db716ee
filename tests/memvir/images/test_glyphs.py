"""The embedded data set is a function of its recipe and its table of characters, byte for byte."""

from pathlib import Path

import numpy as np
import pytest

from memvir.errors import UserError
from memvir.files import file_hash
from memvir.images import glyph_drawings
from memvir.images.index import read_index
from memvir.images.sources.glyphs import ARCHIVE, Glyphs

SOURCE = Path(__file__).parents[3] / "dataset" / "glyphs" / "source"


def recipe(**given: int) -> Glyphs:
    return Glyphs(**{"source": "glyphs", "images_per_class": 20, "size": 32, "seed": 0, **given})


@pytest.fixture
def few(tmp_path: Path) -> Path:
    """A source of four characters."""
    folder = tmp_path / "source"
    folder.mkdir()
    rows = [f"{number},{glyph_drawings.class_name(character)}\n" for number, character in enumerate("A&Ж╬", 1)]
    (folder / "annotation.csv").write_text("class_id,class_name\n" + "".join(rows))
    return folder


def make(source: Path, place: Path, **given: int) -> Path:
    recipe(**given).download(source, place / "download")
    recipe(**given).prepare(source, place / "download", place / "images", place / "index.csv")
    return place


def test_the_table_names_196_distinct_characters_by_code_point_and_name() -> None:
    characters = glyph_drawings.read_characters(SOURCE / "annotation.csv")
    assert len(characters) == 196
    lines = (SOURCE / "annotation.csv").read_text().splitlines()[1:]
    assert lines == [
        f"{number},{glyph_drawings.class_name(character)}" for number, character in enumerate(characters, 1)
    ]


def test_every_character_is_drawn_by_every_typeface_in_a_shape_of_its_own() -> None:
    for typeface in glyph_drawings._typefaces(64):
        drawings = {
            character: glyph_drawings._draw(character, typeface, 64).tobytes()
            for character in glyph_drawings.read_characters(SOURCE / "annotation.csv")
        }
        assert len(set(drawings.values())) == 196


def test_the_whole_set_has_the_counts_of_its_recipe(tmp_path: Path) -> None:
    place = make(SOURCE, tmp_path)
    index = read_index(place / "index.csv")
    assert index.groupby("split")["class_id"].agg(["nunique", "size"]).to_numpy().tolist() == [[98, 1960]] * 2
    assert (index.groupby("class_id").size() == 20).all()
    assert not index["md5"].duplicated().any()


def test_the_same_recipe_gives_the_same_bytes_and_another_seed_gives_others(few: Path, tmp_path: Path) -> None:
    def archive(name: str, **given: int) -> str:
        return file_hash(make(few, tmp_path / name, **given) / "download" / ARCHIVE)

    assert archive("a") == archive("b")
    assert archive("a") != archive("c", seed=1)


def test_more_images_per_class_leave_the_first_ones_as_they_are(few: Path, tmp_path: Path) -> None:
    some = glyph_drawings.render("A", 1, 3, 32, 0)
    more = glyph_drawings.render("A", 1, 40, 32, 0)
    for first, second in zip(some, more, strict=False):
        np.testing.assert_array_equal(first, second)
    index = read_index(make(few, tmp_path, images_per_class=40) / "index.csv")
    assert (index.groupby("class_id").size() == 40).all()


def test_characters_that_test_can_have_more_images(few: Path, tmp_path: Path) -> None:
    plain = read_index(make(few, tmp_path / "plain", images_per_class=3) / "index.csv").query("split == 'train'")
    index = read_index(make(few, tmp_path / "more", images_per_class=3, test_images_per_class=5) / "index.csv")
    assert index.groupby("split")["class_id"].value_counts().groupby("split").unique().to_dict() == {
        "train": [3],
        "test": [5],
    }
    train = index.query("split == 'train'")
    assert train[["file", "md5"]].values.tolist() == plain[["file", "md5"]].values.tolist(), "training stays as it was"


@pytest.mark.parametrize("size", [1, 8, 100])
def test_images_have_the_size_of_the_recipe_and_fill_it(size: int) -> None:
    images = list(glyph_drawings.render("B", 1, 16, size, 0))
    assert all(image.shape == (size, size) and image.dtype == np.uint8 for image in images)
    if size > 1:
        assert all(image.max() > 100 and np.median(image) < 50 for image in images), "light ink, dark ground"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("1,U+0041", "7,U+0041", "line 2: expected the columns"),
        ("U+0041", "A", "line 2: class_name must begin with a code point"),
        ("U+0041", "U+FFFFFF", "line 2: class_name must begin with a code point"),
        ("U+0041", "U+0026", "each once"),
        ("U+0041", "U+0020", "SPACE leaves no ink"),
        ("U+0041", "U+4E2D", r"CJK UNIFIED IDEOGRAPH-4E2D is not in DejaVuSans"),
        ("class_id", "id", "expected the columns"),
    ],
)
def test_a_wrong_table_is_refused_by_name(few: Path, tmp_path: Path, old: str, new: str, message: str) -> None:
    path = few / "annotation.csv"
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(UserError, match=message) as caught:
        make(few, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_missing_table_says_how_to_get_it_back(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="git checkout"):
        make(tmp_path, tmp_path)
