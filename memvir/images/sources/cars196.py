"""CARS196 from whichever of its forms can be had.

The original car_ims.tgz (numbered images) is verified by its md5; zips, tars and folders with one folder per class,
as mirrors offer them, are pooled over their classification split and verified by the number of images of each class.
"""

import logging
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Literal

from memvir.errors import UserError
from memvir.files import file_hash
from memvir.images.annotation import ImageClass, file_name, read_annotation
from memvir.images.index import IndexRow
from memvir.images.plans import Plan, by_number, checked, image_names, report_problems
from memvir.images.sources.benchmark import Benchmark

if TYPE_CHECKING:
    from memvir.images.archives import Archive

log = logging.getLogger("memvir")

OFFICIAL_MD5 = "d5c8f0aa497503f355e17dc7886c3f14"
SPOT_CHECKS = {1: "2d44a28f071aeaac9c0802fddcde452e", 16185: "bab296d5e4b2290d024920bf4dc23d07"}
"""md5 of two images, for folders unpacked from the official archive."""


class Cars196(Benchmark):
    """CARS196 (docs/METHOD.md, section 4)."""

    source: Literal["cars196"]

    title = "CARS196"
    official = "car_ims.tgz"
    other_forms = "a zip or tar of class folders"
    copies = (
        "kaggle.com/datasets/jutrera/stanford-car-dataset-by-classes-folder (zip)",
        "dropbox.com/s/zi2o92hzqekbmef/cars196.tar",
        "archived copies of ai.stanford.edu/~jkrause/car196/car_ims.tgz",
    )

    counts = {"train": (8054, 98), "test": (8131, 98)}

    def check_source(self, source: Path) -> None:
        read_classes(source)

    def plan(self, archive: "Archive", source: Path) -> Plan:
        classes = read_classes(source)
        if _has_class_folders(archive, classes):
            return by_class(classes, archive)
        self.check_md5(archive)
        plan = by_number(classes, archive)
        if archive.path.is_dir() and self.md5 == OFFICIAL_MD5:
            _spot_check(archive.path, plan)
        return plan


def by_class(classes: Sequence[ImageClass], archive: "Archive") -> Plan:
    """Plan an archive with a folder for each class, anywhere in it; train/ and test/ above it are pooled.

    Names of classes are compared by their letters and digits only (mirrors write C-V for C/V); a leading number is
    ignored. Raises UserError naming classes with too few or too many images and images outside of the classes.
    """
    known = {_key(cls.name): cls for cls in classes}
    plan: dict[str, IndexRow] = {}
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
        counts[cls.class_id] += 1
        plan[name] = IndexRow(cls.split, cls.class_id, cls.name, place, "")
    checked(archive, plan)
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
    members = {split: [cls for cls in classes if cls.split == split] for split in Cars196.counts}
    counts = {split: (sum(len(cls.images) for cls in some), len(some)) for split, some in members.items()}
    if counts != Cars196.counts:
        raise UserError(f"{path}: not CARS196's (images and classes {Cars196.counts}), found {counts}")
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


def _spot_check(path: Path, plan: Plan) -> None:
    for name in plan:
        number = int(PurePosixPath(name).stem)
        if number in SPOT_CHECKS and (found := file_hash(path / name)) != SPOT_CHECKS[number]:
            raise UserError(
                f"{path / name}: its md5 is {found}, expected {SPOT_CHECKS[number]}; not the original images"
            )


def _has_class_folders(archive: "Archive", classes: Sequence[ImageClass]) -> bool:
    known = {_key(cls.name): cls for cls in classes}
    return any(_class_of(PurePosixPath(name), known) for name in image_names(archive))


def _class_of(path: PurePosixPath, known: dict[str, ImageClass]) -> ImageClass | None:
    folder = path.parent.name
    return known.get(_key(folder)) or known.get(_key(re.sub(r"^[0-9]+[._ -]+", "", folder)))


def _key(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
