"""A published data set: from a folder, an archive or an address, whichever is given, and verified whatever it is.

A benchmark is a class with the names below and `plan`, which says where each file belongs, or why it is not the data.
"""

import contextlib
import hashlib
import json
import logging
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, ClassVar
from urllib.parse import urlsplit

from memvir.errors import NotMade, UserError
from memvir.files import file_hash, write_json
from memvir.images.annotation import file_name
from memvir.images.plans import Plan, check_counts
from memvir.images.sources.source import Source
from memvir.sections import UserPath

if TYPE_CHECKING:
    from memvir.images.archives import Archive

log = logging.getLogger("memvir")

ARCHIVE_SUFFIXES = (".tgz", ".tar", ".gz", ".bz2", ".xz", ".zip")


class Benchmark(Source):
    addresses: list[str]
    """Where to download the archive; tried in order."""
    md5: str | None
    """md5 of the official archive; what comes in another form is verified by names and counts. Null: not verified."""
    archive: UserPath | None = None
    """A local archive to use instead of downloading."""
    folder: UserPath | None = None
    """A folder that already holds the unpacked images, in any of the accepted forms."""

    title: ClassVar[str]
    official: ClassVar[str]
    """The official archive's file name."""
    other_forms: ClassVar[str]
    """What would do as well, for the message that says so."""
    copies: ClassVar[tuple[str, ...]]
    """Where it is known to be."""
    counts: ClassVar[Mapping[str, tuple[int, int]]]
    """Images and classes of each split: the protocol's numbers."""
    spot_checks: ClassVar[Mapping[str, str]] = {}
    """md5 of some pictures by the end of their names, which tell copies that were resized from the original."""

    @abstractmethod
    def plan(self, archive: "Archive", source: Path) -> Plan:
        """Where each image of the archive belongs, whichever of the accepted forms it has.

        Raises UserError naming what is missing, extra, or of the wrong checksum.
        """

    def check_source(self, source: Path) -> None:
        """Raise UserError, before anything is downloaded, if `plan` could not use what lies in `source`."""

    def download(self, source: Path, target: Path) -> None:
        """Find the images and note in target/source.json where they are.

        `folder` or `archive` is used if given; else what lies in `source`, else what an address gives. Of the first two
        DVC sees the name alone: it notices changes in `source`, not in them.
        """
        from memvir.download import DownloadError, fetch
        from memvir.images.archives import refuse_folder_link

        self.check_source(source)
        for key, path in (("folder", self.folder), ("archive", self.archive)):
            if path is not None:
                if not path.exists():
                    raise UserError(f"{path}: not found; it is what data.{key} names")
                return self._use(path, f"data.{key}", source, target)
        tried: list[tuple[str, str]] = []
        for path in self._dropped(source):
            try:
                refuse_folder_link(path)
                return self._use(path, f"found in {source.as_posix()}", source, target)
            except UserError as error:
                tried.append((str(path), str(error).removeprefix(f"{path}: ")))
                log.warning("warning: %s", error)
        for address in self.addresses:
            name = file_name(PurePosixPath(urlsplit(address).path).name)
            path = target / name
            try:
                if path.exists():
                    with contextlib.suppress(UserError):
                        return self._use(path, address, source, target)
                digest = self.md5 if name == self.official else None
                fetch([address], path, algorithm="md5", digest=digest, what=self.title)
                return self._use(path, address, source, target)
            except DownloadError as error:
                tried += error.answers
            except UserError as error:
                if not path.exists():
                    raise  # no room on the disk, which another address would not change
                path.unlink()
                tried.append((address, f"gave a file of no use: {str(error).removeprefix(f'{path}: ')}"))
        answers = "; ".join(f"{what}: {answer}" for what, answer in tried) or "nothing, no address is given"
        known = f" (md5 {self.md5})" if self.md5 else ""
        raise UserError(
            f"{self.title}: no source worked. Tried: {answers}. What you can do: get {self.official}{known} or "
            f"{self.other_forms} and put it into {source.as_posix()}/, or name it under data.archive (data.folder,"
            f" if it is unpacked). Known copies: {'; '.join(self.copies)}"
        )

    def prepare(self, source: Path, download: Path, images: Path, index: Path) -> None:
        """Arrange the images that `download` found by split and class and write the index."""
        from memvir.images.archives import open_archive
        from memvir.images.arrangement import arrange

        try:
            found = json.loads((download / "source.json").read_text(encoding="utf-8"))
            path = download / found["path"]  # or, where that is absolute, it alone
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            raise NotMade(f"{download / 'source.json'}: not there or damaged; download the images again") from None
        known = "; ".join(text for key, text in found.items() if key != "path")
        log.info("%s: preparing %s (%s)", self.source, path, known)
        if not path.exists():
            raise NotMade(f"{path}: was there when it was found ({known}), now it is not; download the images again")
        with open_archive(path) as archive:
            arrange(archive, self._checked_plan(archive, source), images, index)

    def check_md5(self, archive: "Archive") -> None:
        """Raise UserError if it is a file other than the one that `md5` is of."""
        if self.md5 and archive.path.is_file() and (found := file_hash(archive.path)) != self.md5:
            raise UserError(f"{archive.path}: its md5 is {found}, expected {self.md5}")

    def _use(self, path: Path, how: str, source: Path, target: Path) -> None:
        """Verify an archive or folder and note it; one inside `target` relative to it, so that all can be moved."""
        from memvir.images.archives import open_archive

        with open_archive(path) as archive:
            pictures = self._unlike_original(archive, self._checked_plan(archive, source))
        log.info("%s: using %s (%s)", self.source, path, how)
        note = {"source": how, "path": path.name if path.parent == target else str(path.absolute())}
        if pictures:
            log.warning("warning: %s: %s", path, pictures)
            note["pictures"] = pictures
        write_json(target / "source.json", note)

    def _checked_plan(self, archive: "Archive", source: Path) -> Plan:
        plan = self.plan(archive, source)
        check_counts(archive, plan, self.counts)
        return plan

    def _unlike_original(self, archive: "Archive", plan: Plan) -> str:
        """What the first picture that is not the original's is like; empty if those that are known are as they were."""
        from memvir.images.archives import content_of
        from memvir.images.decode import load

        known = {name: md5 for name in plan for end, md5 in self.spot_checks.items() if name.endswith(end)}
        for name, content in archive.contents(known) if known else ():  # of a tar it unpacks everything
            picture = content_of(content)
            if (found := hashlib.md5(picture, usedforsecurity=False).hexdigest()) != known[name]:
                size = "{} x {}".format(*load(picture, name).size)
                return f"copies, not the original pictures: {name} has {size} pixels and md5 {found}"
        return ""

    def _dropped(self, source: Path) -> list[Path]:
        """Archives and folders that someone put into source/, the official archive first."""
        from memvir.images.archives import is_clutter

        found = [
            entry
            for entry in (source.iterdir() if source.is_dir() else ())
            if not is_clutter(entry.name) and (entry.is_dir() or entry.name.lower().endswith(ARCHIVE_SUFFIXES))
        ]
        return sorted(found, key=lambda entry: (entry.name != self.official, entry.name))
