"""A folder of one's own images, in good order and in every disorder."""

import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from memvir.config import FolderData
from memvir.datasets import folder, read_index
from memvir.errors import UserError

DATA = FolderData(source="folder")
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
    folder.download(DATA, source, place / "download")
    folder.prepare(DATA, source, place / "download", place / "images", place / "index.csv")
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


def test_source_may_be_a_link_and_so_may_its_classes_and_images(source: Path, tmp_path: Path) -> None:
    elsewhere = source.rename(tmp_path / "elsewhere")
    (elsewhere / "train" / "ant").rename(tmp_path / "ants")
    (elsewhere / "train" / "ant").symlink_to(tmp_path / "ants")
    (tmp_path / "ants" / "1.png").rename(tmp_path / "picture")
    (tmp_path / "ants" / "1.png").symlink_to(tmp_path / "picture")
    source.symlink_to(elsewhere)
    place = prepare(source)
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


def test_what_systems_leave_in_folders_is_ignored(source: Path) -> None:
    for name in (".DS_Store", "train/.DS_Store", "train/ant/.DS_Store", "train/ant/Thumbs.db", "train/ant/._1.jpg"):
        (source / name).write_bytes(b"")
    (source / "test" / ".ipynb_checkpoints").mkdir()
    assert len(read_index(prepare(source) / "index.csv")) == 20


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


def add_unprintable_file(source: Path) -> Path:
    (source / "train" / "ant" / "a\nb.jpg").write_bytes(b"")
    return source / "train" / "ant"


def add_unprintable_class(source: Path) -> Path:
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
        (add_unprintable_file, "not printable"),
        (add_unprintable_class, "not printable"),
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
