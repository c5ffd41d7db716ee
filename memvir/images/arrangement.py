"""Image files from any source, arranged into images/{train,test}/CLASS/* with an index.

`arrange` may be interrupted at any moment and run again: what lies there and is right stays, the rest is removed or
completed. A file appears under its name only after its image has been decoded completely, and whole.
"""

import contextlib
import errno
import hashlib
import logging
import os
import shutil
import tempfile
import unicodedata
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import TypeVar

from memvir.errors import UserError
from memvir.files import is_text, temporary_name
from memvir.images import decode as image_files
from memvir.images.archives import Archive, Folder, content_of
from memvir.images.index import IndexRow, read_index, write_index
from memvir.images.plans import Plan, some
from memvir.libraries import available_cores
from memvir.progress import counted, size

log = logging.getLogger("memvir")

Result = TypeVar("Result")


def arrange(archive: Archive, plan: Plan, images: Path, index: Path) -> None:
    """Put every planned file in its place below `images`, check that it decodes, and write `index`.

    Files in a folder are hard-linked where the file system allows, else copied.
    Raises UserError naming the images that cannot be read; the readable ones are in place then, the index is not.
    """
    known = _known(index)
    _remove_strangers(images, {row.file for row in plan.values()})
    _check_room(archive, plan, images)
    _check_distinct(images, {row.file for row in plan.values()})
    for folder in sorted({str(PurePosixPath(row.file).parent) for row in plan.values()}):
        (images / folder).mkdir(parents=True, exist_ok=True)
    rows: list[IndexRow] = []
    unreadable: list[str] = []
    unplanned: set[str] = set()

    def chosen() -> Iterator[tuple[str, bytes | Path]]:
        for name, content in archive.contents():
            if name in plan:
                yield name, content
            else:
                unplanned.add(name)

    def place(name: str, content: bytes | Path) -> IndexRow:
        shown = str(content) if isinstance(content, Path) else f"{archive.path}: {name}"
        return _place(content, plan[name], images, shown, known)

    for placed in _in_threads(place, counted(chosen(), "preparing images", len(plan), "images")):
        try:
            rows.append(placed.result())
        except UserError as error:
            unreadable.append(str(error))
    if unreadable:
        raise UserError("; ".join(unreadable[:3]) + (f"; and {len(unreadable) - 3:,} more" if unreadable[3:] else ""))
    if len(rows) != len(plan):
        raise UserError(f"{archive.path}: changed while it was read; run this again")
    if left_out := sorted(archive.left_out | unplanned):
        log.warning(
            "warning: %s: left out %d that are no images of the data set: %s",
            archive.path,
            len(left_out),
            some([name if is_text(name) else ascii(name) for name in left_out]),
        )
    write_index(index, rows)


def _check_distinct(images: Path, files: set[str]) -> None:
    """Raise UserError if the file system takes two names for one, as those of macOS and Windows do with a and A."""
    spellings: dict[tuple[str, str], str] = {}
    for path in sorted(files | {str(PurePosixPath(file).parent) for file in files}):
        folder, _, name = path.rpartition("/")
        other = spellings.setdefault((folder, unicodedata.normalize("NFC", name).casefold()), name)
        if other != name and _is_one_name(images, other, name):
            raise UserError(
                f"{images / folder}: {other} and {name} are one name on this file system; rename one of them"
            )


def _is_one_name(folder: Path, first: str, second: str) -> bool:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as probe:
        Path(probe, first).touch()
        return Path(probe, second).exists()


def _check_room(archive: Archive, plan: Plan, images: Path) -> None:
    if isinstance(archive, Folder):
        return  # links take no room
    images.mkdir(parents=True, exist_ok=True)
    files = (file for file in archive.files() if file.name in plan)
    needed = sum(file.size for file in files if not (images / plan[file.name].file).exists())
    free = shutil.disk_usage(images).free
    if needed > free:
        raise UserError(f"{images}: the images need {size(needed)} and the disk has {size(free)} free; free some space")


def _place(content: bytes | Path, row: IndexRow, images: Path, shown: str, known: Mapping[str, str]) -> IndexRow:
    target = images / row.file
    data = content_of(content)
    md5 = hashlib.md5(data, usedforsecurity=False).hexdigest()
    linked = isinstance(content, Path) and target.exists() and content.samefile(target)
    # what is there was checked before it was put there, unless someone wrote into the linked file since
    in_place = known.get(row.file) == md5 if linked else True
    if not (in_place and target.is_file() and not target.is_symlink() and target.read_bytes() == data):
        image_files.load(data, shown)
        if not linked:
            _write(content, data, target)
    return row._replace(md5=md5)


def _write(content: bytes | Path, data: bytes, target: Path) -> None:
    """Link or write under another name, then rename. Not flushed to disk one by one: the index's md5 would tell."""
    temporary = temporary_name(target)
    temporary.unlink(missing_ok=True)
    try:
        if not (isinstance(content, Path) and _link(content, temporary)):
            temporary.write_bytes(data)
        temporary.replace(target)
        temporary.unlink(missing_ok=True)  # rename does nothing between two links to one file
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def _link(source: Path, target: Path) -> bool:
    try:
        os.link(source.resolve(), target)
    except OSError as error:
        if error.errno in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EACCES, errno.ENOSYS):
            return False
        raise
    return True


def _remove_strangers(images: Path, wanted: set[str]) -> None:
    """Delete everything below `images` that is not planned; links are removed, never followed."""
    folders = {str(parent) for file in wanted for parent in PurePosixPath(file).parents}
    removed = 0
    for place, subfolders, files in os.walk(images):
        for name in [*subfolders, *files]:
            path = Path(place, name)
            relative = path.relative_to(images).as_posix()
            plain_folder = path.is_dir() and not path.is_symlink()
            if relative in (folders if plain_folder else wanted) and not path.is_symlink():
                continue
            removed += 1
            if plain_folder:
                shutil.rmtree(path)
                subfolders.remove(name)
            else:
                path.unlink()
                if name in subfolders:
                    subfolders.remove(name)
    if removed:
        log.info("%s: removed %d file(s) and folder(s) that do not belong to the data set", images, removed)


def _known(index: Path) -> dict[str, str]:
    """md5 of the files that an earlier, complete run vouched for."""
    try:
        table = read_index(index)
    except UserError:
        return {}
    return dict(zip(table["file"], table["md5"], strict=True))


def _in_threads(
    function: Callable[[str, bytes | Path], Result], files: Iterable[tuple[str, bytes | Path]]
) -> "Iterator[Future[Result]]":
    """Call `function(name, content)` a few at a time, in order; decoding and hashing release Python's lock."""
    workers = available_cores()
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[tuple[Future[Result], int]] = deque()
        held = 0
        try:
            for name, content in files:
                length = len(content) if isinstance(content, bytes) else 0
                waiting.append((pool.submit(function, name, content), length))
                held += length
                # bounds how many undecoded images wait in memory
                while waiting and (len(waiting) > 4 * workers or held > image_files.MAX_BYTES):
                    future, length = waiting.popleft()
                    held -= length
                    yield future
            while waiting:
                yield waiting.popleft()[0]
        finally:
            for future, _ in waiting:
                future.cancel()
