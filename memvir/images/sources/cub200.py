"""CUB-200-2011: 200 kinds of birds, the first hundred for training (docs/METHOD.md, section 4).

Folders carry the number of their class, so any archive of them will do; where the official lists lie beside, every
picture that they name must be there. Eight pictures are grey; decoding makes colour of them as of any other.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from memvir.errors import UserError
from memvir.images.annotation import file_name
from memvir.images.index import IndexRow
from memvir.images.plans import Plan, by_list, image_names, list_rows, read_lists
from memvir.images.sources.benchmark import Benchmark

if TYPE_CHECKING:
    from memvir.images.archives import Archive

CLASS_FOLDER = r"([0-9]{3})\.([^/]+)"


class Cub200(Benchmark):
    source: Literal["cub200"]

    title = "CUB-200-2011"
    official = "CUB_200_2011.tgz"
    other_forms = "a zip or tar of its class folders (001.Black_footed_Albatross, ...)"
    copies = (
        "data.caltech.edu/records/65de6-vp158",
        "s3.amazonaws.com/fast-ai-imageclas/CUB_200_2011.tgz",
        "dropbox.com/s/tjhf7fbxw5f9u0q/cub200.tar",
    )
    counts = {"train": (5864, 100), "test": (5924, 100)}
    spot_checks = {"Black_Footed_Albatross_0001_796111.jpg": "4c84da568f89519f84640c54b7fba7c2"}

    def plan(self, archive: "Archive", source: Path) -> Plan:
        if archive.path.name == self.official:
            self.check_md5(archive)
        names = [file.name.rpartition("/")[2] for file in archive.files()]
        if "images.txt" in names:
            paths = _listed(archive, source)
        else:
            paths = ["/".join(name.split("/")[-2:]) for name in image_names(archive)]
        return by_list(archive, {path: row for path in paths if (row := self._row(path))})

    def _row(self, path: str) -> IndexRow | None:
        """001.Black_footed_Albatross/NAME.jpg as a row of the index; None if it is not in a class's folder."""
        folder, _, name = path.partition("/")
        match = re.fullmatch(CLASS_FOLDER, folder)
        if not match or not name:
            return None
        class_id = int(match[1])
        split = "train" if class_id <= self.counts["train"][1] else "test"
        place = f"{split}/{file_name(folder)}/{file_name(name)}"
        return IndexRow(split, class_id, match[2].replace("_", " "), place, "")


def _listed(archive: "Archive", source: Path) -> list[str]:
    """The pictures of images.txt, each in the class that image_class_labels.txt gives it."""
    images, labels = read_lists(archive, ("images.txt", "image_class_labels.txt"), source)
    paths = {row[1]: row[2] for row in list_rows(*images, "`image_id CLASS/NAME`", rf"([0-9]+) ({CLASS_FOLDER}/[^/]+)")}
    classes = {row[1]: row[2] for row in list_rows(*labels, "`image_id class_id`", r"([0-9]+) ([0-9]+)")}
    for image in sorted({*paths, *classes}, key=int):
        here, there = f"class {classes.get(image, 'none')}", f"class {int(paths.get(image, '000')[:3]) or 'none'}"
        if here != there:
            raise UserError(f"{labels[0]}: image {image} is of {here}, and of {there} in {images[0]}")
    return list(paths.values())
