"""In-Shop Clothes Retrieval of DeepFashion: 7,982 articles, queries and gallery apart (docs/METHOD.md, section 4).

The benchmark is the low-resolution img.zip with list_eval_partition.txt, which lies in the archive or beside it. The
high-resolution pictures have the same names and other pixels: they are told by how many bytes they take.
"""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from memvir.errors import UserError
from memvir.images.annotation import file_name
from memvir.images.index import IndexRow
from memvir.images.plans import Plan, by_list, list_rows, read_lists
from memvir.images.sources.benchmark import Benchmark

if TYPE_CHECKING:
    from memvir.images.archives import Archive

PARTITION = "list_eval_partition.txt"
COLUMNS = "image_name item_id evaluation_status"
ROW = r"img/((?:MEN|WOMEN)/([A-Za-z0-9_-]+)/id_[0-9]{8}/([A-Za-z0-9_-]+\.jpg)) (id_([0-9]{8})) (train|query|gallery)"


class InShop(Benchmark):
    source: Literal["inshop"]

    title = "In-Shop"
    official = "img.zip"
    other_forms = f"a folder with its pictures, and {PARTITION},"
    copies = (
        "mmlab.ie.cuhk.edu.hk/projects/DeepFashion/InShopRetrieval.html leads to a Google Drive, which wants a click: "
        f"In-shop Clothes Retrieval Benchmark, Img/img.zip (not img_highres.zip) and Eval/{PARTITION}",
    )
    counts = {"train": (25882, 3997), "query": (14218, 3985), "gallery": (12612, 3985)}
    picture_bytes: ClassVar[int] = 842_962_844
    partition_sha256: ClassVar[str] = "cfada103c44df866db5e2ee9ecc2301ca691a4d0cdb3c875fe4051b62570894c"

    def plan(self, archive: "Archive", source: Path) -> Plan:
        ((where, content),) = read_lists(archive, (PARTITION,), source)
        header = (str(sum(images for images, _ in self.counts.values())), COLUMNS)
        plan = by_list(
            archive,
            {
                row[1]: IndexRow(row[6], int(row[5]), row[4], f"{row[6]}/{row[4]}/{row[2]}_{file_name(row[3])}", "")
                for row in list_rows(where, content, f"`{COLUMNS}`", ROW, header)
            },
        )
        if (found := hashlib.sha256(content).hexdigest()) != self.partition_sha256:
            raise UserError(f"{where}: its sha256 is {found}, expected {self.partition_sha256}")
        size = sum(file.size for file in archive.files() if file.name in plan)
        if size != self.picture_bytes:
            kind = "high-resolution" if size > self.picture_bytes else "shrunk"
            raise UserError(
                f"{archive.path}: {kind} pictures, {size:,} bytes in all; the benchmark is the low-resolution img.zip, "
                f"{self.picture_bytes:,} bytes of pictures with the same names and other pixels, and figures of others "
                "are not comparable with its"
            )
        return plan
