"""memvir.download against a server that does what servers do."""

import errno
import hashlib
import shutil
import socket
from collections import namedtuple
from pathlib import Path

import pytest

from memvir import download
from memvir.download import DownloadError, fetch
from memvir.errors import UserError
from tests.http_server import MisbehavingServer

CONTENT = bytes(range(256)) * 2000
MD5 = hashlib.md5(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "TIMEOUT", (2.0, 0.3))


def get(*addresses: str, target: Path, digest: str | None = MD5) -> str:
    return fetch(addresses, target, algorithm="md5", digest=digest, what="the file")


def assert_complete(target: Path) -> None:
    assert target.read_bytes() == CONTENT
    assert list(target.parent.iterdir()) == [target], "no part is left over"


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "file.bin"


def test_the_first_address_that_works_is_used_and_returned(server: MisbehavingServer, target: Path) -> None:
    good = server.serve("good", CONTENT)
    other = server.serve("other", CONTENT)
    assert get(server.address("missing"), good, other, target=target) == good
    assert_complete(target)
    assert [path for path, _ in server.requests] == ["/missing", "/good"]


@pytest.mark.parametrize("name", ["x" * 250, "[a]*?.bin"])
def test_a_file_of_whatever_name_is_resumed_and_leaves_no_part(
    server: MisbehavingServer, tmp_path: Path, name: str
) -> None:
    target = tmp_path / "folder" / name
    broken = server.serve("broken", CONTENT, cut_at=[100_000, 0, 0])
    with pytest.raises(DownloadError):
        get(broken, target=target)
    assert len(list(target.parent.iterdir())) == 2, "a part and what is known of it"
    get(broken, target=target)
    assert_complete(target)


def test_a_complete_file_is_not_downloaded_again(server: MisbehavingServer, target: Path) -> None:
    good = server.serve("good", CONTENT)
    get(good, target=target)
    assert get(good, target=target) == str(target)
    assert len(server.requests) == 1


def test_redirects_are_followed(server: MisbehavingServer, target: Path) -> None:
    address = server.serve("old", redirect=server.serve("new", CONTENT))
    assert get(address, target=target) == address
    assert_complete(target)


def test_a_redirect_to_itself_is_an_answer_not_a_hang(server: MisbehavingServer, target: Path) -> None:
    address = server.serve("loop", redirect=server.address("loop"))
    with pytest.raises(DownloadError, match="redirects"):
        get(address, target=target)


def test_wrong_bytes_are_refused_and_leave_nothing(server: MisbehavingServer, target: Path) -> None:
    address = server.serve("bad", b"x" * len(CONTENT))
    with pytest.raises(DownloadError, match=f"gave a file with md5 .*expected {MD5}"):
        get(address, target=target)
    assert list(target.parent.iterdir()) == []
    assert len(server.requests) == 1, "a complete answer with wrong bytes would be the same again"


def test_a_file_cut_off_at_half_is_resumed_where_it_stopped(server: MisbehavingServer, target: Path) -> None:
    half = len(CONTENT) // 2
    get(server.serve("cut", CONTENT, cut_at=[half]), target=target)
    assert_complete(target)
    assert server.ranges() == [None, f"bytes={half}-"]


def test_every_new_byte_starts_the_count_of_tries_again(server: MisbehavingServer, target: Path) -> None:
    get(server.serve("cut", CONTENT, cut_at=[50_000] * 8), target=target)
    assert_complete(target)
    assert len(server.requests) == 9


def test_an_interrupted_download_is_resumed_by_a_later_call(server: MisbehavingServer, target: Path) -> None:
    address = server.serve("cut", CONTENT, cut_at=[100_000, 0, 0])
    with pytest.raises(DownloadError, match=r"\(3 tries\)"):
        get(address, target=target)
    assert not target.exists()
    server.requests.clear()
    get(address, target=target)
    assert_complete(target)
    assert server.ranges() == ["bytes=100000-"]


def test_a_part_that_is_complete_needs_no_request(server: MisbehavingServer, target: Path) -> None:
    address = server.serve("cut", CONTENT, cut_at=[100_000, 0, 0])
    with pytest.raises(DownloadError):
        get(address, target=target)
    (part,) = target.parent.glob("*.part")
    part.write_bytes(CONTENT)
    server.requests.clear()
    get(address, target=target)
    assert_complete(target)
    assert server.requests == []


def test_without_range_support_it_starts_again_and_arrives(server: MisbehavingServer, target: Path) -> None:
    get(server.serve("cut", CONTENT, cut_at=[len(CONTENT) // 2], ranges=False), target=target)
    assert_complete(target)


def test_without_range_support_a_server_that_always_breaks_off_is_given_up(
    server: MisbehavingServer, target: Path
) -> None:
    address = server.serve("cut", CONTENT, cut_at=[1000] * 50, ranges=False)
    with pytest.raises(DownloadError, match="tries"):
        get(address, target=target)


def test_a_file_that_changed_between_the_halves_is_taken_whole(server: MisbehavingServer, target: Path) -> None:
    address = server.serve("file", b"\0" * len(CONTENT), cut_at=[100_000, 0, 0], etag='"old"')
    with pytest.raises(DownloadError):
        get(address, target=target)
    server.serve("file", CONTENT, etag='"new"')
    get(address, target=target)
    assert_complete(target)


def test_without_any_validator_the_checksum_finds_the_change(server: MisbehavingServer, target: Path) -> None:
    address = server.serve("file", b"\0" * len(CONTENT), cut_at=[100_000, 0, 0], etag=None)
    with pytest.raises(DownloadError):
        get(address, target=target)
    server.serve("file", CONTENT, etag=None)
    get(address, target=target)
    assert_complete(target)


def test_without_validator_and_checksum_another_length_is_noticed(server: MisbehavingServer, target: Path) -> None:
    address = server.serve("file", b"\0" * 2 * len(CONTENT), cut_at=[100_000, 0, 0], etag=None)
    with pytest.raises(DownloadError):
        get(address, target=target, digest=None)
    server.serve("file", CONTENT, etag=None)
    get(address, target=target, digest=None)
    assert_complete(target)


def test_an_answer_with_another_range_than_asked_is_not_appended(server: MisbehavingServer, target: Path) -> None:
    get(server.serve("file", CONTENT, cut_at=[100_000], wrong_range=True), target=target)
    assert_complete(target)


def test_a_part_of_another_address_is_not_continued(server: MisbehavingServer, target: Path) -> None:
    with pytest.raises(DownloadError):
        get(server.serve("a", b"\0" * len(CONTENT), cut_at=[100_000, 0, 0]), target=target)
    get(server.serve("b", CONTENT), target=target)
    assert_complete(target)
    assert server.ranges()[-1] is None


def test_a_damaged_note_about_a_part_starts_again(server: MisbehavingServer, target: Path) -> None:
    address = server.serve("cut", CONTENT, cut_at=[100_000, 0, 0])
    with pytest.raises(DownloadError):
        get(address, target=target)
    (note,) = target.parent.glob("*.part.json")
    note.write_text("{")
    get(address, target=target)
    assert_complete(target)


def test_a_slow_trickle_arrives(server: MisbehavingServer, target: Path) -> None:
    get(server.serve("slow", CONTENT, piece=10_000, pause=0.005), target=target)
    assert_complete(target)


def test_a_server_that_never_answers_times_out(server: MisbehavingServer, target: Path) -> None:
    with pytest.raises(DownloadError, match="did not answer in time"):
        get(server.serve("silent", silent=True), target=target)


def test_a_busy_server_is_asked_again(server: MisbehavingServer, target: Path) -> None:
    get(server.serve("busy", CONTENT, statuses=[503, 429]), target=target)
    assert_complete(target)


def test_a_length_too_long_is_an_error_after_some_tries(server: MisbehavingServer, target: Path) -> None:
    with pytest.raises(DownloadError, match="tries"):
        get(server.serve("long", CONTENT, declared_length=len(CONTENT) + 5), target=target)
    assert not target.exists()


def test_a_length_too_short_is_found_by_the_checksum(server: MisbehavingServer, target: Path) -> None:
    with pytest.raises(DownloadError, match="gave a file with md5"):
        get(server.serve("short", CONTENT, declared_length=len(CONTENT) - 5), target=target)


def test_a_file_of_unknown_length_arrives(server: MisbehavingServer, target: Path) -> None:
    get(server.serve("unknown", CONTENT, declared_length=-1), target=target)
    assert_complete(target)


def test_a_file_that_is_said_to_be_encoded_stays_as_it_is(server: MisbehavingServer, target: Path) -> None:
    get(server.serve("file.tgz", CONTENT, content_encoding="gzip"), target=target)
    assert_complete(target)


def test_a_web_page_in_place_of_the_file_is_named_as_such(server: MisbehavingServer, target: Path) -> None:
    with pytest.raises(DownloadError, match="web page"):
        get(server.serve("login", b"<html>", content_type="text/html; charset=utf-8"), target=target, digest=None)


def test_the_start_of_a_checksum_is_enough(server: MisbehavingServer, target: Path) -> None:
    get(server.serve("file", CONTENT), target=target, digest=MD5[:8].upper())
    assert_complete(target)


def test_when_every_address_fails_one_line_names_each_and_its_answer(server: MisbehavingServer, target: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    addresses = [
        server.address("missing"),
        server.serve("forbidden", statuses=[403]),
        f"http://127.0.0.1:{port}/nobody",
        "ftp://example.org/file",
        "not an address",
        "http://",
    ]
    with pytest.raises(DownloadError) as caught:
        get(*addresses, target=target)
    assert [address for address, _ in caught.value.answers] == addresses
    answers = [answer for _, answer in caught.value.answers]
    assert answers[:2] == ["answered 404 Not Found", "answered 403 Forbidden"]
    assert "Connection refused" in answers[2] and "0x" not in answers[2]
    assert answers[3:5] == ["is not an http or https address"] * 2
    assert "\n" not in str(caught.value)
    assert all(address in str(caught.value) for address in addresses)


def test_no_address_at_all_is_said(target: Path) -> None:
    with pytest.raises(DownloadError, match="no address"):
        get(target=target)


def test_too_little_room_is_noticed_before_the_first_byte(
    server: MisbehavingServer, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")(1, 1, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match=r"needs 512\.0 kB and the disk has 1\.0 kB free") as caught:
        get(server.serve("file", CONTENT), server.serve("other", CONTENT), target=target)
    assert str(target) in str(caught.value)
    assert len(server.requests) == 1, "another address would need as much room"


def test_a_disk_that_fills_up_meanwhile_is_an_error_that_names_the_file(
    server: MisbehavingServer, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class FullDisk:
        def __init__(self, path: Path) -> None: ...
        def __enter__(self) -> "FullDisk":
            return self

        def __exit__(self, *_: object) -> None: ...
        def write(self, _: bytes) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    original = Path.open
    monkeypatch.setattr(Path, "open", lambda path, *a: FullDisk(path) if a == ("ab",) else original(path, *a))
    with pytest.raises(UserError, match=r"file\.bin.*No space left on device; the file needs 512\.0 kB"):
        get(server.serve("file", CONTENT), target=target)


def test_without_a_terminal_plain_lines_tell_how_far_it_is(
    server: MisbehavingServer, target: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("memvir.progress.SECONDS_BETWEEN_LINES", 0.0)
    with caplog.at_level("INFO", logger="memvir"):
        get(server.serve("slow", CONTENT, piece=100_000), target=target)
    lines = [record.getMessage() for record in caplog.records]
    assert any("downloading the file" in line and "of 512.0 kB" in line and "/s" in line for line in lines)
