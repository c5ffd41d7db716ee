"""Attacks by archive, made for real: refused by name, nothing written anywhere."""

import bz2
import contextlib
import gzip
import io
import itertools
import lzma
import os
import stat
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from memvir.errors import UserError
from memvir.images import archives
from memvir.images.annotation import ImageClass
from memvir.images.archives import is_clutter, open_archive
from memvir.images.arrangement import arrange
from memvir.images.plans import by_number

CLASSES = [ImageClass(1, "One", "train", (1,)), ImageClass(2, "Two", "test", (2,))]


def jpeg() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "JPEG")
    return file.getvalue()


JPEG = jpeg()


def tar_with(path: Path, *members: tuple[tarfile.TarInfo, bytes], mode: str = "w:gz") -> Path:
    with tarfile.open(path, mode) as tar:
        for name in ("ims/000001.jpg", "ims/000002.jpg"):
            info = tarfile.TarInfo(name)
            info.size = len(JPEG)
            tar.addfile(info, io.BytesIO(JPEG))
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    return path


def member(name: str, kind: bytes = tarfile.REGTYPE, content: bytes = b"", **fields: object) -> tuple:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


def zip_with(path: Path, *members: tuple[zipfile.ZipInfo | str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for info, content in [("ims/000001.jpg", JPEG), ("ims/000002.jpg", JPEG), *members]:
            archive.writestr(info, content)
    return path


def prepare(path: Path, into: Path) -> list[str]:
    """Arrange the archive below into/images; returns all files that exist there afterwards."""
    with open_archive(path) as archive:
        arrange(archive, by_number(CLASSES, archive), into / "images", into / "index.csv")
    return sorted(file.relative_to(into).as_posix() for file in into.rglob("*") if file.is_file())


def assert_refused(path: Path, message: str) -> None:
    before = {file: file.lstat().st_mtime_ns for file in path.parent.rglob("*")}
    into = path.parent / "out" / "of" / "way"
    with pytest.raises(UserError, match=message) as caught:
        prepare(path, into)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert {file: file.lstat().st_mtime_ns for file in path.parent.rglob("*")} == before, "nothing was written"


GOOD = ["images/test/002_Two/000002.jpg", "images/train/001_One/000001.jpg", "index.csv"]


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_tars_of_every_compression_are_arranged(tmp_path: Path, mode: str) -> None:
    assert prepare(tar_with(tmp_path / "a.bin", mode=mode), tmp_path / "out") == GOOD


def test_zips_are_arranged(tmp_path: Path) -> None:
    assert prepare(zip_with(tmp_path / "a.bin"), tmp_path / "out") == GOOD


def test_clutter_and_tables_in_an_archive_are_left_out_with_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    extra = [
        member("ims", tarfile.DIRTYPE),
        member("ims/names.csv", content=b"a"),
        member("__MACOSX/ims/._000001.jpg", content=b"a"),
        member("ims/._000001.jpg", content=b"a"),
        member("ims/Thumbs.db", content=b"a"),
    ]
    path = tar_with(tmp_path / "a.tgz", *extra)
    assert prepare(path, tmp_path / "out") == GOOD
    assert caplog.messages == [
        f"warning: {path}: left out 4 that are no images of the data set: __MACOSX/ims/._000001.jpg, ims/._000001.jpg, "
        "ims/Thumbs.db, ims/names.csv"
    ]


def test_a_name_with_a_dot_in_front_or_of_unusual_characters_counts(tmp_path: Path) -> None:
    members = [member(name, content=JPEG) for name in ("ims/.3.jpg", ".22 rifle/a\u202fb.jpg")]
    for path in (
        tar_with(tmp_path / "a.tgz", *members),
        zip_with(tmp_path / "a.zip", *[(info.name, content) for info, content in members]),
    ):
        with open_archive(path) as archive:
            assert [file.name for file in archive.files()][2:] == ["ims/.3.jpg", ".22 rifle/a\u202fb.jpg"]


@pytest.mark.parametrize(
    "name",
    [
        "a/.ds_store",
        "._1.jpg",
        "__MACOSX/1.jpg",
        "Icon\r",
        "thumbs.DB",
        "$RECYCLE.BIN/1.jpg",
        "lost+found",
        ".Trash-1000",
        "System Volume Information",
        ".nfs00ab",
        "@eaDir/1.jpg",
        "#recycle",
        ".git/config",
        ".ipynb_checkpoints/1.jpg",
    ],
)
def test_what_systems_and_programs_leave_is_clutter(name: str) -> None:
    assert is_clutter(name)


@pytest.mark.parametrize("name", [".22 rifle/1.jpg", ".1.jpg", "Icon", "x.git", "..x", ".nfs", "MACOSX", "_._1.jpg"])
def test_what_only_looks_like_it_is_not(name: str) -> None:
    assert not is_clutter(name)


ESCAPES = [
    "../evil.jpg",
    "ims/../../evil.jpg",
    "/tmp/evil.jpg",
    "..",
    ".",
    "ims/../000001.jpg",
    "C:/evil.jpg",
    "ims\\..\\..\\evil.jpg",
    "ims/new\nline.jpg",
    "x" * 2000 + ".jpg",
]


@pytest.mark.parametrize("name", ESCAPES)
def test_a_tar_member_that_leads_elsewhere_is_refused_by_name(tmp_path: Path, name: str) -> None:
    assert_refused(tar_with(tmp_path / "a.tgz", member(name, content=JPEG)), "refused, nothing was unpacked: member ")


@pytest.mark.parametrize("name", [*ESCAPES, "ims/zero\0byte.jpg"])
def test_a_zip_member_that_leads_elsewhere_is_refused_by_name(tmp_path: Path, name: str) -> None:
    info = zipfile.ZipInfo("placeholder.jpg")
    info.filename = name  # past the constructor, which would cut it at a zero byte
    assert_refused(zip_with(tmp_path / "a.zip", (info, JPEG)), "refused, nothing was unpacked: member ")


def test_a_folder_of_an_archive_that_leads_elsewhere_is_refused_too(tmp_path: Path) -> None:
    assert_refused(tar_with(tmp_path / "a.tgz", member("../up", tarfile.DIRTYPE)), "leads out of the folder")


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        (tarfile.SYMTYPE, "a link to '/etc/passwd'"),
        (tarfile.LNKTYPE, "a link to '/etc/passwd'"),
        (tarfile.CHRTYPE, "a device or pipe"),
        (tarfile.BLKTYPE, "a device or pipe"),
        (tarfile.FIFOTYPE, "a device or pipe"),
    ],
)
def test_links_and_devices_in_a_tar_are_refused_by_name(tmp_path: Path, kind: bytes, what: str) -> None:
    path = tar_with(tmp_path / "a.tgz", member("ims/trap.jpg", kind, linkname="/etc/passwd"))
    assert_refused(path, rf"'ims/trap\.jpg' is {what}")


def test_a_link_followed_by_a_file_through_it_is_refused(tmp_path: Path) -> None:
    members = [member("ims/door", tarfile.SYMTYPE, linkname="/tmp"), member("ims/door/evil.jpg", content=JPEG)]
    assert_refused(tar_with(tmp_path / "a.tgz", *members), r"'ims/door' is a link to '/tmp'")


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFIFO])
def test_links_and_devices_in_a_zip_are_refused_by_name(tmp_path: Path, kind: int) -> None:
    info = zipfile.ZipInfo("ims/trap.jpg")
    info.external_attr = (kind | 0o777) << 16
    assert_refused(zip_with(tmp_path / "a.zip", (info, b"/etc/passwd")), r"'ims/trap\.jpg' is a link or a device")


@pytest.mark.parametrize("name", ["ims/000001.jpg", "./ims/000001.jpg", "ims//000001.jpg"])
def test_a_name_that_comes_twice_is_refused(tmp_path: Path, name: str) -> None:
    path = tar_with(tmp_path / "a.tgz", member(name, content=JPEG))
    assert_refused(path, rf"member '{name}' is there twice")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_that_comes_twice_in_a_zip_is_refused(tmp_path: Path) -> None:
    assert_refused(zip_with(tmp_path / "a.zip", ("ims/000001.jpg", JPEG)), "is there twice")


class Zeros(io.RawIOBase):
    """An endless file of zeros."""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        buffer[:] = bytes(len(buffer))
        return len(buffer)


def bomb(path: Path, opener: Callable, header: bytes, size: int) -> Path:
    """A compressed tar of one member of `size` zeros."""
    with opener(path, "wb") as file:
        file.write(header)
        block = bytes(2**20)
        for _ in range(size // len(block)):
            file.write(block)
        file.write(bytes(1024))
    return path


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bombs of 64 MB show what those of 64 GB would."""
    monkeypatch.setattr(archives, "MAX_BYTES", 2**22)
    monkeypatch.setattr(archives, "SLACK", 2**23)


@pytest.mark.usefixtures("small_limits")
@pytest.mark.parametrize("opener", [gzip.open, bz2.open, lzma.open])
def test_a_member_larger_than_any_image_is_refused(tmp_path: Path, opener: Callable) -> None:
    path = bomb(tmp_path / "a.tgz", opener, header("ims/000001.jpg", 2**25), 2**25)
    assert_refused(path, r"'ims/000001\.jpg' unpacks to 33,554,432 bytes")


@pytest.mark.usefixtures("small_limits")
def test_a_gzip_bomb_of_many_members_is_refused_at_the_size_that_its_own_cannot_explain(tmp_path: Path) -> None:
    content = bytes(2**21)
    members = [member(f"ims/{number:06}.jpg", content=content) for number in range(3, 40)]
    assert_refused(tar_with(tmp_path / "a.tgz", *members), "brings the unpacked size to .* never has")


@pytest.mark.usefixtures("small_limits")
@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
def test_a_bomb_in_a_header_is_refused(tmp_path: Path, kind: bytes) -> None:
    path = bomb(tmp_path / "a.tgz", gzip.open, header("x", 2**26, kind), 2**26)
    assert_refused(path, "a header announces 67,108,864 bytes")


@pytest.mark.usefixtures("small_limits")
def test_a_bomb_of_other_kinds_of_members_is_refused(tmp_path: Path) -> None:
    path = bomb(tmp_path / "a.tgz", gzip.open, header("x", 2**26, b"Z"), 2**26)
    assert_refused(path, "refused, nothing was unpacked")


def test_a_sparse_member_is_refused(tmp_path: Path) -> None:
    assert_refused(tar_with(tmp_path / "a.tgz", member("ims/s.jpg", tarfile.GNUTYPE_SPARSE)), "of an unusual kind")


def test_an_archive_of_countless_members_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "MAX_MEMBERS", 100)
    members = [member(f"ims/note{number}.txt") for number in range(200)]
    assert_refused(tar_with(tmp_path / "a.tgz", *members), "one of more than 100 members")


@pytest.mark.usefixtures("small_limits")
def test_a_zip_bomb_is_refused(tmp_path: Path) -> None:
    assert_refused(zip_with(tmp_path / "a.zip", ("ims/3.jpg", bytes(2**23))), "unpacks to 8,388,608 bytes")


def test_a_zip_member_longer_than_announced_is_refused(tmp_path: Path) -> None:
    path = zip_with(tmp_path / "a.zip")
    content = bytearray(path.read_bytes())
    central = content.rindex(b"PK\x01\x02")
    struct.pack_into("<I", content, central + 24, len(JPEG) // 2)
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.zip: not an intact tar or zip archive"):
        prepare(path, tmp_path / "out")


def test_a_python_whose_tarfile_has_no_filters_reads_archives_too(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delattr(tarfile, "data_filter")  # as before 3.11.4
    assert prepare(tar_with(tmp_path / "a.tgz"), tmp_path / "out") == GOOD


def test_an_encrypted_zip_is_refused(tmp_path: Path) -> None:
    path = zip_with(tmp_path / "a.zip")
    content = bytearray(path.read_bytes())
    content[content.rindex(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(content)
    assert_refused(path, "is encrypted")


def test_a_zip_member_whose_name_begins_with_a_zero_byte_is_refused(tmp_path: Path) -> None:
    path = zip_with(tmp_path / "a.zip", ("N", b""))
    path.write_bytes(path.read_bytes().replace(b"N", b"\0"))
    assert_refused(path, "has a name with control characters")


@pytest.mark.parametrize("make", [tar_with, zip_with])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_an_archive_cut_off_anywhere_is_an_error_that_names_it(tmp_path: Path, make: Callable, share: float) -> None:
    path = make(tmp_path / "archive")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    assert_refused(path, "archive: ")


def test_an_empty_file_a_text_and_a_missing_file_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "text").write_text("hello " * 1000)
    for name in ("empty", "text", "missing"):
        with pytest.raises(UserError, match=rf"{name}: not"):
            prepare(tmp_path / name, tmp_path / "out")


def test_missing_and_extra_members_are_named(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("ims/000002.jpg", "ims/000003.jpg", "ims/cover.jpg"):
            tar.addfile(member(name, content=JPEG)[0], io.BytesIO(JPEG))
    assert_refused(tmp_path / "a.tar", r"1 missing: 000001\.jpg; 2 extra: ims/000003\.jpg, ims/cover\.jpg")


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_whatever_the_bytes_an_archive_is_read_or_refused_in_one_line(data: st.DataObject, tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    make = data.draw(st.sampled_from([tar_with, zip_with, lambda path: tar_with(path, mode="w")]))
    path = make(folder / "archive")
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        prepare(path, folder / "out")
    except UserError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    else:
        assert {file.name for file in folder.iterdir()} == {"archive", "out"}


def test_wherever_a_zips_directory_points_to_it_is_read_or_refused_in_one_line(tmp_path: Path) -> None:
    content = zip_with(tmp_path / "intact").read_bytes()
    for place in range(content.index(b"PK\x01\x02"), len(content)):
        path = tmp_path / f"{place}"
        path.write_bytes(content[:place] + b"\1" + content[place + 1 :])
        with contextlib.suppress(UserError):
            prepare(path, tmp_path / f"{place}.out")


@settings(max_examples=100, deadline=None)
@given(name=st.text(min_size=1, max_size=40), parts=st.lists(st.sampled_from(["..", "/", "a", "\\", "."]), max_size=6))
def test_no_name_whatever_it_is_makes_a_file_outside(name: str, parts: list[str], tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("names")
    beside = set(os.listdir(folder.parent))
    info = tarfile.TarInfo("".join(itertools.chain(parts, [name])))
    info.size = len(JPEG)
    try:
        path = tar_with(folder / "archive", (info, JPEG))
    except (UnicodeEncodeError, ValueError):
        return  # not a name that can be in a tar
    try:
        prepare(path, folder / "out")
    except UserError as error:
        assert "\n" not in str(error)
    assert {file.name for file in folder.iterdir()} <= {"archive", "out"}
    assert set(os.listdir(folder.parent)) == beside
