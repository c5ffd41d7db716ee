"""The two tables: which image is of which class, and what a prepared data set holds."""

from pathlib import Path

import pytest

from memvir.errors import UserError
from memvir.images.annotation import read_annotation, write_annotation
from memvir.images.index import IndexRow, evaluated, read_index, write_index

MD5 = "0123456789abcdef" * 2
REPOSITORY = Path(__file__).parents[3]


def rows() -> list[IndexRow]:
    return [
        IndexRow("test", 3, "NA", "test/NA/1.jpg", MD5),
        IndexRow("train", 2, 'a "b", c', 'train/a "b", c/1.jpg', MD5),
        IndexRow("train", 1, "Zürich", "train/Zürich/2.jpg", MD5),
        IndexRow("train", 1, "Zürich", "train/Zürich/10.jpg", MD5),
    ]


def test_an_index_is_read_as_it_was_written_sorted_by_split_class_and_file(tmp_path: Path) -> None:
    write_index(tmp_path / "index.csv", rows())
    table = read_index(tmp_path / "index.csv")
    assert list(table.columns) == ["split", "class_id", "class_name", "file", "md5"]
    assert table["file"].tolist() == [
        "train/Zürich/10.jpg",
        "train/Zürich/2.jpg",
        'train/a "b", c/1.jpg',
        "test/NA/1.jpg",
    ]
    assert table["class_id"].tolist() == [1, 1, 2, 3] and table["class_id"].dtype == "int64"
    assert table["class_name"].tolist()[-1] == "NA", "no name is taken for a missing value"


def test_the_index_does_not_depend_on_the_order_of_its_rows(tmp_path: Path) -> None:
    write_index(tmp_path / "a.csv", rows())
    write_index(tmp_path / "b.csv", reversed(rows()))
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("train,1", "val,1", "'val' is not a valid split"),
        ("train,1", "train,x", "'x' is not a valid class_id"),
        ("train,1", "train,-1", "'-1' is not a valid class_id"),
        ("train/Zürich/2.jpg", "../2.jpg", "not a valid file"),
        ("train/Zürich/2.jpg", "/etc/x/2.jpg", "not a valid file"),
        ("train/Zürich/2.jpg", "train/../2.jpg", "not a valid file"),
        ("train/Zürich/2.jpg", "train/Zürich/10.jpg", "not a valid file"),
        ("train/Zürich/2.jpg", "train/Zürich/2\t.jpg", "not a valid file"),
        ("1,Zürich", '1,"Zü\nrich"', "not a valid class_name"),
        (MD5, "abc", "'abc' is not a valid md5"),
        ("split,", "part,", "expected the columns"),
        ("\n", "\n\0\0,,,,,,,,", "index.csv"),
    ],
)
def test_a_damaged_index_is_refused_by_name(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "index.csv"
    write_index(path, rows())
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(UserError, match=message) as caught:
        read_index(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_an_index_without_test_images_a_missing_and_an_empty_one_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "index.csv"
    with pytest.raises(UserError, match="not found; no images have been prepared"):
        read_index(path)
    path.write_text("")
    with pytest.raises(UserError, match="not a readable table"):
        read_index(path)
    write_index(path, rows()[1:])
    with pytest.raises(UserError, match="no test images"):
        read_index(path)


def test_queries_and_gallery_take_the_place_of_test_images_and_only_both(tmp_path: Path) -> None:
    path = tmp_path / "index.csv"
    (test, *train) = rows()
    query, gallery = (test._replace(split=split, file=f"{split}/NA/1.jpg") for split in ("query", "gallery"))
    write_index(path, [gallery, query, *train])
    assert evaluated(read_index(path))["split"].tolist() == ["query", "gallery"]
    for wrong, message in (([query], "no gallery images"), ([query, gallery, test], "unexpected test images")):
        write_index(path, [*wrong, *train])
        with pytest.raises(UserError, match=message):
            read_index(path)


def test_cars196_annotation_is_the_protocol_s() -> None:
    classes = read_annotation(REPOSITORY / "dataset/cars196/source/annotation.csv")
    assert [cls.class_id for cls in classes] == list(range(1, 197))
    assert sorted(number for cls in classes for number in cls.images) == list(range(1, 16186))
    for split, count in (("train", 8054), ("test", 8131)):
        assert sum(len(cls.images) for cls in classes if cls.split == split) == count
        assert sum(cls.split == split for cls in classes) == 98
    assert classes[0].folder == "001_AM_General_Hummer_SUV_2000"
    assert classes[173].folder == "174_Ram_C-V_Cargo_Van_Minivan_2012"
    assert len(classes[118].images) == 136, "class 119 comes in two runs"
    assert len({cls.folder for cls in classes}) == 196


def test_an_annotation_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "annotation.csv"
    write_annotation(path, [(1, 2, 1, 'A, "b"'), (3, 3, 2, "C/D"), (4, 5, 1, 'A, "b"')])
    first, second = read_annotation(path)
    assert (first.name, first.split, first.images) == ('A, "b"', "train", (1, 2, 4, 5))
    assert (second.name, second.split, second.folder) == ("C/D", "test", "002_C-D")


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([(1, 2, 1, "a"), (2, 3, 2, "b")], "line 3: image 2 is listed twice"),
        ([(1, 2, 1, "a"), (2, 3, 1, "a"), (4, 4, 2, "b")], "line 3: image 2 is listed twice"),
        ([(1, 2, 1, "a"), (3, 3, 1, "b")], "line 3: class 1 needs one name"),
        ([(2, 1, 1, "a"), (3, 3, 2, "b")], "line 2: not a run"),
        ([(1, 10**12, 1, "a"), (3, 3, 2, "b")], "line 2: not a run"),
        ([(1, 2, 1, "a"), (3, 3, 3, "b")], "class ids must run from 1 to 2"),
        ([(1, 2, 1, "a")], "at least two classes"),
        ([(1, 2, 1, "a\nb"), (3, 3, 2, "b")], "line 3: the class name 'a.nb' holds control characters"),
        ([(1, 2, 1, ""), (3, 3, 2, "b")], "line 2: class 1 needs one name"),
        ([(1, "x", 1, "a"), (3, 3, 2, "b")], "line 2: .*whole numbers"),
    ],
)
def test_an_inconsistent_annotation_is_refused_naming_the_line(tmp_path: Path, runs: list, message: str) -> None:
    write_annotation(tmp_path / "annotation.csv", runs)
    with pytest.raises(UserError, match=message):
        read_annotation(tmp_path / "annotation.csv")


def test_a_missing_annotation_says_how_to_get_it_back(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="git checkout"):
        read_annotation(tmp_path / "annotation.csv")
