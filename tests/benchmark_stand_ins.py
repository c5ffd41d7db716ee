"""CUB-200-2011, SOP and In-Shop as they are but for the pictures: their names and lists, over tiny JPEGs.

Each function gives name -> content of the official archive, for `counts` images and classes of each split.
"""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from memvir.images.archives import File
from tests.cars196_stand_in import picture

Counts = Mapping[str, tuple[int, int]]
Members = dict[str, bytes]

TINY = {
    "cub200": {"train": (24, 4), "test": (23, 4)},
    "sop": {"train": (25, 5), "test": (24, 5)},
    "inshop": {"train": (25, 5), "query": (17, 5), "gallery": (15, 5)},
}


def spread(images: int, classes: int) -> list[int]:
    """So many images over so many classes, as evenly as it goes."""
    return [images // classes + (number < images % classes) for number in range(classes)]


def cub200(counts: Counts) -> Members:
    members, images, labels = {}, [], []
    for class_id, size in enumerate([n for split in ("train", "test") for n in spread(*counts[split])], 1):
        for number in range(size):
            path = f"{class_id:03}.Bird_of_kind/Bird_Of_Kind_{number:04}_{class_id}.jpg"
            images.append(f"{len(images) + 1} {path}")
            labels.append(f"{len(images)} {class_id}")
            members[f"CUB_200_2011/images/{path}"] = picture(len(images))
    for name, lines in (("images.txt", images), ("image_class_labels.txt", labels)):
        members[f"CUB_200_2011/{name}"] = "".join(f"{line}\n" for line in lines).encode()
    return members


def sop(counts: Counts) -> Members:
    members, number, class_id = {}, 0, 0
    for split in ("train", "test"):
        lines = ["image_id class_id super_class_id path"]
        for size in spread(*counts[split]):
            class_id += 1
            kind = ("bicycle", "coffee_maker")[class_id % 2]
            for view in range(size):
                number += 1
                path = f"{kind}_final/{110000000000 + class_id}_{view}.JPG"
                lines.append(f"{number} {class_id} {1 + class_id % 2} {path}")
                members[f"Stanford_Online_Products/{path}"] = picture(number)
        members[f"Stanford_Online_Products/Ebay_{split}.txt"] = ("\n".join(lines) + "\n").encode()
    return members


def inshop(counts: Counts) -> Members:
    """The partition file in a folder of its own beside img/, as DeepFashion is laid out."""
    members: Members = {}
    rows = []
    for split in ("train", "query", "gallery"):
        first = 1 if split == "train" else counts["train"][1] + 1
        for item, size in enumerate(spread(*counts[split]), first):
            for view in range(size):
                path = f"img/WOMEN/Tees_Tanks/id_{item:08}/{view:02}_{split}.jpg"
                rows.append(f"{path:<70} id_{item:08}    {split}")
                members[f"Img/{path}"] = picture(len(rows))
    lines = [str(len(rows)), "image_name item_id evaluation_status", *rows]
    members["Eval/list_eval_partition.txt"] = ("\n".join(lines) + "\n").encode()
    return members


class Listing:
    """An archive as far as its names and lists go."""

    path = Path("archive.zip")

    def __init__(self, members: Members) -> None:
        self.members = members
        self.left_out: set[str] = set()

    def files(self) -> list[File]:
        return [File(name, len(content)) for name, content in self.members.items()]

    def contents(self, only: Collection[str] | None = None) -> Iterator[tuple[str, bytes]]:
        for name, content in self.members.items():
            if only is None or name in only:
                yield name, content
