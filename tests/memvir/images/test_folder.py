"""A folder of one's own images, in good order and in every disorder."""

import logging
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from memvir.errors import UserError
from memvir.images.index import read_index
from memvir.images.sources.folder import OwnFolder

DATA = OwnFolder(source="folder")
LAYOUT = {"train": ("ant", "bee"), "test": ("cat", "Dog, the 2nd")}
SUFFIXES = ("jpg", "png", "bmp", "webp", "tif")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """dataset/NAME/source with five images in five formats for each of four classes."""
    random = np.random.default_rng(0)
    for split, classes in LAYOUT.items():
        for name in classes:
            (tmp_path / "source" / split / name).mkdir(parents=True)
            for suffix in SUFFIXES:
                pixels = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "source" / split / name / f"1.{suffix}")
    return tmp_path / "source"


def prepare(source: Path) -> Path:
    place = source.parent
    DATA.download(source, place / "download")
    DATA.prepare(source, place / "download", place / "images", place / "index.csv")
    return place


def test_images_of_all_formats_are_indexed_and_linked(source: Path) -> None:
    place = prepare(source)
    index = read_index(place / "index.csv")
    assert len(index) == 20
    names = index.drop_duplicates("class_id")
    assert names[["split", "class_id", "class_name"]].to_numpy().tolist() == [
        ["train", 1, "ant"],
        ["train", 2, "bee"],
        ["test", 3, "Dog, the 2nd"],
        ["test", 4, "cat"],
    ]
    for file in index["file"]:
        assert (place / "images" / file).samefile(source / file)


def test_the_index_is_a_function_of_the_images(source: Path) -> None:
    first = (prepare(source) / "index.csv").read_bytes()
    assert (prepare(source) / "index.csv").read_bytes() == first
    (source / "train" / "ant" / "2.png").write_bytes((source / "train" / "ant" / "1.png").read_bytes())
    assert (prepare(source) / "index.csv").read_bytes() != first
    (source / "train" / "ant" / "2.png").unlink()
    assert (prepare(source) / "index.csv").read_bytes() == first


def test_source_may_be_a_link_and_so_may_its_images(source: Path, tmp_path: Path) -> None:
    ant = source / "train" / "ant"
    (ant / "1.png").rename(tmp_path / "picture")
    (tmp_path / "link").symlink_to(tmp_path / "picture")
    for name in ("1.png", "the same.png"):
        (ant / name).symlink_to(tmp_path / "link")
    source.symlink_to(source.rename(tmp_path / "elsewhere"))
    place = prepare(source)
    assert len(read_index(place / "index.csv")) == 21
    linked = place / "images" / "train" / "ant" / "1.png"
    assert linked.samefile(tmp_path / "picture") and not linked.is_symlink()


def test_a_shared_class_name_is_a_warning_and_no_more(source: Path, caplog: pytest.LogCaptureFixture) -> None:
    (source / "test" / "cat").rename(source / "test" / "ant")
    with caplog.at_level(logging.WARNING, logger="memvir"):
        place = prepare(source)
    assert "share 1 class name(s) (ant)" in caplog.text and "\n" not in caplog.records[0].getMessage()
    index = read_index(place / "index.csv")
    assert index[index["class_name"] == "ant"]["class_id"].nunique() == 1
    assert (index["split"] == "test").sum() == 10


def test_what_systems_leave_in_folders_is_left_out_with_a_word(source: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in (".DS_Store", "train/.DS_Store", "train/ant/.DS_Store", "train/ant/Thumbs.db", "train/ant/._1.jpg"):
        (source / name).write_bytes(b"")
    (source / "test" / ".ipynb_checkpoints").mkdir()
    (source / "test" / ".ipynb_checkpoints" / "1.jpg").write_bytes(b"")
    (source / "undecodable \udcff").write_bytes(b"")
    (source / "validation").mkdir()
    (source / "validation" / "1.jpg").write_bytes(b"")
    with caplog.at_level(logging.WARNING, logger="memvir"):
        assert len(read_index(prepare(source) / "index.csv")) == 20
    assert caplog.messages == [
        f"warning: {source}: left out 8 that are no images of the data set: .DS_Store, test/.ipynb_checkpoints, "
        "train/.DS_Store, train/ant/.DS_Store, train/ant/._1.jpg, ..."
    ]


NAMES = [
    ".22 rifle",
    "narrow\u202fspace",
    "wide\u3000space",
    "non\u200cjoiner",
    "soft\u00adhyphen",
    "private \ue000",
    "line\u2028separator",
    "family \U0001f468\u200d\U0001f469\u200d\U0001f467",
    "right\u202eto left",
    "back\\slash",
    "C:",
    'a "quoted", name',
    " spaces around ",
    "e\u0301",
    "\u00e9",
    "ANT",
    "x" * 255,
    "\u4e2d" * 83,
]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_class_and_an_image_are_called_whatever_a_file_system_accepts(
    source: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    (source / "train" / "bee" / "1.png").rename(source / "train" / "bee" / name)
    (source / "train" / "bee").rename(source / "train" / name)
    for _ in range(2):  # the second time over what lies there
        with caplog.at_level(logging.WARNING, logger="memvir"):
            place = prepare(source)
        index = read_index(place / "index.csv")
        assert len(index) == 20 and f"train/{name}/{name}" in set(index["file"])
        assert index.loc[index["file"] == f"train/{name}/{name}", "class_name"].item() == name
        assert {str(p.relative_to(place / "images")) for p in (place / "images").glob("*/*/*")} == set(index["file"])
    assert caplog.messages == []


def test_classes_that_differ_by_case_are_two_where_the_file_system_tells_them_apart(source: Path) -> None:
    (source / "train" / "bee").rename(source / "train" / "ANT")
    index = read_index(prepare(source) / "index.csv")
    assert set(index.loc[index["split"] == "train", "class_name"]) == {"ANT", "ant"}


@pytest.mark.parametrize(("first", "second"), [("ant", "ANT"), ("caf\u00e9", "cafe\u0301")], ids=ascii)
@pytest.mark.parametrize("kind", ["class", "image"])
def test_names_that_the_file_system_takes_for_one_are_refused(
    source: Path, kind: str, first: str, second: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = source / "train" if kind == "class" else source / "train" / "ant"
    old = ("ant", "bee") if kind == "class" else ("1.jpg", "1.png")
    for name, new in zip(old, (first, second), strict=True):
        (folder / name).rename(folder / new)
    exists = Path.exists

    def forgiving(path: Path) -> bool:
        """As on APFS and NTFS."""
        return exists(path) or (
            path.parent.exists() and _folded(path.name) in {_folded(other.name) for other in path.parent.iterdir()}
        )

    monkeypatch.setattr(Path, "exists", forgiving)
    with pytest.raises(UserError, match="are one name on this file system; rename one of them") as caught:
        prepare(source)
    assert first in str(caught.value) and second in str(caught.value)
    assert not exists(source.parent / "index.csv")


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def break_off(source: Path) -> Path:
    path = source / "train" / "bee" / "1.jpg"
    path.write_bytes(path.read_bytes()[:300])
    return path


def add_text(source: Path) -> Path:
    path = source / "test" / "cat" / "notes.txt"
    path.write_text("buy milk")
    return path


def add_empty_file(source: Path) -> Path:
    path = source / "test" / "cat" / "2.jpg"
    path.write_bytes(b"")
    return path


def add_dead_link(source: Path) -> Path:
    path = source / "test" / "cat" / "2.jpg"
    path.symlink_to("/nowhere")
    return path


def add_empty_class(source: Path) -> Path:
    path = source / "train" / "fly"
    path.mkdir()
    return path


def add_file_beside_the_classes(source: Path) -> Path:
    path = source / "train" / "1.jpg"
    path.write_bytes(b"")
    return path


def add_folder_in_a_class(source: Path) -> Path:
    path = source / "train" / "ant" / "small" / "1.jpg"
    path.parent.mkdir()
    path.write_bytes(b"")
    return path.parent


def link_test_to_train(source: Path) -> Path:
    shutil.rmtree(source / "test")
    (source / "test").symlink_to("train")
    return source / "test"


def link_two_classes_to_one_folder(source: Path) -> Path:
    shutil.rmtree(source / "train" / "bee")
    (source / "train" / "bee").symlink_to("ant")
    return source / "train" / "bee"


def link_a_class_upwards(source: Path) -> Path:
    (source / "train" / "ant" / "all").symlink_to(source)
    return source / "train" / "ant" / "all"


def link_in_a_circle(source: Path) -> Path:
    (source / "train" / "ant" / "2.png").symlink_to("3.png")
    (source / "train" / "ant" / "3.png").symlink_to("2.png")
    return source / "train" / "ant" / "2.png"


def hide_a_picture_from_dvc(source: Path) -> Path:
    (source.parent / ".dvcignore").write_text("source/train/ant/*.png")
    return source.parent


def put_a_dvc_project_into_a_class(source: Path) -> Path:
    (source / "train" / "ant" / ".dvc").mkdir()
    return source / "train" / "ant"


def add_file_with_a_line_break(source: Path) -> Path:
    (source / "train" / "ant" / "a\nb.jpg").write_bytes(b"")
    return source / "train" / "ant"


def add_undecodable_class(source: Path) -> Path:
    (source / "train" / "a\udcffb").mkdir()
    return source / "train"


def remove_test(source: Path) -> Path:
    (source / "test").rename(source / "validation")
    return source / "test"


def remove_classes(source: Path) -> Path:
    for path in (source / "test").iterdir():
        path.rename(source / "train" / path.name)
    return source / "test"


def remove_source(source: Path) -> Path:
    source.rename(source.parent / "elsewhere")
    return source


def break_link(source: Path) -> Path:
    remove_source(source).symlink_to("/nowhere")
    return source


@pytest.mark.parametrize(
    ("disorder", "message"),
    [
        (break_off, "not a readable image"),
        (add_text, "not an image"),
        (add_empty_file, "empty"),
        (add_dead_link, "cannot be read: No such file"),
        (add_empty_class, "no images"),
        (add_file_beside_the_classes, "not a class folder"),
        (add_folder_in_a_class, "a folder inside a class folder"),
        (link_test_to_train, "a link to a folder, behind which changes would go unnoticed; put .* `cp -rs"),
        (link_two_classes_to_one_folder, "a link to a folder"),
        (link_a_class_upwards, "a link to a folder"),
        (link_in_a_circle, "Too many levels of symbolic links"),
        (put_a_dvc_project_into_a_class, "holds .dvc, a project of its own"),
        (hide_a_picture_from_dvc, r"\.dvcignore: may hide images from DVC"),
        (add_file_with_a_line_break, "holds control characters"),
        (add_undecodable_class, "holds control characters or bytes that are no text"),
        (remove_test, "not found; put images into"),
        (remove_classes, "no classes; put images into"),
        (remove_source, "not found; put images into"),
        (break_link, "leads to /nowhere, which does not exist"),
    ],
)
def test_disorder_is_one_line_that_names_the_place(source: Path, disorder, message: str) -> None:
    place = disorder(source)
    with pytest.raises(UserError, match=message) as caught:
        prepare(source)
    assert str(caught.value).startswith(str(place)) and "\n" not in str(caught.value)
    assert not (source.parent / "index.csv").exists()
