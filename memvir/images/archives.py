"""Archives and folders as sequences of image files. An archive is hostile until shown otherwise.

Nothing is ever extracted by the name that an archive gives: callers read the bytes of a member and choose the place.
Beyond that, a member that is a link or a device, or whose name leads elsewhere or comes twice, makes the whole
archive refused by name, as do sizes that the archive's own size cannot explain (images hardly compress).
"""

import bz2
import contextlib
import errno
import gzip
import io
import lzma
import os
import re
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Container, Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple, Protocol

from memvir.errors import UserError
from memvir.files import is_text
from memvir.images.decode import MAX_BYTES, read_file

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
    left_out: set[str]
    """Names of the clutter that was met so far."""

    def files(self) -> list[File]:
        """All regular files but clutter. Raises UserError for anything unsafe."""

    def contents(self, only: Container[str] | None = None) -> Iterator[tuple[str, bytes | Path]]:
        """(name, content) of each file, or of `only` these: its bytes, or its path where it lies in a folder."""


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
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise  # a full disk or a missing permission; a place before the file's start is the archive's fault
        raise UserError(f"{path}: not an intact tar or zip archive: {_reason(error)}") from None


class Tar:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.left_out: set[str] = set()
        self._files: list[File] | None = None

    def files(self) -> list[File]:
        if self._files is None:  # reading it means decompressing everything
            self._files = [File(name, member.size) for name, member, _ in self._members()]
        return self._files

    def contents(self, only: Container[str] | None = None) -> Iterator[tuple[str, bytes]]:
        for name, member, tar in self._members():
            if only is not None and name not in only:
                continue
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
                if hasattr(tarfile, "data_filter"):  # from 3.11.4 on
                    tarfile.data_filter(member, "/nowhere")  # Python's own opinion on what is safe
                name = member.name.removeprefix("./")
                if is_clutter(name):
                    self.left_out.add(name)
                else:
                    yield name, member, tar


class Zip:
    def __init__(self, path: Path, archive: zipfile.ZipFile) -> None:
        self.path = path
        self.archive = archive
        self.left_out: set[str] = set()

    def files(self) -> list[File]:
        return [File(name, member.file_size) for name, member in self._members()]

    def contents(self, only: Container[str] | None = None) -> Iterator[tuple[str, bytes]]:
        for name, member in self._members():
            if only is not None and name not in only:
                continue
            with self.archive.open(member) as file:
                content = file.read(member.file_size + 1)
            if len(content) != member.file_size:
                raise zipfile.BadZipFile(f"{name} is not as long as announced")
            yield name, content

    def _members(self) -> Iterator[tuple[str, zipfile.ZipInfo]]:
        guard = _Guard(self.path)
        for member in self.archive.infolist():
            name = member.orig_filename  # as written; zipfile cuts `filename` at a zero byte
            if name.endswith("/"):
                guard.check_name(name)
                continue
            kind = stat.S_IFMT(member.external_attr >> 16)
            if kind not in (0, stat.S_IFREG):
                guard.refuse(name, "is a link or a device, not a file")
            if member.flag_bits & 1:
                guard.refuse(name, "is encrypted")
            guard.check(name, member.file_size)
            name = name.removeprefix("./")
            if is_clutter(name):
                self.left_out.add(name)
            else:
                yield name, member


class Folder:
    """A folder's files. A link to a file counts as the file, one to a folder is refused."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.left_out: set[str] = set()

    def files(self) -> list[File]:
        return [File(name, path.stat().st_size) for name, path in self.contents()]

    def contents(self, only: Container[str] | None = None) -> Iterator[tuple[str, Path]]:
        for place, folders, files in os.walk(self.path, onerror=_raise):
            inside = PurePosixPath(Path(place).relative_to(self.path).as_posix())
            clutter = {name for name in [*folders, *files] if is_clutter(name)}
            self.left_out.update(str(inside / name) for name in clutter)
            folders[:] = sorted(set(folders) - clutter)
            for name in folders:
                refuse_folder_link(Path(place, name))
            for name in sorted(set(files) - clutter):
                if only is None or str(inside / name) in only:
                    yield str(inside / name), Path(place, name)


def _raise(error: OSError) -> None:
    raise UserError(f"{error.filename}: cannot be read: {error.strerror}")


def refuse_folder_link(path: Path) -> None:
    """DVC reads through links to files, not through links to folders: it would take old results for new ones."""
    if path.is_symlink() and path.is_dir():
        raise UserError(
            f"{path}: a link to a folder, behind which changes would go unnoticed; put the folder itself there, or a "
            "folder of links to its files, as `cp -rs FOLDER PLACE` makes it"
        )


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
        if not PurePosixPath(name).name:
            self.refuse(name, "is a file without a name")
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
        if not is_text(name) or len(name) > 1000:
            self.refuse(name, "has a name with control characters, or of more than 1,000 characters")
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


CLUTTER = re.compile(
    r"""
    \._.* | \.DS_Store | \.localized | \.AppleDouble | \.Spotlight-V100 | \.fseventsd | \.Trashes  # macOS
    | __MACOSX | Icon\r  # macOS
    | Thumbs\.db | ehthumbs\.db | desktop\.ini | \$RECYCLE\.BIN | System\ Volume\ Information  # Windows
    | \.directory | \.Trash-[0-9]+ | \.nfs[0-9a-f]+ | \.fuse_hidden[0-9a-f]+ | lost\+found  # Linux
    | @eaDir | \#recycle | \.dropbox | \.dropbox\.cache | \.stfolder  # network disks
    | \.git | \.gitignore | \.gitattributes | \.gitkeep | \.hg | \.svn | \.dvc  # version control
    | \.ipynb_checkpoints | __pycache__ | \.picasa\.ini | \.nomedia  # programs
    """,
    re.VERBOSE | re.IGNORECASE,
)
"""What systems and programs leave beside a user's files. No other name is passed over because it starts with a dot."""


def is_clutter(name: str) -> bool:
    """Whether a file, or a folder above it, is nothing that a person put there."""
    return any(CLUTTER.fullmatch(part) for part in PurePosixPath(name).parts)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
