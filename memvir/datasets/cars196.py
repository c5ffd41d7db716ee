"""CARS196 from whichever of its forms can be had.

The original car_ims.tgz (numbered images) is verified by its md5; zips, tars and folders with one folder per class,
as mirrors offer them, are pooled over their classification split and verified by the number of images of each class.
"""

import json
import logging
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from memvir.config import Cars196Data
from memvir.datasets.annotation import ImageClass, file_name, read_annotation
from memvir.datasets.archives import Archive, open_archive
from memvir.datasets.arrangement import Plan, arrange, by_number, image_names, report_problems
from memvir.datasets.index import IndexRow
from memvir.download import DownloadError, fetch
from memvir.errors import UserError
from memvir.files import file_hash, write_json

log = logging.getLogger("memvir")

ARCHIVE = "car_ims.tgz"
OFFICIAL_MD5 = "d5c8f0aa497503f355e17dc7886c3f14"
SPOT_CHECKS = {1: "2d44a28f071aeaac9c0802fddcde452e", 16185: "bab296d5e4b2290d024920bf4dc23d07"}
"""md5 of two images, for folders unpacked from the official archive."""
COUNTS = {"train": 8054, "test": 8131}
"""Images of classes 1-98 and 99-196: the protocol's numbers."""
ARCHIVE_SUFFIXES = (".tgz", ".tar", ".gz", ".bz2", ".xz", ".zip")
MIRRORS = (
    "kaggle.com/datasets/jutrera/stanford-car-dataset-by-classes-folder (zip)",
    "dropbox.com/s/zi2o92hzqekbmef/cars196.tar",
    "archived copies of ai.stanford.edu/~jkrause/car196/car_ims.tgz",
)


def download(data: Cars196Data, source: Path, target: Path) -> None:
    """Find the images and note in target/source.json where they are.

    `data.folder` or `data.archive` is used if given; else what lies in `source`, else what an address gives.
    """
    classes = read_classes(source)
    if data.folder is not None or data.archive is not None:
        key = "folder" if data.folder is not None else "archive"
        path = Path(data.folder or data.archive or "").expanduser()
        if not path.exists():
            raise UserError(f"{path}: not found; it is what {key} names in params.yaml")
        verify(path, data, classes)
        _note(target, path, f"{key} of params.yaml")
        return
    tried: list[tuple[str, str]] = []
    for path in _dropped(source):
        try:
            verify(path, data, classes)
        except UserError as error:
            tried.append((str(path), str(error).removeprefix(f"{path}: ")))
            log.warning("warning: %s", error)
        else:
            _note(target, path, f"found in {source.as_posix()}")
            return
    for address in data.addresses:
        name = file_name(PurePosixPath(urlsplit(address).path).name)
        path = target / name
        try:
            if path.exists() and _is_good(path, data, classes):
                log.info("%s is here already", path)
            else:
                digest = data.md5 if name == ARCHIVE else None
                fetch([address], path, algorithm="md5", digest=digest, what="CARS196")
                verify(path, data, classes)
        except DownloadError as error:
            tried += error.answers
        except UserError as error:
            if not path.exists():
                raise  # no room on the disk, which another address would not change
            path.unlink()
            tried.append((address, f"gave a file of no use: {str(error).removeprefix(f'{path}: ')}"))
        else:
            _note(target, path, address)
            return
    answers = "; ".join(f"{what}: {answer}" for what, answer in tried) or "nothing, no address is given"
    raise UserError(
        f"CARS196: no source worked. Tried: {answers}. What you can do: get {ARCHIVE} (md5 {data.md5 or OFFICIAL_MD5}) "
        f"or a zip or tar of class folders and put it into {source.as_posix()}/, or name it in params.yaml under "
        f"archive (folder, if it is unpacked). Known copies: {'; '.join(MIRRORS)}"
    )


def prepare(data: Cars196Data, source: Path, download: Path, images: Path, index: Path) -> None:
    """Arrange the images that `download` found by split and class and write the index."""
    classes = read_classes(source)
    try:
        found = json.loads((download / "source.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        raise UserError(f"{download / 'source.json'}: not there or damaged; run the download stage again") from None
    path = Path(found["path"]) if Path(found["path"]).is_absolute() else download / found["path"]
    log.info("cars196: preparing %s (%s)", path, found["source"])
    if not path.exists():
        raise UserError(f"{path}: was there when it was found ({found['source']}), now it is not; run download again")
    with open_archive(path) as archive:
        arrange(archive, plan_of(archive, data, classes), images, index)


def verify(path: Path, data: Cars196Data, classes: Sequence[ImageClass]) -> None:
    """Raise UserError if an archive or folder does not hold the images of `classes`, saying why."""
    with open_archive(path) as archive:
        plan_of(archive, data, classes)


def plan_of(archive: Archive, data: Cars196Data, classes: Sequence[ImageClass]) -> Plan:
    """Where each image of the archive belongs, whichever of the accepted forms it has.

    Raises UserError naming what is missing, extra, or of the wrong checksum.
    """
    path = archive.path
    if _has_class_folders(archive, classes):
        return by_class(classes, archive)
    if data.md5 and not path.is_dir() and (found := file_hash(path)) != data.md5:
        raise UserError(f"{path}: its md5 is {found}, expected {data.md5}")
    plan = by_number(classes, archive)
    if path.is_dir() and data.md5 == OFFICIAL_MD5:
        _spot_check(path, plan)
    return plan


def by_class(classes: Sequence[ImageClass], archive: Archive) -> Plan:
    """Plan an archive with a folder for each class, anywhere in it; train/ and test/ above it are pooled.

    Names of classes are compared by their letters and digits only (mirrors write C-V for C/V); a leading number is
    ignored. Raises UserError naming classes with too few or too many images and images outside of the classes.
    """
    known = {_key(cls.name): cls for cls in classes}
    plan: dict[str, IndexRow] = {}
    places: dict[str, str] = {}
    counts: dict[int, int] = defaultdict(int)
    extra = []
    for name in image_names(archive):
        path = PurePosixPath(name)
        cls = _class_of(path, known)
        if cls is None:
            extra.append(name)
            continue
        half = path.parts[-3] if len(path.parts) > 2 and path.parts[-3] in ("train", "test") else None
        place = f"{cls.split}/{cls.folder}/{f'{half}_' if half else ''}{file_name(path.name)}"
        if place in places:
            raise UserError(f"{archive.path}: {places[place]} and {name} cannot both be {place}")
        places[place] = name
        counts[cls.class_id] += 1
        plan[name] = IndexRow(cls.split, cls.class_id, cls.name, place, "")
    wrong = [
        f"{cls.name} ({counts[cls.class_id]} instead of {len(cls.images)})"
        for cls in classes
        if counts[cls.class_id] != len(cls.images)
    ]
    report_problems(archive, (("classes with another number of images", wrong), ("images of no known class", extra)))
    return plan


def read_classes(source: Path) -> list[ImageClass]:
    """The annotation in the repository, compared with cars_annos.mat if that lies beside it."""
    path = source / "annotation.csv"
    classes = read_annotation(path)
    counts = {split: sum(len(cls.images) for cls in classes if cls.split == split) for split in COUNTS}
    if counts != COUNTS or len(classes) != 196:
        raise UserError(f"{path}: not CARS196's (196 classes, {COUNTS}), found {len(classes)} classes, {counts}")
    official = source / "cars_annos.mat"
    if official.exists():
        compare_with_official(official, classes, path)
    return classes


def compare_with_official(official: Path, classes: Sequence[ImageClass], path: Path) -> None:
    """Raise UserError naming the first image or class on which cars_annos.mat and the annotation disagree."""
    from scipy.io import loadmat  # late: hardly anyone has the file

    try:
        content = loadmat(official, squeeze_me=True, variable_names=["annotations", "class_names"])
        names = [str(name) for name in content["class_names"]]
        rows = content["annotations"]
        found = {
            int(PurePosixPath(str(file)).stem): int(class_id)
            for file, class_id in zip(rows["relative_im_path"], rows["class"], strict=True)
        }
    except OSError as error:
        raise UserError(f"{official}: cannot be read: {error.strerror or error}") from None
    except Exception as error:  # scipy raises nearly anything over a file that is not MATLAB's
        raise UserError(f"{official}: not CARS196's annotation file: {type(error).__name__}: {error}") from None
    expected = {number: cls.class_id for cls in classes for number in cls.images}
    for number in sorted(expected.keys() | found.keys()):
        ours, theirs = (f"class {d[number]}" if number in d else "nothing" for d in (expected, found))
        if ours != theirs:
            raise UserError(f"{official}: image {number:06} is {theirs} there and {ours} in {path}; one is not genuine")
    for cls, name in zip(classes, names, strict=False):
        if _key(cls.name) != _key(name):
            raise UserError(f"{official}: class {cls.class_id} is {name} there and {cls.name} in {path}")
    log.info("%s agrees with %s", official, path)


def _dropped(source: Path) -> list[Path]:
    """Archives and folders that someone put into source/, the official archive first."""
    found = [
        entry
        for entry in source.iterdir()
        if not entry.name.startswith(".") and (entry.is_dir() or entry.name.lower().endswith(ARCHIVE_SUFFIXES))
    ]
    return sorted(found, key=lambda entry: (entry.name != ARCHIVE, entry.name))


def _is_good(path: Path, data: Cars196Data, classes: Sequence[ImageClass]) -> bool:
    try:
        verify(path, data, classes)
    except UserError:
        return False
    return True


def _note(target: Path, path: Path, source: str) -> None:
    """A file inside `target` is noted relative to it, so that the repository can be moved."""
    log.info("cars196: using %s (%s)", path, source)
    inside = path.parent == target
    write_json(target / "source.json", {"source": source, "path": path.name if inside else str(path.absolute())})


def _spot_check(path: Path, plan: Plan) -> None:
    for name in plan:
        number = int(PurePosixPath(name).stem)
        if number in SPOT_CHECKS and (found := file_hash(path / name)) != SPOT_CHECKS[number]:
            raise UserError(
                f"{path / name}: its md5 is {found}, expected {SPOT_CHECKS[number]}; not the original images"
            )


def _has_class_folders(archive: Archive, classes: Sequence[ImageClass]) -> bool:
    known = {_key(cls.name): cls for cls in classes}
    return any(_class_of(PurePosixPath(name), known) for name in image_names(archive))


def _class_of(path: PurePosixPath, known: dict[str, ImageClass]) -> ImageClass | None:
    folder = path.parent.name
    return known.get(_key(folder)) or known.get(_key(re.sub(r"^[0-9]+[._ -]+", "", folder)))


def _key(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
