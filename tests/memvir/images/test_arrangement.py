"""Arranging images: interrupted anywhere and run again, it ends the same; what does not belong is removed."""

import errno
import io
import os
import shutil
import signal
import time
from collections import namedtuple
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from memvir.errors import UserError
from memvir.images import arrangement
from memvir.images.annotation import ImageClass
from memvir.images.archives import open_archive
from memvir.images.arrangement import arrange
from memvir.images.plans import by_number
from tests.cars196_stand_in import write_folder, write_tar

CLASSES = [ImageClass(1, "One", "train", tuple(range(1, 21))), ImageClass(2, "Two", "test", tuple(range(21, 41)))]


def png(number: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((3, 3), number, dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


MEMBERS = {f"ims/{number:06}.png": png(number) for number in range(1, 41)}


@pytest.fixture(params=["tar", "folder"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    members = iter(MEMBERS.items())
    if request.param == "tar":
        return write_tar(tmp_path / "source.tar", members)
    return write_folder(tmp_path / "source", members)


def run(path: Path, place: Path, classes: Sequence[ImageClass] = CLASSES) -> dict[str, bytes]:
    """Arrange below `place`; returns every file there."""
    with open_archive(path) as archive:
        arrange(archive, by_number(classes, archive), place / "images", place / "index.csv")
    return files(place)


def files(place: Path) -> dict[str, bytes]:
    return {str(file.relative_to(place)): file.read_bytes() for file in place.rglob("*") if file.is_file()}


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the images that were checked."""
    names: list[str] = []
    original = arrangement.image_files.load

    def load(content: bytes, name: str) -> Image.Image:
        names.append(name)
        return original(content, name)

    monkeypatch.setattr(arrangement.image_files, "load", load)
    return names


@pytest.mark.parametrize("after", [0, 1, 17, 39])
def test_interrupted_and_run_again_it_ends_as_if_undisturbed(
    tmp_path: Path, path: Path, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = run(path, tmp_path / "undisturbed")
    original, calls = arrangement._write, iter(range(100))

    def interrupted(*arguments: object) -> None:
        if next(calls) >= after:
            raise KeyboardInterrupt
        original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(arrangement, "_write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(path, tmp_path / "out")
    assert not (tmp_path / "out" / "index.csv").exists()
    assert len(files(tmp_path / "out")) == after
    assert run(path, tmp_path / "out") == undisturbed


def test_only_new_images_of_an_archive_are_decoded(tmp_path: Path, decoded: list[str]) -> None:
    path = write_tar(tmp_path / "a.tar", iter(MEMBERS.items()))
    run(path, tmp_path / "out")
    assert len(decoded) == 40
    decoded.clear()
    (tmp_path / "out/images/train/001_One/000007.png").write_bytes(b"spoilt")
    (tmp_path / "out/index.csv").unlink()
    run(path, tmp_path / "out")
    assert decoded == [f"{path}: ims/000007.png"]


def test_a_linked_image_is_decoded_again_only_if_it_changed(tmp_path: Path, decoded: list[str]) -> None:
    folder = write_folder(tmp_path / "a", iter(MEMBERS.items()))
    run(folder, tmp_path / "out")
    decoded.clear()
    run(folder, tmp_path / "out")
    assert decoded == []
    changed = folder / "ims" / "000007.png"
    changed.write_bytes(changed.read_bytes()[:45])  # into the very file that images/ links to
    with pytest.raises(UserError, match=r"000007\.png: not a readable image"):
        run(folder, tmp_path / "out")
    assert decoded == [str(changed)]


def test_strangers_are_removed_and_links_are_not_followed(tmp_path: Path, path: Path) -> None:
    expected = run(path, tmp_path / "out")
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "diary.txt").write_text("dear diary")
    images = tmp_path / "out" / "images"
    (images / "val" / "x").mkdir(parents=True)
    (images / "val" / "x" / "1.png").write_bytes(b"")
    (images / "train" / "001_One" / "extra.png").write_bytes(b"")
    (images / "train" / "001_One" / ".000001.png.part").write_bytes(b"half")
    (images / "train" / "link").symlink_to(precious)
    shutil.rmtree(images / "test" / "002_Two")
    (images / "test" / "002_Two").symlink_to(precious)
    (images / "train" / "001_One" / "000001.png").unlink()
    (images / "train" / "001_One" / "000001.png").symlink_to(precious / "diary.txt")
    (images / "train" / "001_One" / "000002.png").unlink()
    (images / "train" / "001_One" / "000002.png").mkdir()
    assert run(path, tmp_path / "out") == expected
    assert not any(file.is_symlink() for file in images.rglob("*"))
    assert files(precious) == {"diary.txt": b"dear diary"}


def test_where_linking_is_impossible_files_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    folder = write_folder(tmp_path / "a", iter(MEMBERS.items()))
    linked = run(folder, tmp_path / "linked")
    monkeypatch.setattr(os, "link", link)
    assert run(folder, tmp_path / "copied") == linked
    assert not (tmp_path / "copied/images/train/001_One/000001.png").samefile(folder / "ims/000001.png")


def test_unreadable_images_are_all_counted_and_the_index_is_not_written(tmp_path: Path) -> None:
    broken = {name: content[:45] if "1.png" in name else content for name, content in MEMBERS.items()}
    path = write_tar(tmp_path / "a.tar", iter(broken.items()))
    with pytest.raises(UserError, match=r"a\.tar: ims/000001\.png: not a readable.*; and 1 more$") as caught:
        run(path, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert len(files(tmp_path / "out")) == 36


def test_too_little_room_is_noticed_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tar(tmp_path / "a.tar", iter(MEMBERS.items()))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("usage", "total used free")(1, 1, 10))
    with pytest.raises(UserError, match=r"out/images: the images need .* and the disk has 10 B free"):
        run(path, tmp_path / "out")
    assert files(tmp_path / "out") == {}


def test_a_full_disk_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tar(tmp_path / "a.tar", iter(MEMBERS.items()))
    original = Path.write_bytes

    def write_bytes(target: Path, content: bytes) -> int:
        if "000009" in target.name:
            original(target, content[:10])
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        return original(target, content)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", write_bytes)
        with pytest.raises(OSError, match="No space left"):
            run(path, tmp_path / "out")
    assert set(files(tmp_path / "out").values()) <= set(MEMBERS.values())
    assert len(run(path, tmp_path / "out")) == 41


def test_killed_at_any_moment_and_run_again_it_ends_the_same(tmp_path: Path) -> None:
    big = [ImageClass(1, "One", "train", tuple(range(1, 751))), ImageClass(2, "Two", "test", tuple(range(751, 1501)))]
    path = write_tar(tmp_path / "a.tar", ((f"ims/{number:06}.png", png(number % 256)) for number in range(1, 1501)))
    undisturbed = run(path, tmp_path / "undisturbed", big)
    for wanted in (5, 350, 1000):
        child = os.fork()
        if child == 0:
            try:
                run(path, tmp_path / "out", big)
            finally:
                os._exit(0)
        deadline = time.monotonic() + 60
        while len(list((tmp_path / "out").rglob("*.png"))) < wanted and time.monotonic() < deadline:
            time.sleep(0.005)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert run(path, tmp_path / "out", big) == undisturbed


def test_a_plan_is_made_of_numbers_whatever_the_digits(tmp_path: Path) -> None:
    members = {f"{number}.png": png(number) for number in range(1, 41)}
    folder = write_folder(tmp_path / "a", iter(members.items()))
    with open_archive(folder) as archive:
        plan = by_number(CLASSES, archive)
    assert plan["7.png"].file == "train/001_One/7.png"
