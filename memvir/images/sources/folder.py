"""Your own images: dataset/NAME/source/train/CLASS/* and dataset/NAME/source/test/CLASS/*.

Only what DVC hashes is read: `source` may be a link, and so may a picture, but no folder between them.
"""

import logging
from pathlib import Path
from typing import Literal

from memvir.errors import UserError
from memvir.files import is_text, write_json
from memvir.images.index import IndexRow
from memvir.images.sources.source import Source

log = logging.getLogger("memvir")

SPLITS = ("train", "test")


class OwnFolder(Source):
    """Your own images: dataset/NAME/source/train/CLASS/* and dataset/NAME/source/test/CLASS/*."""

    source: Literal["folder"]

    def download(self, source: Path, target: Path) -> None:
        """There is nothing to fetch: see that the folder is there and note it."""
        class_folders(source)
        write_json(target / "source.json", {"source": "folder of the user", "path": source.as_posix()})

    def prepare(self, source: Path, download: Path, images: Path, index: Path) -> None:
        """Link source/{train,test}/CLASS/* into `images`, check each image, and write the index."""
        from memvir.images.archives import Folder
        from memvir.images.arrangement import arrange

        folders = class_folders(source)
        names = {split: [folder.name for folder in folders[split]] for split in SPLITS}
        shared = sorted(set(names["train"]) & set(names["test"]))
        if shared:
            log.warning(
                "warning: %s: train and test share %d class name(s) (%s); the protocol expects classes that training "
                "has not seen, so the figures will be too good",
                source,
                len(shared),
                ", ".join(shared[:5]) + (", ..." if shared[5:] else ""),
            )
        class_ids = {name: i for i, name in enumerate(dict.fromkeys(names["train"] + names["test"]), 1)}
        plan = {}
        counts = dict.fromkeys([folder for split in SPLITS for folder in folders[split]], 0)
        for split in SPLITS:
            for folder in folders[split]:
                for name, path in Folder(folder).contents():
                    if "/" in name:
                        raise UserError(f"{path}: a folder inside a class folder; the form is {split}/CLASS/IMAGE")
                    _check_name(folder, name)
                    counts[folder] += 1
                    place = f"{split}/{folder.name}/{name}"
                    plan[place] = IndexRow(split, class_ids[folder.name], folder.name, place, "")
        for folder, count in counts.items():
            if not count:
                raise UserError(f"{folder}: the class has no images; add some or remove the folder")
        arrange(Folder(source), plan, images, index)


def class_folders(source: Path) -> dict[str, list[Path]]:
    """The class folders of each split, sorted by name. Raises UserError saying where images belong."""
    from memvir.images.archives import is_clutter

    form = (
        f"put images into {source}/train/CLASS/ and {source}/test/CLASS/ ({source} may be a link to a folder elsewhere)"
    )
    if source.is_symlink() and not source.exists():
        raise UserError(f"{source}: the link leads to {source.readlink()}, which does not exist; {form}")
    if not source.is_dir():
        raise UserError(f"{source}: not found; {form}")
    for folder in (source.parent.parent, source.parent):
        if (hiding := folder / ".dvcignore").exists():
            raise UserError(f"{hiding}: may hide images from DVC, changes of which would go unnoticed; remove it")
    result = {}
    for split in SPLITS:
        folder = source / split
        if not folder.is_dir():
            raise UserError(f"{folder}: not found; {form}")
        _check_changes_show(folder)
        entries = sorted(
            (entry for entry in folder.iterdir() if not is_clutter(entry.name)), key=lambda entry: entry.name
        )
        for entry in entries:
            _check_name(folder, entry.name)
            if not entry.is_dir():
                raise UserError(f"{entry}: not a class folder; {form}")
            _check_changes_show(entry)
        if not entries:
            raise UserError(f"{folder}: no classes; {form}")
        result[split] = entries
    return result


def _check_changes_show(folder: Path) -> None:
    """What DVC passes over must not be read either: changes there would leave old results standing as new ones."""
    from memvir.images.archives import refuse_folder_link

    refuse_folder_link(folder)
    if (folder / ".dvc").exists():
        raise UserError(
            f"{folder}: holds .dvc, a project of its own, in which changes would go unnoticed; remove {folder}/.dvc"
        )


def _check_name(folder: Path, name: str) -> None:
    if not is_text(name):
        raise UserError(f"{folder}: the name {name!r} holds control characters or bytes that are no text; rename it")
