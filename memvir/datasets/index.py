"""index.csv: one row per image of a prepared data set. Training depends on this file alone.

Its rows are sorted and hold nothing but what the images are, so the same images give the same bytes.
"""

import csv
import io
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import pandas as pd

from memvir.errors import UserError
from memvir.files import write_text

SPLITS = ("train", "test")


class IndexRow(NamedTuple):
    split: str
    """train or test"""
    class_id: int
    class_name: str
    file: str
    """Relative to the images folder, with forward slashes: SPLIT/CLASS/NAME."""
    md5: str


def write_index(path: Path, rows: Iterable[IndexRow]) -> None:
    """Write the rows: training half first, then by class, then by file."""
    ordered = sorted(rows, key=lambda row: (SPLITS.index(row.split), row.class_id, row.file))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(IndexRow._fields)
    writer.writerows(ordered)
    write_text(path, text.getvalue())


def read_index(path: Path) -> pd.DataFrame:
    """Read and check index.csv.

    Returns:
        One row per image in the file's order; columns split, class_id (int64), class_name, file, md5.

    Raises:
        UserError: the file is missing or is not an index as `write_index` writes it.
    """
    again = "run its prepare stage again"
    try:
        with path.open(newline="", encoding="utf-8") as file:
            header, *rows = csv.reader(file, strict=True)  # pandas would guess at rows that are too long
        table = pd.DataFrame(rows, columns=header, dtype=str)
    except FileNotFoundError:
        raise UserError(f"{path}: not found; run the prepare stage first") from None
    except (ValueError, csv.Error) as error:
        raise UserError(f"{path}: not a readable table ({error}); {again}") from None
    if tuple(table.columns) != IndexRow._fields:
        raise UserError(f"{path}: expected the columns {','.join(IndexRow._fields)}; {again}")
    checks = {
        "split": table["split"].isin(SPLITS),
        "class_id": table["class_id"].str.fullmatch(r"[0-9]{1,9}"),
        "class_name": table["class_name"].str.len() > 0,
        "file": table["file"].map(_is_inside) & ~table["file"].duplicated(),
        "md5": table["md5"].str.fullmatch(r"[0-9a-f]{32}"),
    }
    for column, good in checks.items():
        if not good.all():
            row = int((~good.astype(bool)).to_numpy().argmax())
            raise UserError(f"{path}, row {row + 1}: {table[column][row]!r} is not a valid {column}; {again}")
    for split in SPLITS:
        if not (table["split"] == split).any():
            raise UserError(f"{path}: no {split} images; {again}")
    table["class_id"] = table["class_id"].astype("int64")
    return table


def _is_inside(file: str) -> bool:
    parts = PurePosixPath(file).parts
    return len(parts) == 3 and parts[0] in SPLITS and ".." not in parts and "/".join(parts) == file
