"""CUB-200-2011, SOP and In-Shop: what is accepted, how it is split, and what a wrong file is told."""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from memvir.errors import UserError
from memvir.files import file_hash
from memvir.images.decode import decode
from memvir.images.index import read_index, write_index
from memvir.images.plans import check_counts
from memvir.images.sources.benchmark import Benchmark
from memvir.images.sources.cub200 import Cub200
from memvir.images.sources.inshop import PARTITION, InShop
from memvir.images.sources.sop import Sop
from tests import benchmark_stand_ins as stand_ins
from tests.benchmark_stand_ins import TINY, Listing, Members
from tests.cars196_stand_in import write_folder, write_tar, write_zip
from tests.http_server import MisbehavingServer

SOURCES: dict[str, tuple[type[Benchmark], Callable[..., Members]]] = {
    "cub200": (Cub200, stand_ins.cub200),
    "sop": (Sop, stand_ins.sop),
    "inshop": (InShop, stand_ins.inshop),
}
PUBLISHED = {
    "cub200": {"train": (5864, 100), "test": (5924, 100)},
    "sop": {"train": (59551, 11318), "test": (60502, 11316)},
    "inshop": {"train": (25882, 3997), "query": (14218, 3985), "gallery": (12612, 3985)},
}


def settings(name: str, **given: Any) -> Benchmark:
    return SOURCES[name][0](**{"source": name, "addresses": [], "md5": None, **given})


def expect(monkeypatch: pytest.MonkeyPatch, members: Members) -> None:
    """Take the stand-in's list and bytes for In-Shop's own."""
    partition = next(content for name, content in members.items() if name.endswith(PARTITION))
    monkeypatch.setattr(InShop, "partition_sha256", hashlib.sha256(partition).hexdigest())
    size = sum(len(content) for name, content in members.items() if name.endswith(".jpg"))
    monkeypatch.setattr(InShop, "picture_bytes", size)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Members]:
    """The members of a tiny stand-in, which are taken for the real counts."""

    def make(name: str) -> Members:
        kind, members_of = SOURCES[name]
        monkeypatch.setattr(kind, "counts", TINY[name])
        members = members_of(TINY[name])
        if name == "inshop":
            expect(monkeypatch, members)
        return members

    return make


@pytest.mark.parametrize("name", SOURCES)
def test_the_protocols_counts_are_the_published_ones_and_every_image_gets_its_place(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = SOURCES[name][1](PUBLISHED[name])
    if name == "inshop":
        expect(monkeypatch, members)
    archive = Listing(members)
    plan = settings(name).plan(archive, tmp_path)
    assert SOURCES[name][0].counts == PUBLISHED[name]
    check_counts(archive, plan, PUBLISHED[name])
    write_index(tmp_path / "index.csv", (row._replace(md5="0" * 32) for row in plan.values()))
    index = read_index(tmp_path / "index.csv")
    found = {split: (len(rows), rows["class_id"].nunique()) for split, rows in index.groupby("split")}
    assert found == PUBLISHED[name]
    assert list(index["split"].unique()) == list(PUBLISHED[name])
    trained, evaluated = (set(index[(index["split"] == "train") == half]["class_id"]) for half in (True, False))
    assert max(trained) == PUBLISHED[name]["train"][1] and min(evaluated) == max(trained) + 1


@pytest.mark.parametrize("name", SOURCES)
def test_an_address_gives_the_archive_and_the_archive_every_image(
    name: str, tiny: Callable[[str], Members], tmp_path: Path, server: MisbehavingServer
) -> None:
    members = tiny(name)
    data = settings(name)
    archive = write_zip(tmp_path / data.official, iter(members.items()))
    addresses = [server.address("gone"), server.serve(data.official, archive.read_bytes(), cut_at=[2000])]
    data = settings(name, addresses=addresses, md5=file_hash(archive))
    data.download(tmp_path / "source", tmp_path / "download")
    assert json.loads((tmp_path / "download/source.json").read_text())["source"] == addresses[1]
    data.prepare(tmp_path / "source", tmp_path / "download", tmp_path / "images", tmp_path / "index.csv")
    index = read_index(tmp_path / "index.csv")
    assert Counter(index["split"]) == {split: images for split, (images, _) in TINY[name].items()}
    for row in index.itertuples():
        path = tmp_path / "images" / row.file
        assert file_hash(path) == row.md5
        assert decode(path, "bgr").ndim == 3, "grey pictures too"


@pytest.mark.parametrize("name", SOURCES)
def test_a_folder_and_a_tar_in_source_do_as_well(name: str, tiny: Callable[[str], Members], tmp_path: Path) -> None:
    members = tiny(name)
    folder = write_folder(tmp_path / "unpacked", iter(members.items()))
    settings(name, folder=folder).download(tmp_path / "nothing", tmp_path / "download")
    write_tar(tmp_path / "source" / "other.tar", iter(members.items()))
    settings(name).download(tmp_path / "source", tmp_path / "download")
    assert json.loads((tmp_path / "download/source.json").read_text())["path"].endswith("other.tar")


def test_birds_in_class_folders_need_no_lists(tiny: Callable[[str], Members], tmp_path: Path) -> None:
    members = {name: content for name, content in tiny("cub200").items() if name.endswith(".jpg")}
    plan = settings("cub200").plan(Listing(members), tmp_path)
    assert plan["CUB_200_2011/images/005.Bird_of_kind/Bird_Of_Kind_0000_5.jpg"][:4] == (
        "test",
        5,
        "Bird of kind",
        "test/005.Bird_of_kind/Bird_Of_Kind_0000_5.jpg",
    )


def test_img_zip_and_its_partition_may_lie_beside_each_other(tiny: Callable[[str], Members], tmp_path: Path) -> None:
    members = tiny("inshop")
    pictures = {name.removeprefix("Img/"): content for name, content in members.items() if name.endswith(".jpg")}
    write_zip(tmp_path / "source" / "img.zip", iter(pictures.items()))
    with pytest.raises(UserError, match=rf"img\.zip: holds no {PARTITION}, nor is it beside it or in "):
        settings("inshop", archive=tmp_path / "source" / "img.zip").download(tmp_path / "x", tmp_path / "download")
    (tmp_path / "source" / PARTITION).write_bytes(members[f"Eval/{PARTITION}"])
    settings("inshop").download(tmp_path / "source", tmp_path / "download")
    settings("inshop", archive=tmp_path / "source" / "img.zip").download(tmp_path / "x", tmp_path / "download")


def test_copies_that_were_resized_are_taken_and_named(
    tiny: Callable[[str], Members], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    members = tiny("sop")
    path = "table_final/111194782300_0.JPG"
    old = next(name for name in members if name.endswith(".JPG"))
    for name in members:
        if name.endswith(".txt"):
            members[name] = members[name].replace(old.removeprefix("Stanford_Online_Products/").encode(), path.encode())
    members[f"Stanford_Online_Products/{path}"] = members.pop(old)
    archive = write_zip(tmp_path / "sop224.zip", iter(members.items()))
    with caplog.at_level(logging.INFO, logger="memvir"):
        settings("sop", archive=archive).download(tmp_path / "source", tmp_path / "download")
        settings("sop").prepare(tmp_path / "source", tmp_path / "download", tmp_path / "images", tmp_path / "index.csv")
    told = json.loads((tmp_path / "download/source.json").read_text())["pictures"]
    assert told.startswith(f"copies, not the original pictures: Stanford_Online_Products/{path} has ")
    assert f"warning: {archive}: {told}" in caplog.text
    assert f"preparing {archive} (data.archive; {told})" in caplog.text


def line(old: str, new: str) -> Callable[[bytes], bytes]:
    return lambda content: content.replace(old.encode(), new.encode(), 1)


WRONG = {
    "a bird of another number of columns": (
        "cub200",
        "images.txt",
        line("3 001.", "3 1 001."),
        r"images\.txt, line 3: ",
    ),
    "a bird's path that leads out": (
        "cub200",
        "images.txt",
        line("1 001.Bird_of_kind/Bird", "1 ../Bird"),
        r"images\.txt, line 1: expected `image_id CLASS/NAME`, found '1 \.\./Bird",
    ),
    "a bird of two classes": (
        "cub200",
        "image_class_labels.txt",
        line("3 1\n", "3 2\n"),
        r"image_class_labels\.txt: image 3 is of class 2, and of class 1 in .*images\.txt",
    ),
    "a bird that is listed only": ("cub200", "Bird_Of_Kind_0000_1.jpg", None, r"1 missing: 001\.Bird_of_kind/Bird_Of"),
    "a list of birds that is no text": ("cub200", "images.txt", lambda _: b"\xff\xfe", "images.txt: not a text file"),
    "an empty list of birds": ("cub200", "images.txt", lambda _: b"", "image 1 is of class 1, and of class none in"),
    "an empty partition": (
        "inshop",
        PARTITION,
        lambda c: b"\n".join(c.splitlines()[:2]),
        "lists no picture of the data set",
    ),
    "an article with an unknown column": (
        "sop",
        "Ebay_train.txt",
        line("class_id path", "class_id path price"),
        r"Ebay_train\.txt, line 1: expected 'image_id class_id super_class_id path', found",
    ),
    "an article's path that leads out": (
        "sop",
        "Ebay_test.txt",
        line("bicycle_final/", "../bicycle_final/"),
        r"Ebay_test\.txt, line \d+: expected `image_id class_id super_class_id path`, found",
    ),
    "an article without its list": ("sop", "Ebay_test.txt", None, r"holds no Ebay_test\.txt"),
    "an article that is not listed": ("sop", "Ebay_test.txt", lambda c: c[: c[:-1].rindex(b"\n") + 1], "1 extra: Stan"),
    "an article of both halves": (
        "sop",
        "Ebay_test.txt",
        lambda c: c.replace(b" 6 ", b" 5 "),
        "1 classes are in train and in test",
    ),
    "a partition of another count": ("inshop", PARTITION, line("57\n", "58\n"), r"line 1: expected '57', found '58'"),
    "a partition of a fourth status": ("inshop", PARTITION, line("   train", "   probe"), r"line 3: expected `image_n"),
    "a partition that names another file": (
        "inshop",
        PARTITION,
        line("id_00000006    query", "id_00000006    gallery"),
        "sha256 is [0-9a-f]{64}, expected",
    ),
    "pictures of a high resolution": ("inshop", "00_train.jpg", lambda c: c * 2, "high-resolution pictures, .* bytes"),
    "shrunk pictures": ("inshop", "00_train.jpg", lambda c: c[:-1], "shrunk pictures"),
}


@pytest.mark.parametrize(("name", "file", "change", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_file_is_one_line_and_loses_nothing(
    name: str, file: str, change: Any, message: str, tiny: Callable[[str], Members], tmp_path: Path
) -> None:
    members = tiny(name)
    place = next(member for member in members if member.endswith(file))
    content = members.pop(place)
    if change is not None:
        members[place] = change(content)
    archive = write_zip(tmp_path / "archive.zip", iter(members.items()))
    with pytest.raises(UserError, match=message) as caught:
        settings(name, archive=archive).download(tmp_path / "source", tmp_path / "download")
    assert "\n" not in str(caught.value) and str(archive) in str(caught.value)
    assert archive.exists() and not (tmp_path / "download").exists()


def test_an_image_too_few_is_told_by_the_protocols_counts(
    tiny: Callable[[str], Members], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = write_zip(tmp_path / "archive.zip", iter(tiny("cub200").items()))
    monkeypatch.setattr(Cub200, "counts", {"train": (25, 4), "test": (23, 4)})
    with pytest.raises(UserError, match=r"train split has 25 images of 4 classes; here it has 24 of 4"):
        settings("cub200", archive=archive).download(tmp_path / "source", tmp_path / "download")


def test_an_official_name_over_another_file_is_refused(tiny: Callable[[str], Members], tmp_path: Path) -> None:
    for name in ("cub200", "sop"):
        archive = write_zip(tmp_path / SOURCES[name][0].official, iter(tiny(name).items()))
        with pytest.raises(UserError, match=r"its md5 is .*, expected 0{32}"):
            settings(name, archive=archive, md5="0" * 32).download(tmp_path / "source", tmp_path / "download")


def test_where_nothing_is_to_be_had_the_message_says_what_to_get_and_from_where(tmp_path: Path) -> None:
    for name, words in {"cub200": "data.caltech.edu", "sop": "ftp://cs.stanford.edu", "inshop": "a click"}.items():
        with pytest.raises(UserError, match=words) as caught:
            settings(name).download(tmp_path / "source", tmp_path / "download")
        assert "\n" not in str(caught.value) and SOURCES[name][0].official in str(caught.value)
