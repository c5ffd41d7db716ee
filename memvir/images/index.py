"""index.csv: one row per image of a prepared data set. Training depends on this file alone.

Its rows are sorted and hold nothing but what the images are, so the same images give the same bytes.
"""

import csv
import io
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, NamedTuple

from memvir.errors import NotMade
from memvir.files import is_text, write_text

if TYPE_CHECKING:
    import pandas as pd

SPLITS = ("train", "test", "query", "gallery")
"""A data set has `train` and `test`, whose images are each compared with all others, or `query` and `gallery`."""


class IndexRow(NamedTuple):
    split: str
    """One of SPLITS."""
    class_id: int
    class_name: str
    file: str
    """Relative to the images folder, with forward slashes: SPLIT/CLASS/NAME."""
    md5: str


def write_index(path: Path, rows: Iterable[IndexRow]) -> None:
    """Write the rows: the training images first, each split by class, then by file."""
    ordered = sorted(rows, key=lambda row: (SPLITS.index(row.split), row.class_id, row.file))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(IndexRow._fields)
    writer.writerows(ordered)
    write_text(path, text.getvalue())


def read_index(path: Path) -> "pd.DataFrame":
    """Read and check index.csv.

    Returns:
        One row per image in the file's order; columns split, class_id (int64), class_name, file, md5.

    Raises:
        NotMade: the file is missing or is not an index as `write_index` writes it.
    """
    import pandas as pd  # late: sources of images write an index without it

    again = "prepare the images again"
    try:
        with path.open(newline="", encoding="utf-8") as file:
            header, *rows = csv.reader(file, strict=True)  # pandas would guess at rows that are too long
        table = pd.DataFrame(rows, columns=header, dtype=str)
    except FileNotFoundError:
        raise NotMade(f"{path}: not found; no images have been prepared") from None
    except (ValueError, csv.Error) as error:
        raise NotMade(f"{path}: not a readable table ({error}); {again}") from None
    if tuple(table.columns) != IndexRow._fields:
        raise NotMade(f"{path}: expected the columns {','.join(IndexRow._fields)}; {again}")
    checks = {
        "split": table["split"].isin(SPLITS),
        "class_id": table["class_id"].str.fullmatch(r"[0-9]{1,9}"),
        "class_name": (table["class_name"] != "") & table["class_name"].map(is_text),
        "file": table["file"].map(is_text) & table["file"].map(_is_inside) & ~table["file"].duplicated(),
        "md5": table["md5"].str.fullmatch(r"[0-9a-f]{32}"),
    }
    for column, good in checks.items():
        if not good.all():
            row = int((~good.astype(bool)).to_numpy().argmax())
            raise NotMade(f"{path}, row {row + 1}: {table[column][row]!r} is not a valid {column}; {again}")
    present = set(table["split"])
    expected = {"train", "query", "gallery"} if present & {"query", "gallery"} else {"train", "test"}
    for split in SPLITS:
        if (split in present) != (split in expected):
            raise NotMade(f"{path}: {'no' if split in expected else 'unexpected'} {split} images; {again}")
    table["class_id"] = table["class_id"].astype("int64")
    return table


def evaluated(index: "pd.DataFrame") -> "pd.DataFrame":
    """The rows of the images that a model is evaluated on: `test`, or `query` and then `gallery`."""
    return index[index["split"] != "train"]


def _is_inside(file: str) -> bool:
    parts = PurePosixPath(file).parts
    return len(parts) == 3 and parts[0] in SPLITS and ".." not in parts and "/".join(parts) == file
