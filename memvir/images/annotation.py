"""Which image is of which class, as a table of runs of consecutive image numbers.

    first_image,last_image,class_id,class_name
    1,89,1,AM General Hummer SUV 2000

A class may come in several runs. The first half of the classes is for training, the second half for testing, as in
the CARS196 protocol.
"""

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from memvir.errors import UserError
from memvir.files import is_text, write_text

COLUMNS = ("first_image", "last_image", "class_id", "class_name")


@dataclass(frozen=True)
class ImageClass:
    class_id: int
    name: str
    split: str
    """train or test"""
    images: tuple[int, ...]
    """The numbers of its images, increasing."""

    @property
    def folder(self) -> str:
        """A readable folder name, such as 001_AM_General_Hummer_SUV_2000."""
        return f"{self.class_id:03}_{file_name(self.name.replace('/', '-'))}"


def file_name(text: str) -> str:
    """`text` with all but letters, digits and . + - _ replaced, and its end if it is long: no path stumbles over it."""
    return re.sub(r"[^A-Za-z0-9.+_-]+", "_", text).strip("_.")[-200:] or "_"


def read_annotation(path: Path) -> list[ImageClass]:
    """The classes in the order of their ids. Raises UserError naming the line if the table is not consistent."""
    names: dict[int, str] = {}
    images: dict[int, list[int]] = {}
    owner: dict[int, int] = {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if tuple(reader.fieldnames or ()) != COLUMNS:
                raise UserError(f"{path}: expected the columns {','.join(COLUMNS)}")
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                try:
                    first, last, class_id = (int(row[column]) for column in COLUMNS[:3])
                except (TypeError, ValueError):
                    raise UserError(f"{where}: image and class numbers must be whole numbers") from None
                if not 1 <= first <= last or class_id < 1 or last - first > 10**7:
                    raise UserError(f"{where}: not a run of images: {first} to {last} of class {class_id}")
                if names.setdefault(class_id, row["class_name"]) != row["class_name"] or not row["class_name"]:
                    raise UserError(f"{where}: class {class_id} needs one name, the same in all its runs")
                if not is_text(row["class_name"]):
                    raise UserError(f"{where}: the class name {row['class_name']!r} holds control characters")
                for number in range(first, last + 1):
                    if owner.setdefault(number, class_id) != class_id or number in images.get(class_id, ())[-1:]:
                        raise UserError(f"{where}: image {number} is listed twice")
                images.setdefault(class_id, []).extend(range(first, last + 1))
    except FileNotFoundError:
        raise UserError(f"{path}: not found; it is part of the repository: git checkout -- {path}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a readable CSV file: {error}") from None
    if len(names) < 2:
        raise UserError(f"{path}: needs at least two classes, one to train and one to test")
    if sorted(names) != list(range(1, len(names) + 1)):
        raise UserError(f"{path}: class ids must run from 1 to {len(names)}")
    return [
        ImageClass(
            class_id=class_id,
            name=names[class_id],
            split="train" if class_id <= len(names) // 2 else "test",
            images=tuple(sorted(images[class_id])),
        )
        for class_id in sorted(names)
    ]


def write_annotation(path: Path, rows: Sequence[tuple[int, int, int, str]]) -> None:
    """Write runs of (first image, last image, class id, class name)."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(rows)
    write_text(path, text.getvalue())
