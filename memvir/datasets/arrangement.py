"""Image files from any source, arranged into images/{train,test}/CLASS/* with an index.

`arrange` may be interrupted at any moment and run again: what lies there and is right stays, the rest is removed or
completed. A file appears under its name only after its image has been decoded completely, and whole.
"""

import contextlib
import errno
import hashlib
import logging
import os
import re
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import TypeVar

from memvir.counter import counted, size
from memvir.datasets import images as image_files
from memvir.datasets.annotation import ImageClass
from memvir.datasets.archives import Archive, Folder, content_of
from memvir.datasets.index import IndexRow, read_index, write_index
from memvir.errors import UserError

log = logging.getLogger("memvir")

Result = TypeVar("Result")

Plan = Mapping[str, IndexRow]
"""Where each file of a source belongs: its name there -> its row of the index, whose md5 is still empty."""

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


def by_number(classes: Sequence[ImageClass], archive: Archive) -> Plan:
    """Plan an archive of numbered images, FOLDER/000001.jpg. Raises UserError naming missing and extra members."""
    plan, extra = {}, []
    expected = {number: cls for cls in classes for number in cls.images}
    for name in image_names(archive):
        path = PurePosixPath(name)
        cls = expected.pop(int(path.stem), None) if re.fullmatch(r"[0-9]{1,9}", path.stem) else None
        if cls is None:
            extra.append(name)
        else:
            plan[name] = IndexRow(cls.split, cls.class_id, cls.name, f"{cls.split}/{cls.folder}/{path.name}", "")
    suffix = PurePosixPath(next(iter(plan), "0.jpg")).suffix
    missing = [f"{number:06}{suffix}" for number in sorted(expected)]
    problems = [
        f"{len(files):,} {what}: {_some(files)}" for what, files in (("missing", missing), ("extra", extra)) if files
    ]
    if problems:
        raise UserError(f"{archive.path}: not the images that the annotation lists; {'; '.join(problems)}")
    return plan


def report_problems(archive: Archive, problems: Iterable[tuple[str, Sequence[str]]]) -> None:
    """Raise UserError with the kinds of problems that have any names, and the first names of each."""
    found = [f"{len(names):,} {what}: {_some(names)}" for what, names in problems if names]
    if found:
        raise UserError(f"{archive.path}: not the images that the annotation lists; {'; '.join(found)}")


def image_names(archive: Archive) -> list[str]:
    """The names of the files that claim to be images; archives hold tables and notes besides."""
    return [file.name for file in archive.files() if file.name.lower().endswith(IMAGE_SUFFIXES)]


def arrange(archive: Archive, plan: Plan, images: Path, index: Path) -> None:
    """Put every planned file in its place below `images`, check that it decodes, and write `index`.

    Files in a folder are hard-linked where the file system allows, else copied.
    Raises UserError naming the images that cannot be read; the readable ones are in place then, the index is not.
    """
    known = _known(index)
    _remove_strangers(images, {row.file for row in plan.values()})
    _check_room(archive, plan, images)
    for folder in sorted({str(PurePosixPath(row.file).parent) for row in plan.values()}):
        (images / folder).mkdir(parents=True, exist_ok=True)
    rows: list[IndexRow] = []
    unreadable: list[str] = []
    chosen = ((name, content) for name, content in archive.contents() if name in plan)

    def place(name: str, content: bytes | Path) -> IndexRow:
        shown = str(content) if isinstance(content, Path) else f"{archive.path}: {name}"
        return _place(content, plan[name], images, shown, known)

    for placed in _in_threads(place, counted(chosen, "preparing images", len(plan), "images")):
        try:
            rows.append(placed.result())
        except UserError as error:
            unreadable.append(str(error))
    if unreadable:
        raise UserError("; ".join(unreadable[:3]) + (f"; and {len(unreadable) - 3:,} more" if unreadable[3:] else ""))
    if len(rows) != len(plan):
        raise UserError(f"{archive.path}: changed while it was read; run this again")
    write_index(index, rows)


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
    temporary = target.with_name(f".{target.name}.part")
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


def _in_threads(function: Callable[..., Result], arguments: Iterable[tuple]) -> "Iterator[Future[Result]]":
    """Call `function(*arguments)` a few at a time, in order; decoding and hashing release Python's lock."""
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            for argument in arguments:
                waiting.append(pool.submit(function, *argument))
                if len(waiting) > 4 * workers:  # bounds how many undecoded images wait in memory
                    yield waiting.popleft()
            while waiting:
                yield waiting.popleft()
        finally:
            for future in waiting:
                future.cancel()


def _some(names: Sequence[str], count: int = 5) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")
