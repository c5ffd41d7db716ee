"""Writing files so that a reader never sees half of one, and reading them with errors that name the file."""

import contextlib
import errno
import hashlib
import io
import json
import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    import numpy as np


@contextlib.contextmanager
def atomic_write(path: Path, keep: Path | None = None) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path`; on success flush it to disk and rename it to `path`.

    On an exception (disk full, interrupt) the temporary file is removed and `path` stays as it was. `keep` names where
    the file that `path` replaces goes; without it that file is gone.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            error.filename = str(path)  # a failed write does not know its file
        raise
    _fsync_folder(path.parent)


def temporary_name(path: Path) -> Path:
    """A hidden name beside `path`, always the same one: what a killed process leaves, the next one overwrites."""
    return path.with_name(f".{extendable(path.name)}.part")


def extendable(name: str) -> str:
    """`name`, or a digest of it if it leaves no room for a suffix within the 255 bytes that file systems allow."""
    content = os.fsencode(name)
    return name if len(content) <= 200 else hashlib.sha256(content).hexdigest()


def is_text(name: str) -> bool:
    """Whether a name is text on one line: no control characters, and no bytes that could not be decoded."""
    return not re.search(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", name)


def write_text(path: Path, text: str) -> None:
    with atomic_write(path) as file:
        file.write(text.encode())


def write_json(path: Path, content: Any) -> None:
    """Write `content` in its own order with an indent of two: same content, same bytes."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def npz(**arrays: "np.ndarray") -> bytes:
    """The content of an .npz: same arrays, same bytes. Those of np.savez differ from Python 3.11.4 on, whose zipfile
    marks members of a size not known beforehand otherwise.
    """
    import numpy as np  # late: `memvir.libraries` prepares it

    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.lib.format.write_array(member, np.asanyarray(array), allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), member.getbuffer())
    return buffer.getvalue()


def file_hash(path: Path, algorithm: str = "md5") -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that flush no folders, such as SMB
            raise
    finally:
        os.close(descriptor)
