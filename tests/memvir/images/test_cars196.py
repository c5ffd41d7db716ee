"""Which source of CARS196 is used, and what is said when none works. Real counts, no pictures."""

import json
import socket
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from memvir.errors import UserError
from memvir.files import file_hash
from memvir.images.archives import File
from memvir.images.sources import cars196
from memvir.images.sources.cars196 import Cars196
from tests import cars196_stand_in as stand_in
from tests.http_server import MisbehavingServer


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stand_in.write_tar(tmp_path_factory.mktemp("numbered") / "car_ims.tgz", stand_in.numbered(), "w:gz")


@pytest.fixture(scope="module")
def by_class(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stand_in.write_zip(tmp_path_factory.mktemp("by_class") / "archive.zip", stand_in.by_class())


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "annotation.csv").write_bytes(stand_in.ANNOTATION.read_bytes())
    return folder


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "download"


def settings(**given: object) -> Cars196:
    return Cars196(**{"source": "cars196", "addresses": [], "md5": "0" * 32, **given})


def used(target: Path) -> dict[str, str]:
    return json.loads((target / "source.json").read_text())


class Listing:
    """An archive of class folders as far as its names go."""

    path = Path("cars.zip")

    def __init__(self, remove: str = "", add: str = "") -> None:
        self.names = [name for name, _ in stand_in.by_class()]
        if remove:
            self.names.remove(next(name for name in self.names if remove in name))
        if add:
            self.names.append(add)

    def files(self) -> list[File]:
        return [File(name, 1) for name in self.names]

    def contents(self) -> Iterator[tuple[str, bytes]]:
        raise AssertionError("names are enough")


def test_an_archive_put_into_source_is_used_before_any_address(
    source: Path, target: Path, numbered: Path, server: MisbehavingServer
) -> None:
    (source / "car_ims.tgz").hardlink_to(numbered)
    settings(addresses=[server.address("x")], md5=file_hash(numbered)).download(source, target)
    assert used(target) == {"source": f"found in {source.as_posix()}", "path": str(source / "car_ims.tgz")}
    assert server.requests == []


def test_a_wrong_archive_in_source_is_said_and_the_address_is_used(
    source: Path, target: Path, numbered: Path, server: MisbehavingServer, caplog: pytest.LogCaptureFixture
) -> None:
    (source / "car_ims.tgz").write_bytes(numbered.read_bytes()[:100_000])
    address = server.serve("car_ims.tgz", numbered.read_bytes())
    settings(addresses=[address], md5=file_hash(numbered)).download(source, target)
    assert "car_ims.tgz" in caplog.text and "warning" in caplog.text
    assert used(target) == {"source": address, "path": "car_ims.tgz"}


def test_a_downloaded_archive_is_not_downloaded_again(
    source: Path, target: Path, by_class: Path, server: MisbehavingServer
) -> None:
    address = server.serve("datasets/download/by-classes-folder", by_class.read_bytes())
    for _ in range(2):
        settings(addresses=[address]).download(source, target)
        assert used(target) == {"source": address, "path": "by-classes-folder"}
    assert len(server.requests) == 1


def test_an_address_that_gives_something_else_is_passed_over_and_leaves_nothing(
    source: Path, target: Path, by_class: Path, server: MisbehavingServer
) -> None:
    other = server.serve("other", b"something else" * 100)
    good = server.serve("by_class.zip", by_class.read_bytes())
    settings(addresses=[other, good]).download(source, target)
    assert used(target)["source"] == good
    assert {path.name for path in target.iterdir()} == {"by_class.zip", "source.json"}


def test_when_every_source_fails_one_line_says_what_was_tried_and_what_to_do(
    source: Path, target: Path, server: MisbehavingServer
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{closed.getsockname()[1]}/car_ims.tgz"
    (source / "cars.zip").write_text("not a zip")
    addresses = [
        server.address("car_ims.tgz"),
        nobody,
        server.serve("login", b"<html>", content_type="text/html"),
        server.serve("junk.tar", b"junk" * 1000),
    ]
    with pytest.raises(UserError) as caught:
        settings(addresses=addresses, md5=cars196.OFFICIAL_MD5).download(source, target)
    message = str(caught.value)
    assert "\n" not in message
    for tried, answer in zip(
        [str(source / "cars.zip"), *addresses],
        [
            "not an intact tar or zip",
            "answered 404 Not Found",
            "Connection refused",
            "web page",
            "gave a file of no use",
        ],
        strict=True,
    ):
        assert tried in message and answer in message[message.index(tried) :].split("; ")[0]
    for help_for_a_person in (cars196.OFFICIAL_MD5, "car_ims.tgz", str(source), "kaggle.com", "dropbox.com"):
        assert help_for_a_person in message
    assert not (target / "source.json").exists()


def test_without_any_address_the_message_says_what_to_do(source: Path, target: Path) -> None:
    with pytest.raises(UserError, match=r"no source worked.*no address is given.*What you can do"):
        settings().download(source, target)


@pytest.mark.parametrize("key", ["archive", "folder"])
def test_a_path_in_params_that_does_not_exist_is_an_error_not_a_download(
    source: Path, target: Path, key: str, server: MisbehavingServer
) -> None:
    with pytest.raises(UserError, match=rf"nowhere: not found; it is what data.{key} names"):
        settings(addresses=[server.address("x")], **{key: "/nowhere"}).download(source, target)
    assert server.requests == []


def test_a_numbered_archive_with_another_md5_is_refused(source: Path, target: Path, numbered: Path) -> None:
    with pytest.raises(UserError, match=rf"car_ims\.tgz: its md5 is {file_hash(numbered)}, expected 0+$"):
        settings(archive=str(numbered)).download(source, target)


def test_class_folders_are_pooled_and_split_by_class() -> None:
    plan = cars196.by_class(stand_in.classes(), Listing())
    assert Counter(row.split for row in plan.values()) == {"train": 8054, "test": 8131}
    sizes = Counter(row.class_id for row in plan.values())
    assert all(sizes[cls.class_id] == len(cls.images) for cls in stand_in.classes())
    assert len({row.file for row in plan.values()}) == 16185
    assert {row.file.rpartition("/")[0] for row in plan.values() if row.class_id == 174} == {
        "test/174_Ram_C-V_Cargo_Van_Minivan_2012"
    }
    first = plan["car_data/car_data/train/AM General Hummer SUV 2000/00001.jpg"]
    assert first.file == "train/001_AM_General_Hummer_SUV_2000/train_00001.jpg"


def test_a_class_with_an_image_less_is_named() -> None:
    with pytest.raises(UserError, match=r"1 classes with another number.*: Acura RL Sedan 2012 \(63 instead of 64\)"):
        cars196.by_class(stand_in.classes(), Listing(remove="Acura RL Sedan 2012"))


def test_an_image_of_an_unknown_class_is_named() -> None:
    with pytest.raises(UserError, match=r"1 images of no known class: car_data/train/Batmobile 1966/1\.jpg"):
        cars196.by_class(stand_in.classes(), Listing(add="car_data/train/Batmobile 1966/1.jpg"))


def test_two_images_for_one_place_are_refused() -> None:
    twice = Listing(add="again/train/AM General Hummer SUV 2000/00001.jpg")
    with pytest.raises(UserError, match=r"cannot both be train/001_AM_General_Hummer_SUV_2000/train_00001\.jpg"):
        cars196.by_class(stand_in.classes(), twice)


@pytest.mark.parametrize(
    "written",
    ["Ram C-V Cargo Van Minivan 2012", "ram c_v cargo van minivan 2012", "174.Ram C-V Cargo Van Minivan 2012"],
)
def test_class_names_are_compared_by_letters_and_digits(written: str) -> None:
    known = {cars196._key(cls.name): cls for cls in stand_in.classes()}
    assert len(known) == 196, "no two classes become one"
    found = cars196._class_of(cars196.PurePosixPath("images", written, "1.jpg"), known)
    assert found is not None and found.class_id == 174


def test_an_annotation_that_is_not_the_protocol_s_is_refused(source: Path, target: Path) -> None:
    path = source / "annotation.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(UserError, match=r"annotation\.csv: not CARS196's"):
        settings().download(source, target)


FEW = stand_in.classes()[:8]


def official(path: Path, moved: int | None = None, renamed: int | None = None) -> None:
    """cars_annos.mat as the data set's authors publish it, with one image or class name changed."""
    fields = [("relative_im_path", object), ("class", object), ("test", object)]
    class_of = {number: cls.class_id for cls in FEW for number in cls.images}
    rows = np.zeros((1, len(class_of)), dtype=fields)
    for number, class_id in class_of.items():
        rows[0, number - 1] = (f"car_ims/{number:06}.jpg", class_id + (number == moved), number % 2)
    names = np.zeros((1, len(FEW)), dtype=object)
    names[0] = [cls.name + (" II" if cls.class_id == renamed else "") for cls in FEW]
    savemat(path, {"annotations": rows, "class_names": names})


def test_the_official_annotation_is_compared_where_it_is_there(tmp_path: Path) -> None:
    path, ours = tmp_path / "cars_annos.mat", Path("annotation.csv")
    official(path)
    cars196.compare_with_official(path, FEW, ours)
    official(path, moved=90)
    with pytest.raises(UserError, match=r"image 000090 is class 3 there and class 2 in annotation\.csv"):
        cars196.compare_with_official(path, FEW, ours)
    official(path, renamed=7)
    with pytest.raises(UserError, match=r"class 7 is .* II there and"):
        cars196.compare_with_official(path, FEW, ours)
    path.write_bytes(b"not a MATLAB file" * 20)
    with pytest.raises(UserError, match="not CARS196's annotation file"):
        cars196.compare_with_official(path, FEW, ours)


def test_prepare_says_what_to_do_when_the_source_has_gone(source: Path, target: Path, tmp_path: Path) -> None:
    places = (source, target, tmp_path / "images", tmp_path / "index.csv")
    with pytest.raises(UserError, match="download the images again"):
        settings().prepare(*places)
    target.mkdir()
    (target / "source.json").write_text('{"source": "data.archive", "path": "/gone/car_ims.tgz"}')
    with pytest.raises(UserError, match=r"/gone/car_ims\.tgz: was there when it was found"):
        settings().prepare(*places)
