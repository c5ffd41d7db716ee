"""The Grocery Store Dataset: what is accepted, how it is split, and what a wrong file is told."""

import pytest

from memvir.errors import UserError
from memvir.files import file_hash
from memvir.images.index import read_index
from memvir.images.plans import check_counts
from memvir.images.sources.grocery import Grocery
from tests.benchmark_stand_ins import Listing, Members
from tests.cars196_stand_in import picture, write_zip

TOP = "GroceryStoreDataset-master/"


def settings(**given) -> Grocery:
    return Grocery(**{"source": "grocery", "addresses": [], "md5": None, **given})


def members(counts: dict[str, tuple[int, int]]) -> Members:
    """Lists and pictures of so many kinds, one of them in two folders, and what else the archive holds."""
    kinds = sum(classes for _, classes in counts.values())
    lists, content = {"train": "", "val": "", "test": ""}, {}
    left = {split: images for split, (images, _) in counts.items()}
    for label in range(kinds):
        split = "test" if label % 2 else "train"
        last = label >= kinds - 2
        number_of = left[split] if last else counts[split][0] // counts[split][1]
        left[split] -= number_of
        for number in range(number_of):
            part = ("train", "val", "test")[number % 3]
            kind = ("Fruit/Apple", "Packages/Sour-Milk", "Vegetables")[label % 3]
            folder = f"{kind}/Kind-{label}" if label or number % 2 else f"Fruit/Kind-{label}"
            path = f"{part}/{folder}/Kind-{label}_{number:03}.jpg"
            lists[part] += f"{path}, {label}, {label // 2}\n"
            content[f"{TOP}dataset/{path}"] = picture(number)
    for part, rows in lists.items():
        content[f"{TOP}dataset/{part}.txt"] = rows.encode()
    for name in ("dataset/iconic-images-and-descriptions/Fruit/Apple/A/A_Iconic.jpg", "sample_images/natural/B.jpg"):
        content[TOP + name] = picture(0)
    return content


def test_every_second_kind_trains_and_what_is_no_photograph_stays_out(tmp_path):
    archive = Listing(members(Grocery.counts))
    plan = settings().plan(archive, tmp_path)
    check_counts(archive, plan, Grocery.counts)
    assert {row.split for row in plan.values() if row.class_id % 2} == {"test"}
    assert {row.split for row in plan.values() if row.class_id % 2 == 0} == {"train"}
    assert not any("conic" in name or "sample" in name for name in plan)
    row = plan[f"{TOP}dataset/val/Packages/Sour-Milk/Kind-4/Kind-4_001.jpg"]
    assert row[:4] == ("train", 4, "Kind 4", "train/04_Kind-4/val_Kind-4_001.jpg")


def test_an_archive_in_source_becomes_folders_and_an_index(tmp_path, monkeypatch):
    counts = {"train": (12, 3), "test": (9, 2)}
    monkeypatch.setattr(Grocery, "counts", counts)
    content = members(counts)
    write_zip(tmp_path / "source" / Grocery.official, iter(content.items()))
    settings().download(tmp_path / "source", tmp_path / "download")
    settings().prepare(tmp_path / "source", tmp_path / "download", tmp_path / "images", tmp_path / "index.csv")
    index = read_index(tmp_path / "index.csv")
    found = index.groupby("split")["class_id"].agg(["size", "nunique"])
    assert {split: tuple(row) for split, row in zip(found.index, found.to_numpy().tolist(), strict=True)} == counts
    assert all(file_hash(tmp_path / "images" / row.file) == row.md5 for row in index.itertuples())


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b", 2, 1\n", b", two, 1\n", r"train\.txt, line \d+: expected `PATH, class, coarse class`, found"),
        (b"Kind-2_000.jpg", b"../Kind-2.jpg", r"train\.txt, line \d+: expected `PATH, class, coarse class`, found"),
        (b"Kind-2_000.jpg", b"Kind-2_900.jpg", r"1 missing: .*Kind-2_900\.jpg; 1 extra: .*Kind-2_000\.jpg"),
        (b", 2, 1\n", b", 1, 1\n", r"not the data set's protocol, whose train split has 12 images of 3 classes; here"),
    ],
)
def test_a_list_that_is_not_the_data_sets_is_one_line(tmp_path, monkeypatch, old, new, message):
    counts = {"train": (12, 3), "test": (9, 2)}
    monkeypatch.setattr(Grocery, "counts", counts)
    content = members(counts)
    content[f"{TOP}dataset/train.txt"] = content[f"{TOP}dataset/train.txt"].replace(old, new)
    write_zip(tmp_path / "archive.zip", iter(content.items()))
    with pytest.raises(UserError, match=message) as caught:
        settings(archive=tmp_path / "archive.zip").download(tmp_path / "source", tmp_path / "download")
    assert "\n" not in str(caught.value)
