"""Files appear whole or not at all, whatever they are called."""

import errno
import hashlib
import io
import os
import stat
from pathlib import Path

import numpy as np
import pytest

from memvir.files import is_text, npz, write_text


@pytest.mark.parametrize("name", ["a.json", "x" * 255, "中" * 85])
def test_a_file_of_whatever_name_is_written_and_nothing_is_left_beside_it(tmp_path: Path, name: str) -> None:
    for text in ("first", "second"):
        write_text(tmp_path / name, text)
        assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {name: text}


@pytest.mark.parametrize(
    "name", ["a b", "a\u202fb", "a\u3000b", "a\u200cb", "\U0001f9a2", "\u00ad", "\u2028", "\ue000", ".22 rifle"]
)
def test_whatever_is_no_control_character_is_text(name: str) -> None:
    assert is_text(name)


@pytest.mark.parametrize("name", ["a\nb", "a\rb", "\0", "\x1b[31m", "\x7f", "\x85", "\udcff", "\ud800"])
def test_control_characters_and_undecodable_bytes_are_not(name: str) -> None:
    assert not is_text(name)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_a_file_system_that_flushes_no_folders_is_written_to_all_the_same(tmp_path, monkeypatch, number):
    flush = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    if number == errno.EIO:
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            write_text(tmp_path / "a.txt", "content")
    else:
        write_text(tmp_path / "a.txt", "content")
    assert (tmp_path / "a.txt").read_text() == "content"


def test_an_npz_has_the_same_bytes_under_every_python_and_numpy_reads_it():
    content = npz(a=np.arange(3, dtype=np.float32), b=np.array(["x", "yz"]))
    assert hashlib.sha256(content).hexdigest()[:16] == "914467fcc19d7d13"
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        assert arrays["a"].tolist() == [0, 1, 2] and arrays["b"].tolist() == ["x", "yz"]
    with pytest.raises(ValueError, match="allow_pickle"):
        npz(a=np.array([{}]))
