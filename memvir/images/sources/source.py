"""What every source of images is: a section of settings that can fetch its files and arrange them."""

from abc import ABC, abstractmethod
from pathlib import Path

from memvir.sections import Section


class Source(Section, ABC):
    """The `data` of a recipe. What its functions need of NumPy, Pillow and the like they import themselves, so that
    params.yaml is read in no time."""

    source: str
    """Its name in `SOURCES`; each class says which, by a Literal."""

    @abstractmethod
    def download(self, source: Path, target: Path) -> None:
        """Fill `target` (dataset/D/download) from wherever the images are, which may be `source` (dataset/D/source)."""

    @abstractmethod
    def prepare(self, source: Path, download: Path, images: Path, index: Path) -> None:
        """Fill images/SPLIT/CLASS/* with what `download` holds or names, and write index.csv."""
