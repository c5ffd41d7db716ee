"""Where each file of a source belongs: made of its names, of its lists, and of what is known about the data set.

A plan is also the verification: of a file that is missing, extra, or of the wrong class, none comes about.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from memvir.errors import UserError
from memvir.images.annotation import ImageClass
from memvir.images.index import IndexRow

if TYPE_CHECKING:
    from memvir.images.archives import Archive

Plan = Mapping[str, IndexRow]
"""The name of a file in its source -> its row of the index, whose md5 is still empty."""

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


def image_names(archive: "Archive") -> list[str]:
    """The names of the files that claim to be images; archives hold tables and notes besides."""
    return [file.name for file in archive.files() if file.name.lower().endswith(IMAGE_SUFFIXES)]


def by_number(classes: Sequence[ImageClass], archive: "Archive") -> Plan:
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
    report_problems(archive, (("missing", missing), ("extra", extra)))
    return plan


def by_list(archive: "Archive", listed: Mapping[str, IndexRow], names: Iterable[str] | None = None) -> Plan:
    """Plan an archive by a list: an image's path -> its row.

    What the archive puts above these paths does not matter. `names`: the files that have to be listed; without, all
    images. Raises UserError naming missing and extra members.
    """
    if not listed:
        raise UserError(f"{archive.path}: lists no picture of the data set")
    plan, extra = {}, []
    expected = dict(listed)
    for name in image_names(archive) if names is None else names:
        row = next((expected.pop(tail) for tail in _tails(name) if tail in expected), None)
        if row is None:
            extra.append(name)
        else:
            plan[name] = row
    report_problems(archive, (("missing", list(expected)), ("extra", extra)))
    return checked(archive, plan)


def _tails(name: str) -> Iterator[str]:
    """A path, and what is left of it without its first folders."""
    while name:
        yield name
        name = name.partition("/")[2]


def checked(archive: "Archive", plan: Plan) -> Plan:
    """The plan, if every file has a place of its own."""
    places: dict[str, str] = {}
    for name, row in plan.items():
        if (other := places.setdefault(row.file, name)) != name:
            raise UserError(f"{archive.path}: {other} and {name} cannot both be {row.file}")
    return plan


def check_counts(archive: "Archive", plan: Plan, expected: Mapping[str, tuple[int, int]]) -> None:
    """Raise UserError if the images and classes of a split are not as many as the protocol's."""
    images: dict[str, int] = defaultdict(int)
    classes: dict[str, set[int]] = defaultdict(set)
    for row in plan.values():
        images[row.split] += 1
        classes[row.split].add(row.class_id)
    for split, (image_count, class_count) in expected.items():
        if (images[split], len(classes[split])) != (image_count, class_count):
            raise UserError(
                f"{archive.path}: not the data set's protocol, whose {split} split has {image_count:,} images of "
                f"{class_count:,} classes; here it has {images[split]:,} of {len(classes[split]):,}"
            )
        if split != "train" and (seen := classes["train"] & classes[split]):
            raise UserError(f"{archive.path}: {len(seen):,} classes are in train and in {split}, such as {min(seen)}")


def read_lists(archive: "Archive", names: Sequence[str], beside: Path) -> list[tuple[str, bytes]]:
    """Of each of these lists, where it was found and its content: in the archive, else next to it, else in `beside`.

    Raises UserError naming the first that is nowhere.
    """
    found: dict[str, str] = {}
    for file in archive.files():
        name = file.name.rpartition("/")[2]
        if name in names and (name not in found or file.name.count("/") < found[name].count("/")):
            found[name] = file.name
    lists = {}
    for path, content in archive.contents(set(found.values())) if found else ():
        name = path.rpartition("/")[2]
        lists[name] = (f"{archive.path}: {path}", content.read_bytes() if isinstance(content, Path) else content)
    for name in names:
        if name not in lists:
            places = [path for path in (archive.path.with_name(name), *sorted(beside.rglob(name))) if path.is_file()]
            if not places:
                raise UserError(f"{archive.path}: holds no {name}, nor is it beside it or in {beside.as_posix()}")
            lists[name] = (str(places[0]), places[0].read_bytes())
    return [lists[name] for name in names]


def list_rows(where: str, content: bytes, form: str, pattern: str, header: Sequence[str] = ()) -> Iterator[re.Match]:
    """The rows of a list, each as a match of `pattern`; `form` is what a person calls it.

    Raises UserError naming the first line that is another, the header's among them.
    """
    try:
        lines = content.decode().splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{where}: not a text file") from None
    for number, line in enumerate(lines, 1):
        words = " ".join(line.split())
        if number <= len(header):
            if words != header[number - 1]:
                raise UserError(f"{where}, line {number}: expected {header[number - 1]!r}, found {_shown(words)}")
        elif match := re.fullmatch(pattern, words, re.ASCII):
            yield match
        else:
            raise UserError(f"{where}, line {number}: expected {form}, found {_shown(words)}")


def report_problems(archive: "Archive", problems: Iterable[tuple[str, Sequence[str]]]) -> None:
    """Raise UserError with the kinds of problems that have any names, and the first names of each."""
    found = [f"{len(names):,} {what}: {some(names)}" for what, names in problems if names]
    if found:
        raise UserError(f"{archive.path}: not the images that the annotation lists; {'; '.join(found)}")


def some(names: Sequence[str], count: int = 5) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


def _shown(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:77]}...")
