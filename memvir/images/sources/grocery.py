"""Grocery Store Dataset (Klasson, Zhang, Kjellstroem, WACV 2019): 81 kinds of fruit, vegetables and packages.

5,421 photographs from shops, of train.txt, val.txt and test.txt together; the pictures from a shop's web page stay
out. Every second kind trains and the others test, so that both halves have fruit, vegetables and packages. The split
is ours: the data set's own is one of classification, with the same kinds on both sides.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from memvir.images.annotation import file_name
from memvir.images.index import IndexRow
from memvir.images.plans import Plan, by_list, image_names, list_rows, read_lists
from memvir.images.sources.benchmark import Benchmark

if TYPE_CHECKING:
    from memvir.images.archives import Archive

LISTS = ("train.txt", "val.txt", "test.txt")
PATH = r"(?:train|val|test)/(?:Fruit|Packages|Vegetables)/[A-Za-z0-9_/-]+\.jpg"


class Grocery(Benchmark):
    source: Literal["grocery"]

    title = "Grocery Store Dataset"
    official = "GroceryStoreDataset-master.zip"
    other_forms = "a zip or tar of its folder `dataset`"
    copies = ("github.com/marcusklasson/GroceryStoreDataset",)
    counts = {"train": (2781, 41), "test": (2640, 40)}

    def plan(self, archive: "Archive", source: Path) -> Plan:
        rows: dict[str, IndexRow] = {}
        for found in read_lists(archive, LISTS, source):
            for row in list_rows(*found, "`PATH, class, coarse class`", rf"({PATH}), ([0-9]{{1,2}}), [0-9]{{1,2}}"):
                rows[row[1]] = _row(row[1], int(row[2]))
        photographs = [name for name in image_names(archive) if re.search(rf"(^|/){PATH}$", name)]
        return by_list(archive, rows, photographs)


def _row(path: str, label: int) -> IndexRow:
    """LIST/KIND/.../CLASS/CLASS_001.jpg as a row of the index; the lists use the same names, so a picture's has its."""
    folders, _, picture = path.rpartition("/")
    part, name = folders.partition("/")[0], folders.rpartition("/")[2]
    split = "test" if label % 2 else "train"
    place = f"{split}/{label:02}_{file_name(name)}/{part}_{file_name(picture)}"
    return IndexRow(split, label, name.replace("-", " "), place, "")
