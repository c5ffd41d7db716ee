"""Archives and folders as sequences of image files. An archive is hostile until shown otherwise.

Nothing is ever extracted by the name that an archive gives: callers read the bytes of a member and choose the place.
Beyond that, a member that is a link or a device, or whose name leads elsewhere or comes twice, makes the whole
archive refused by name, as do sizes that the archive's own size cannot explain (images hardly compress).
"""

import bz2
import contextlib
import gzip
import io
import lzma
import os
import re
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple, Protocol

from memvir.datasets.images import MAX_BYTES, read_file
from memvir.errors import UserError

MAX_MEMBERS = 1_000_000
MAX_GROWTH = 4
"""An archive of images may be so many times larger unpacked ..."""
SLACK = 2**28
"""... plus so many bytes; padding and headers of tiny images compress well."""

DAMAGED = (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, lzma.LZMAError, OSError, NotImplementedError)


class File(NamedTuple):
    """A regular file inside an archive or folder."""

    name: str
    """Its path inside, with forward slashes."""
    size: int


class Archive(Protocol):
    path: Path

    def files(self) -> list[File]:
        """All regular files but those that systems scatter about. Raises UserError for anything unsafe."""

    def contents(self) -> Iterator[tuple[str, bytes | Path]]:
        """(name, content) of each file: its bytes, or its path where it lies in a folder."""


@contextlib.contextmanager
def open_archive(path: Path) -> Iterator[Archive]:
    """Open a tar (plain, gzip, bzip2, xz), a zip, or a folder, told apart by content."""
    if path.is_dir():
        yield Folder(path)
        return
    try:
        with path.open("rb") as file:
            start = file.read(6)
    except FileNotFoundError:
        raise UserError(f"{path}: not found") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        if start.startswith((b"PK\x03\x04", b"PK\x05\x06")):
            with zipfile.ZipFile(path) as archive:
                yield Zip(path, archive)
        else:
            yield Tar(path)
    except DAMAGED as error:
        if isinstance(error, OSError) and not isinstance(error, gzip.BadGzipFile) and error.errno is not None:
            raise  # a full disk or a missing permission, not the archive's fault
        raise UserError(f"{path}: not an intact tar or zip archive: {_reason(error)}") from None


class Tar:
    def __init__(self, path: Path) -> None:
        self.path = path
        self._files: list[File] | None = None

    def files(self) -> list[File]:
        if self._files is None:  # reading it means decompressing everything
            self._files = [File(name, member.size) for name, member, _ in self._members()]
        return self._files

    def contents(self) -> Iterator[tuple[str, bytes]]:
        for name, member, tar in self._members():
            file = tar.extractfile(member)
            assert file is not None  # regular files only
            content = file.read()
            if len(content) != member.size:
                raise tarfile.ReadError(f"{name} is cut off")
            yield name, content

    def _members(self) -> Iterator[tuple[str, tarfile.TarInfo, tarfile.TarFile]]:
        guard = _Guard(self.path)
        with (
            self.path.open("rb") as packed,
            _decompressed(packed) as plain,
            tarfile.open(fileobj=_Bounded(plain, guard.limit, self.path), mode="r:") as tar,  # type: ignore[arg-type]
        ):
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # tarfile would keep them all
                if member.isdir():
                    guard.check_name(member.name)
                    continue
                if not member.isreg() or member.issparse():
                    guard.refuse(member.name, f"is {_kind(member)}, not a file")
                guard.check(member.name, member.size)
                tarfile.data_filter(member, "/nowhere")  # Python's own opinion on what is safe
                if not is_clutter(member.name):
                    yield member.name.removeprefix("./"), member, tar


class Zip:
    def __init__(self, path: Path, archive: zipfile.ZipFile) -> None:
        self.path = path
        self.archive = archive

    def files(self) -> list[File]:
        return [File(name, member.file_size) for name, member in self._members()]

    def contents(self) -> Iterator[tuple[str, bytes]]:
        for name, member in self._members():
            with self.archive.open(member) as file:
                content = file.read(member.file_size + 1)
            if len(content) != member.file_size:
                raise zipfile.BadZipFile(f"{name} is not as long as announced")
            yield name, content

    def _members(self) -> Iterator[tuple[str, zipfile.ZipInfo]]:
        guard = _Guard(self.path)
        for member in self.archive.infolist():
            name = member.orig_filename  # as written; zipfile cuts `filename` at a zero byte
            if member.is_dir():
                guard.check_name(name)
                continue
            kind = stat.S_IFMT(member.external_attr >> 16)
            if kind not in (0, stat.S_IFREG):
                guard.refuse(name, "is a link or a device, not a file")
            if member.flag_bits & 1:
                guard.refuse(name, "is encrypted")
            guard.check(name, member.file_size)
            if not is_clutter(name):
                yield name.removeprefix("./"), member


class Folder:
    """A folder's files, through links to folders elsewhere."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def files(self) -> list[File]:
        return [File(name, path.stat().st_size) for name, path in self.contents()]

    def contents(self) -> Iterator[tuple[str, Path]]:
        seen = set()
        for place, folders, files in os.walk(self.path, followlinks=True, onerror=_raise):
            real = os.path.realpath(place)
            if real in seen:  # a link back up
                folders.clear()
                continue
            seen.add(real)
            folders.sort()
            for name in sorted(files):
                path = Path(place, name)
                inside = path.relative_to(self.path).as_posix()
                if not is_clutter(inside):
                    yield inside, path


def _raise(error: OSError) -> None:
    raise UserError(f"{error.filename}: cannot be read: {error.strerror}")


def content_of(content: bytes | Path) -> bytes:
    return read_file(content) if isinstance(content, Path) else content


class _Guard:
    """Looks at every member of an archive in turn and refuses the archive at the first that is not plain."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.limit = MAX_GROWTH * path.stat().st_size + SLACK
        self.total = 0
        self.names: set[str] = set()

    def check(self, name: str, size: int) -> None:
        self.check_name(name)
        self.total += size
        if size > MAX_BYTES:
            self.refuse(name, f"unpacks to {size:,} bytes, which no image needs")
        if self.total > self.limit:
            self.refuse(name, f"brings the unpacked size to {self.total:,} bytes, which an archive of images never has")

    def check_name(self, name: str) -> None:
        if name.startswith("/") or "\\" in name or re.match(r"[A-Za-z]:", name):
            self.refuse(name, "has an absolute or foreign name")
        if ".." in PurePosixPath(name).parts:
            self.refuse(name, "leads out of the folder it is unpacked to")
        if not name.isprintable() or len(name) > 1000:
            self.refuse(name, "has an unprintable name")
        plain = str(PurePosixPath(name))
        if plain in self.names:
            self.refuse(name, "is there twice")
        if len(self.names) >= MAX_MEMBERS:
            self.refuse(name, f"is one of more than {MAX_MEMBERS:,} members")
        self.names.add(plain)

    def refuse(self, name: str, why: str) -> None:
        shown = repr(name) if len(name) <= 200 else repr(name[:200]) + "..."
        raise UserError(f"{self.path}: refused, nothing was unpacked: member {shown} {why}")


class _Bounded(io.RawIOBase):
    """The decompressed bytes of a tar, with an end to how many and how many at once: headers can be bombs too."""

    def __init__(self, file: BinaryIO, limit: int, path: Path) -> None:
        self.file = file
        self.limit = limit
        self.path = path

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        if size < 0 or size > MAX_BYTES:
            raise UserError(f"{self.path}: refused, nothing was unpacked: a header announces {size:,} bytes")
        content = self.file.read(size)
        self._check(self.file.tell())
        return content

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        assert whence == io.SEEK_SET
        self._check(offset)
        return self.file.seek(offset)

    def tell(self) -> int:
        return self.file.tell()

    def _check(self, offset: int) -> None:
        if offset > self.limit + 2**20:
            raise UserError(
                f"{self.path}: refused, nothing was unpacked: it unpacks to more than {self.limit:,} bytes, which an "
                "archive of images never does"
            )


def _decompressed(file: BinaryIO) -> BinaryIO:
    start = file.read(6)
    file.seek(0)
    if start.startswith(b"\x1f\x8b"):
        return gzip.GzipFile(fileobj=file)  # type: ignore[return-value]
    if start.startswith(b"BZh"):
        return bz2.BZ2File(file)  # type: ignore[return-value]
    if start.startswith(b"\xfd7zXZ\x00"):
        return lzma.LZMAFile(file)  # type: ignore[return-value]
    return contextlib.nullcontext(file)  # type: ignore[return-value]


def _kind(member: tarfile.TarInfo) -> str:
    if member.issym() or member.islnk():
        return f"a link to {member.linkname[:200]!r}"
    if member.isdev():
        return "a device or pipe"
    return "of an unusual kind"


def is_clutter(name: str) -> bool:
    """Files that operating systems leave in folders and archives."""
    parts = PurePosixPath(name).parts
    return (
        "__MACOSX" in parts
        or any(part.startswith(".") for part in parts if part != ".")
        or parts[-1].lower() in ("thumbs.db", "desktop.ini")
    )


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
