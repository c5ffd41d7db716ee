"""Stanford Online Products: 22,634 articles that were for sale, a few photographs each (docs/METHOD.md, section 4).

Ebay_train.txt and Ebay_test.txt say which picture shows which article. Copies that were resized to 224 pixels go round:
they are taken, and named as such.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from memvir.images.annotation import file_name
from memvir.images.index import IndexRow
from memvir.images.plans import Plan, by_list, list_rows, read_lists
from memvir.images.sources.benchmark import Benchmark

if TYPE_CHECKING:
    from memvir.images.archives import Archive

COLUMNS = "image_id class_id super_class_id path"
ROW = r"[0-9]+ ([0-9]{1,6}) [0-9]+ (([a-z_]+)_final/[A-Za-z0-9_]+\.JPG)"


class Sop(Benchmark):
    source: Literal["sop"]

    title = "Stanford Online Products"
    official = "Stanford_Online_Products.zip"
    other_forms = "a zip or tar of its folders (bicycle_final, ...) with Ebay_train.txt and Ebay_test.txt"
    copies = (
        "ftp://cs.stanford.edu/cs/cvgl/Stanford_Online_Products.zip",
        "dropbox.com/s/fu8dgxulf10hns9/online_products.tar",
        "drive.google.com, file 1TclrpQOF_ullUP99wk_gjGN8pKvtErG8",
    )
    counts = {"train": (59551, 11318), "test": (60502, 11316)}
    spot_checks = {
        "bicycle_final/111265328556_0.JPG": "77420a4db9dd9284378d7287a0729edb",
        "table_final/111194782300_0.JPG": "8203e079b5c134161bbfa7ee2a43a0a1",
    }

    def plan(self, archive: "Archive", source: Path) -> Plan:
        if archive.path.name == self.official:
            self.check_md5(archive)
        lists = read_lists(archive, ("Ebay_train.txt", "Ebay_test.txt"), source)
        return by_list(
            archive,
            {
                row[2]: _row(split, int(row[1]), row[3], row[2])
                for split, found in zip(("train", "test"), lists, strict=True)
                for row in list_rows(*found, f"`{COLUMNS}`", ROW, header=(COLUMNS,))
            },
        )


def _row(split: str, class_id: int, kind: str, path: str) -> IndexRow:
    place = f"{split}/{class_id:05}_{kind}/{file_name(path.rpartition('/')[2])}"
    return IndexRow(split, class_id, f"{kind.replace('_', ' ')} {class_id}", place, "")
